"""Models from the Hugging Face hub, or from ModelScope.

In: an id (`org/name`, `ms:org/name`; `@revision` behind it pins one). Out: a folder in a cache, complete, of one
revision. Free space is checked first, a transfer that breaks off is continued, and sizes are checked against the hub's
list. The settings are in huggingface.py and modelscope.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from fitune.core.errors import ModelError
from fitune.models.hub import huggingface, modelscope
from fitune.models.hub.files import Downloaded, OnBytes

__all__ = ["Downloaded", "check", "download", "parse", "revision_of"]


def parse(name: str) -> tuple[str, str, str | None] | None:
    """(hub, id, revision) of a hub id; None: it is not one. The hub is hf or ms."""
    found = re.fullmatch(r"(ms:)?([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", name)
    if found is None or name.startswith((".", "~", "/")):
        return None
    return ("ms" if found[1] else "hf"), found[2], found[3]


def revision_of(folder: Path) -> str | None:
    """The revision that a folder of a cache holds; None: it is not in a cache."""
    parts = folder.parts
    return parts[-1] if len(parts) > 1 and parts[-2] == "snapshots" else None


def download(name: str, *, only: Sequence[str] = (), on_bytes: OnBytes | None = None) -> Downloaded:
    """Download a model, or what is missing of it.

    Args:
        name: an id.
        only: files to download; none: all that a model needs, of weights in two formats the safetensors.
        on_bytes: called with a file, the bytes that are there, and its total.

    Raises:
        ModelError: no such id, no access, no network, no space, or a file that is not the one that the hub lists.
    """
    parsed = parse(name)
    if parsed is None:
        raise ModelError(f"{name}: not a hub id", expected="org/name, or ms:org/name for ModelScope")
    hub, identity, revision = parsed
    if hub == "ms":
        return modelscope.download(identity, revision or "master", only, on_bytes)
    return huggingface.download(identity, revision, only)


def check(name: str) -> None:
    """Raises ModelError where a hub has no model of that id, or it cannot be reached and is not in the cache.

    ModelScope's files are listed when they are downloaded, so its ids are not checked here.
    """
    parsed = parse(name)
    if parsed is not None and parsed[0] == "hf":
        huggingface.check(*parsed[1:])
