"""Tokenizer folders to tokenizers, without remote code and without a question at the terminal.

In: a folder with tokenizer files. Out: a transformers tokenizer whose special ids are known.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fitune.errors import ModelError

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def load(folder: Path) -> Any:
    """The tokenizer of a model folder.

    Raises:
        ModelError: there is none, or transformers cannot build it.
    """
    if not any((folder / name).is_file() for name in FILES):
        raise ModelError(
            f"{folder}: no tokenizer files",
            received=", ".join(sorted(p.name for p in folder.iterdir())[:12]) or "an empty folder",
            expected=" or ".join(FILES[:3]),
            fix="copy the tokenizer files of the model into its folder",
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises whatever its many readers raise
        raise ModelError(
            f"{folder}: the tokenizer cannot be read", received=" ".join(str(error).split())[:300]
        ) from error
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"{folder}: the tokenizer names no EOS token, so no answer could end",
            expected='"eos_token" in tokenizer_config.json',
        )
    return tokenizer


def encode(tokenizer: Any, text: str, *, literal: bool) -> list[int]:
    """Ids of a piece of text. In text that is not literal, special tokens are not parsed: they stay text."""
    if not text:
        return []
    if literal:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def adds_bos(tokenizer: Any) -> bool:
    """Does this tokenizer begin a text with BOS?"""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and bool(ids) and ids[0] == tokenizer.bos_token_id


def single_id(tokenizer: Any, token: str) -> int | None:
    """The id of a token that the vocabulary holds as one piece, or None."""
    found = tokenizer.convert_tokens_to_ids(token)
    if found is None or (found == tokenizer.unk_token_id and token != tokenizer.unk_token):
        return None
    return int(found)
