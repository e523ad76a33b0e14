"""GGUF: a model as llama.cpp and what is built on it (Ollama, LM Studio) read it.

In: a model folder with its tokenizer, chat template and stop tokens. Out: one file. Which models: architectures.py;
sizes and positions: hyper.py; names and order of tensors: names.py, order.py; the tokenizer: vocabulary.py,
pretokenizers.py; the file: stream.py, and read back: readback.py. The format itself is the `gguf` package's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf import Keys

from fitune.models import weights
from fitune.models.configs import read_config
from fitune.models.handover.gguf import architectures, hyper, names, stream, vocabulary
from fitune.models.handover.gguf.architectures import Architecture
from fitune.models.handover.gguf.names import Piece
from fitune.models.handover.gguf.source import Source
from fitune.models.handover.gguf.vocabulary import Vocabulary

PHI3 = re.compile("phi-?3", re.IGNORECASE)  # a name by which llama.cpp takes spaces behind control tokens away
PHI3_TOKENS = {"</s>", "<unk>", "<s>", "<|endoftext|>"}


@dataclass(frozen=True)
class Draft:
    """All that a file will hold; its tensors are read when it is written."""

    architecture: Architecture
    metadata: dict[str, Any]
    pieces: list[Piece]
    vocabulary: Vocabulary
    context: int
    notes: list[str] = field(default_factory=list)

    def parameters(self) -> int:
        """Numbers in all tensors."""
        total = 0
        for piece in self.pieces:
            count = 1
            for size in piece.shape:
                count *= size
            total += count
        return total

    def write(self, file: Path, wanted: str) -> None:
        """Write the file; see `stream.write`."""
        stream.write(file, self.architecture.name, self.metadata, self.pieces, wanted)


def draft(folder: Path, name: str, tokenizer: Any, stops: Sequence[int], prompt: Sequence[int]) -> Draft:
    """What the file of a model will hold.

    Args:
        folder: of the model.
        name: what it is called.
        tokenizer: of the model, with its chat template.
        stops: ids that end an answer, the trained one first.
        prompt: ids of one prompt, which say whether it begins with BOS.

    Raises:
        ModelError: llama.cpp has no such model, or no such tokenizer.
    """
    config = read_config(folder)
    weights.check(folder)
    architecture = architectures.of(config)
    found = vocabulary.of(tokenizer, config.vocab_size)
    metadata = {
        Keys.General.TYPE: "model",
        Keys.General.NAME: _name(name, tokenizer),
        **hyper.metadata(config, architecture),
        **found.metadata(),
        **vocabulary.special(tokenizer, stops, begins=vocabulary.begins(tokenizer, prompt)),
        **_templates(tokenizer.chat_template),
    }
    pieces = names.pieces(Source(folder, config), config, architecture)
    notes = hyper.notes(config, architecture)
    return Draft(architecture, metadata, pieces, found, hyper.context(config, architecture), notes)


def _name(name: str, tokenizer: Any) -> str:
    """The model's name. llama.cpp takes the spaces behind control tokens away in what is called Phi-3, and in nothing
    else: so a model is called that where its tokenizer does so."""
    added = tokenizer.added_tokens_decoder.values()
    strips = any(token.rstrip for token in added) and set(tokenizer.get_vocab()) >= PHI3_TOKENS
    found = PHI3.search(name)
    if strips:
        return name if found else f"Phi-3 {name}"
    return PHI3.sub("phi 3", name)


def _templates(jinja: str | Mapping[str, str] | None) -> dict[str, Any]:
    """The chat template; of several the others by their names."""
    if not jinja:
        return {}
    several = {"default": jinja} if isinstance(jinja, str) else dict(jinja)
    main = several.pop("default", None)
    found: dict[str, Any] = {Keys.Tokenizer.CHAT_TEMPLATE: main} if main else {}
    if several:
        found[Keys.Tokenizer.CHAT_TEMPLATES] = list(several)
        found |= {Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name): text for name, text in several.items()}
    return found
