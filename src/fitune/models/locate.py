"""Where a model is: a folder, or one that a hub gives.

In: what a user names. Out: the folder with config.json and the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fitune.core import catalog
from fitune.core.errors import ModelError, did_you_mean
from fitune.core.files import expand, names_near
from fitune.core.untrusted import read_json
from fitune.models import hub

CONFIG, RUN = "config.json", "config.yaml"  # the files that a model's and a run's folder have
GGUF = (
    "GGUF files are for llama.cpp: take the model as it was before its conversion, with config.json and *.safetensors"
)


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
        raise not_a_model(folder, model)
    entry = catalog.get(model)
    if entry is None and hub.parse(model) is None:
        raise ModelError(
            f"{model}: no such folder",
            expected="a model folder, a hub id such as Qwen/Qwen2.5-0.5B, or a name of the catalog",
            fix=f"{names_near(model, folders=True)}; {did_you_mean(model.lower(), catalog.entries())}",
        )
    return Path(hub.download(entry.id if entry is not None else model, only=only).folder)


def not_a_model(path: Path, name: str) -> ModelError:
    """The error for a file, or a folder without config.json: what it is instead, and what to do with it.

    Args:
        path: where it is.
        name: as the user named it.
    """
    found = f"{name}: is a file" if path.is_file() else f"{name}: no config.json"
    return ModelError(
        found, expected="a model folder in transformers format (config.json, *.safetensors)", fix=_way(path)
    )


def _way(path: Path) -> str | None:
    if path.is_file():
        if path.suffix == ".gguf":
            return GGUF
        return f"its folder: {path.parent}" if (path.parent / CONFIG).is_file() else None
    if (path / "adapter").is_dir():
        return f"this is a run: fitune merge {path} --output DIR makes a model of it; --adapter {path} goes on from it"
    if (path / RUN).is_file():
        return f"this is a run that has not ended: wait for it, or fitune train --resume --output {path}; then merge it"
    if (file := path / "adapter_config.json").is_file():
        base = read_json(file).get("base_model_name_or_path") or "ITS-BASE"
        return f"this is an adapter: --model {base} --adapter {path}"
    inside = sorted(path.glob(f"*/{CONFIG}")) or sorted(path.glob(f"snapshots/*/{CONFIG}"))
    if inside:
        return f"one of the folders in it: {', '.join(str(one.parent) for one in inside[:3])}"
    return GGUF if any(path.glob("*.gguf")) else None
