"""The files of an adapter folder: their names, and their settings read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fitune.core.config import RunConfig, settings_only
from fitune.core.errors import ConfigError, ModelError, Problems, shorten
from fitune.core.files import expand
from fitune.core.untrusted import read_json

PEFT_CONFIG, OWN_CONFIG = "adapter_config.json", "fitune_adapter.json"
WEIGHTS, ENCODER = "adapter_model.safetensors", "encoder.safetensors"
NEW_ROWS, NEW_IDS = "new_tokens.safetensors", "new_tokens.json"


def locate(path: str) -> Path:
    """The adapter folder that a path means: itself, or that of a run.

    Raises:
        ModelError: there is none.
    """
    folder = expand(path)
    for place in (folder, folder / "adapter"):
        if (place / WEIGHTS).is_file():
            return place
    raise ModelError(f"{path}: no adapter here", expected=f"a run folder, or a folder with {WEIGHTS}")


def read_own(folder: Path) -> RunConfig:
    """The settings that attach what a folder of ours holds.

    Raises:
        ModelError: the file is broken.
    """
    path = folder / OWN_CONFIG
    try:
        return settings_only(read_json(path), model=str(folder))
    except (FileNotFoundError, ConfigError, Problems) as error:
        raise ModelError(f"{path}: broken", received=" ".join(str(error).split())[:200]) from None


def read_new_ids(folder: Path) -> list[int]:
    """The ids of new tokens that an adapter folder has rows for.

    Raises:
        ModelError: the file holds something else.
    """
    path = folder / NEW_IDS
    ids: list[int] = read_json(path, kind=list)
    if not all(type(one) is int and 0 <= one < 2**31 for one in ids):
        raise ModelError(f"{path}: not a list of ids", received=shorten(ids), expected="[32000, 32001]")
    return ids


def read_settings(path: Path) -> dict[str, Any]:
    """The settings beside an adapter; none where there is no such file."""
    try:
        values: dict[str, Any] = read_json(path)
    except FileNotFoundError:
        return {}
    return values
