"""llama.cpp itself, where its library is installed: what it makes of a file.

In: a GGUF. Out: ids of texts, the tokens that end an answer, logits and greedy ids. The library is that of the PyPI
package llama-cpp-python (the extra `verify`), used here and nowhere else, and never to write a file. It computes in
float32 on the CPU, its cache in float32 too, one sequence at a time.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fitune.core.errors import ModelError

PACKAGE = "llama_cpp"
FLOAT32 = 0  # ggml's number of the type
INSTALL = "pip install 'fitune[verify]'"


def installed() -> bool:
    """Is the library there?"""
    return importlib.util.find_spec(PACKAGE) is not None


class LlamaCpp:
    """A file, loaded.

    Args:
        file: a GGUF.
        context: the most tokens of a sequence.
        adapter: a LoRA adapter to put on it.

    Raises:
        ModelError: the library is not there, or cannot load the file.
    """

    def __init__(self, file: Path, context: int, adapter: Path | None = None) -> None:
        if not installed():
            raise ModelError("llama.cpp's library is not installed", expected=PACKAGE, fix=INSTALL)
        self.api: ModuleType = importlib.import_module(PACKAGE)
        self._said: list[str] = []
        self._hear = self.api.llama_log_callback(self._heard)  # kept alive: the library calls it
        self.api.llama_log_set(self._hear, ctypes.c_void_p(0))
        self.api.llama_backend_init()
        settings = self.api.llama_model_default_params()
        settings.n_gpu_layers = 0
        self._model = self.api.llama_model_load_from_file(os.fsencode(file), settings)
        self._context: Any = None
        if not self._model:
            said = " ".join(self._said[-3:]).strip() or "no reason given"
            raise ModelError(f"{file}: llama.cpp cannot load it", received=said[:300])
        self.vocabulary = self.api.llama_model_get_vocab(self._model)
        self.size = int(self.api.llama_vocab_n_tokens(self.vocabulary))
        self._open(context)
        if adapter is not None:
            self._put_on(adapter)

    def _put_on(self, adapter: Path) -> None:
        made = self.api.llama_adapter_lora_init(self._model, os.fsencode(adapter))  # the model frees it
        if not made:
            raise ModelError(f"{adapter}: llama.cpp cannot load it", received=" ".join(self._said[-3:])[:300])
        one, scale = (self.api.llama_adapter_lora_p_ctypes * 1)(made), (ctypes.c_float * 1)(1.0)
        if self.api.llama_set_adapters_lora(self._context, one, 1, scale):
            raise ModelError(f"{adapter}: llama.cpp cannot put it on the model")

    def _open(self, context: int) -> None:
        settings = self.api.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = context
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        settings.type_k = settings.type_v = FLOAT32
        settings.flash_attn_type = self.api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = self.api.llama_init_from_model(self._model, settings)
        if not self._context:
            raise ModelError("llama.cpp cannot make a context", received=" ".join(self._said[-3:])[:300])

    def _heard(self, level: int, text: bytes, data: object) -> None:
        """What the library says; kept for its errors."""
        self._said = [*self._said[-20:], text.decode("utf-8", "replace")]

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *error: object) -> None:
        if self._context:
            self.api.llama_free(self._context)
        if self._model:
            self.api.llama_model_free(self._model)
        self._context = self._model = None

    def ids(self, text: str, *, parse: bool = True, frame: bool = True) -> list[int]:
        """Ids of a text.

        Args:
            text: the text.
            parse: do the names of control tokens in it become these tokens?
            frame: BOS in front, where the file says so.
        """
        data = text.encode("utf-8", "surrogatepass")
        room = len(data) + 16
        found = (self.api.llama_token * room)()
        count = self.api.llama_tokenize(self.vocabulary, data, len(data), found, room, frame, parse)
        return [int(i) for i in found[: max(0, count)]]

    def prompt(self, text: str, bos: str | None) -> list[int]:
        """Ids of a rendered chat template, as llama.cpp's server makes them: a BOS that it adds itself is taken away
        from the text first.

        Args:
            text: what the template gave.
            bos: the text of BOS.
        """
        adds = bool(self.api.llama_vocab_get_add_bos(self.vocabulary))
        return self.ids(text.removeprefix(bos) if adds and bos else text)

    def piece(self, token: int) -> bytes:
        """What a token stands for in an answer."""
        room = 64
        while True:
            found = ctypes.create_string_buffer(room)
            size = int(self.api.llama_token_to_piece(self.vocabulary, token, found, room, 0, True))
            if size >= 0:
                return found.raw[:size]
            room = -size

    def control(self) -> set[int]:
        """Every token that a text becomes only where control tokens are parsed."""
        flag = int(self.api.LLAMA_TOKEN_ATTR_CONTROL)
        return {n for n in range(self.size) if self.api.llama_vocab_get_attr(self.vocabulary, n) & flag}

    def ends(self) -> set[int]:
        """Every token at which generation ends."""
        return {n for n in range(self.size) if self.api.llama_vocab_is_eog(self.vocabulary, n)}

    def logits(self, ids: Sequence[int], *, more: bool = False) -> NDArray[np.float32]:
        """(vocabulary,): of the token behind these.

        Args:
            ids: a sequence, or what comes behind the last one.
            more: is it behind the last one?
        """
        if not more:
            self.api.llama_memory_clear(self.api.llama_get_memory(self._context), True)
        array = (self.api.llama_token * len(ids))(*ids)
        if self.api.llama_decode(self._context, self.api.llama_batch_get_one(array, len(ids))):
            raise ModelError("llama.cpp could not compute a step", received=" ".join(self._said[-3:])[:300])
        there = self.api.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(there, shape=(self.size,)).copy()

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The most probable ids behind a prompt, one after the other, whatever ends an answer."""
        found: list[int] = []
        logits = self.logits(prompt)
        for _ in range(count):
            found.append(int(logits.argmax()))
            if len(found) < count:
                logits = self.logits(found[-1:], more=True)
        return found
