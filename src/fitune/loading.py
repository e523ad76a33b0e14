"""A run folder, or a model folder, to something that can be talked to.

In: a path. Out: Tuned, with the run's own template and stop tokens.
"""

from __future__ import annotations

from pathlib import Path

from fitune import families, templates, tokenizer
from fitune.checkpoint import RunFolder
from fitune.encode import Encoder
from fitune.errors import RunFolderError
from fitune.families import Family
from fitune.model import Tuned, load_model, locate, pick_device


def load(path: str | Path, *, device: str = "auto", template: str = "auto") -> Tuned:
    """The model of a run folder with what the run trained; or a plain model folder.

    Args:
        path: a run folder, a model folder, or a hub id.
        device: where it computes.
        template: for a model folder only; a run brings its own.

    Raises:
        ModelError, RunFolderError: it cannot be used.
    """
    run = RunFolder(path)
    where = str(pick_device(device))
    if not (run.path / "config.yaml").is_file():
        folder = locate(str(path))
        words = tokenizer.load(folder)
        shape = templates.choose(template, words)
        model = load_model(folder, device=where)
        return Tuned(model, words, shape, Encoder(words, shape), _family(model))
    config = run.read_config()
    if not run.adapter.is_dir():
        raise RunFolderError(f"{run.path}: this run is not finished", fix=f"fitune train --resume --output {run.path}")
    words = tokenizer.load(run.tokenizer)
    shape = templates.from_dict(run.read("template"), words)
    model = load_model(config.model, adapter=run.adapter, device=where)
    return Tuned(model, words, shape, Encoder(words, shape), _family(model))


def _family(model: object) -> Family:
    return families.find(model.config.model_type)  # type: ignore[attr-defined]
