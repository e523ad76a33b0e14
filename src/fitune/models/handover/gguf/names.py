"""Which tensors a GGUF gets, and of what each is made.

In: the tensors of a model folder, its config. Out: pieces in the order of the file: llama.cpp's name, sizes, and the
parts that are read when their turn comes. The experts of a layer become one tensor, a part for each.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gguf import MODEL_ARCH, get_tensor_name_map
from torch import Tensor

from fitune.core.errors import ModelError
from fitune.models.handover.gguf import hyper
from fitune.models.handover.gguf.architectures import Architecture
from fitune.models.handover.gguf.source import Source

EXPERT = re.compile(r"(model\.layers\.\d+)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight")
PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}  # Mixtral's names
HEADS = ("lm_head.weight", "embed_out.weight")
COMPUTED = ("inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")  # no weights
HEAD, EMBEDDING = "output.weight", "token_embd.weight"


@dataclass(frozen=True)
class Piece:
    """A tensor of the file. parts: laid one behind the other they are the tensor, row by row."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Callable[[], Tensor], ...]


def pieces(source: Source, config: Any, architecture: Architecture) -> list[Piece]:
    """All tensors of the file.

    Raises:
        ModelError: a tensor that llama.cpp has no name for.
    """
    table = get_tensor_name_map(architecture.arch, config.num_hidden_layers)
    tied = bool(getattr(config, "tie_word_embeddings", False))
    found: dict[str, Piece] = {}
    experts: dict[str, dict[int, str]] = {}
    unknown = []
    for name in source.names:
        if name.endswith(COMPUTED) or (tied and name in HEADS):
            continue
        if match := EXPERT.fullmatch(name):
            stem = f"{match[1]}.mlp.experts.{PARTS.get(match[3], match[3])}.weight"
            experts.setdefault(stem, {})[int(match[2])] = name
            continue
        whole = architecture.order(name, torch.empty(source.shape(name), device="meta"), config)
        for part, like in architecture.apart(name, whole, config).items():
            known = table.get_name(part.removeprefix(architecture.prefix), try_suffixes=(".weight", ".bias"))
            if known is None:
                unknown.append(part)
                continue
            read = partial(_read, source, name, part, architecture, config)
            found[known] = Piece(known, tuple(like.shape), (read,))
    for stem, numbered in experts.items():
        known = table.get_name(stem, try_suffixes=(".weight",))
        if known is None:
            unknown.append(stem)
            continue
        parts = [numbered[n] for n in sorted(numbered)]
        shape = (len(parts), *source.shape(parts[0]))
        found[known] = Piece(known, shape, tuple(partial(source.read, name) for name in parts))
    _check(found, unknown, architecture)
    if architecture.own_head and tied:
        found[HEAD] = Piece(HEAD, found[EMBEDDING].shape, found[EMBEDDING].parts)
    for name, tensor in hyper.tensors(config).items():
        found[name] = Piece(name, tuple(tensor.shape), (partial(torch.clone, tensor),))
    return list(found.values())


def _read(source: Source, name: str, part: str, architecture: Architecture, config: Any) -> Tensor:
    whole = architecture.order(name, source.read(name), config)
    return architecture.apart(name, whole, config)[part].contiguous()


def _check(found: dict[str, Piece], unknown: list[str], architecture: Architecture) -> None:
    if unknown:
        raise ModelError(
            f"llama.cpp's {architecture.name} has no place for {len(unknown)} tensors of this model",
            received=", ".join(unknown[:5]),
            fix="merge the run first: what a method adds beside the weights has no place in a GGUF",
        )
    headless = (MODEL_ARCH.GEMMA, MODEL_ARCH.GEMMA2)
    if HEAD in found and architecture.arch in headless:
        raise ModelError(f"llama.cpp's {architecture.name} has no head of its own", received="a head that is not tied")
