"""Where a model is: a folder, or one that a hub gives.

In: what a user names. Out: the folder with config.json and the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fitune.core import catalog
from fitune.core.errors import ModelError, did_you_mean
from fitune.core.files import expand, names_near
from fitune.models import hub


def locate(model: str, only: Sequence[str] = ()) -> Path:
    """The folder of a model: a local one, or one fetched from a hub by its id, or by its name in the catalog.

    Args:
        model: a folder, `org/name`, `ms:org/name`, or a name such as llama-3.2-1b.
        only: of a hub's model these files alone.

    Raises:
        ModelError: neither is there.
    """
    folder = expand(model)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ModelError(f"{model}: is a file", expected="a model folder with config.json and *.safetensors")
    entry = catalog.get(model)
    if entry is None and hub.parse(model) is None:
        raise ModelError(
            f"{model}: no such folder",
            expected="a model folder, a hub id such as Qwen/Qwen2.5-0.5B, or a name of the catalog",
            fix=f"{names_near(model, folders=True)}; {did_you_mean(model.lower(), catalog.entries())}",
        )
    return Path(hub.download(entry.id if entry is not None else model, only=only).folder)
