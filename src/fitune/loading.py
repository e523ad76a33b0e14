"""A run folder, or a model folder, to something that can be talked to.

In: a path. Out: Tuned, with the run's own template and stop tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fitune import families, templates, tokenizer
from fitune import quant as quants
from fitune.checkpoint import RunFolder
from fitune.config import QuantOptions
from fitune.encode import Encoder
from fitune.errors import RunFolderError
from fitune.families import Family
from fitune.model import Tuned, causal_lm, load_model, locate, pick_device
from fitune.precision import choose
from fitune.templates import Template

TEMPLATE = "fitune_template.json"  # the template that a merged model was trained with


def load(
    path: str | Path,
    *,
    device: str = "auto",
    template: str = "auto",
    precision: str | None = None,
    quant: str | QuantOptions | None = None,
    plain: bool = False,
) -> Tuned:
    """The model of a run folder with what the run trained; or a plain model folder.

    Args:
        path: a run folder, a model folder, or a hub id.
        device: where it computes.
        template: for a model folder only; a run brings its own.
        precision: of the computation: fp32, bf16, fp16, or auto, what the device computes fast. Default: the run's own;
            of a model folder fp32.
        quant: how the base's linear layers are quantized. Default: as in the run; of a model folder not at all.
        plain: make quantized layers plain again, with the values that they stand for.

    Raises:
        ModelError, RunFolderError: it cannot be used.
    """
    run = RunFolder(path)
    where = pick_device(device)
    precision = choose(where)[0] if precision == "auto" else precision
    how: dict[str, Any] = {"device": str(where), "plain": plain}
    if not (run.path / "config.yaml").is_file():
        folder = locate(str(path))
        words = tokenizer.load(folder)
        shape = _template(folder, template, words)
        model = load_model(folder, precision=precision or "fp32", quant=quant or "none", **how)
        quants.trust.notice(quants.faults(model))
        return Tuned(model, words, shape, Encoder(words, shape), _family(model))
    config = run.read_config()
    if not run.adapter.is_dir():
        raise RunFolderError(f"{run.path}: this run is not finished", fix=f"fitune train --resume --output {run.path}")
    words = tokenizer.load(run.tokenizer)
    shape = templates.from_dict(run.read("template"), words)
    model = load_model(
        config.model,
        precision=precision or config.precision,
        adapter=run.adapter,
        storage=config.storage_dtype if precision is None else "auto",
        quant=config.quant if quant is None else quant,
        **how,
    )
    quants.trust.notice(quants.faults(causal_lm(model)))
    return Tuned(model, words, shape, Encoder(words, shape), _family(model))


def _template(folder: Path, name: str, words: Any) -> Template:
    """The template of a model folder: a merged one brings its own."""
    if name == "auto" and (folder / TEMPLATE).is_file():
        return templates.from_dict(tokenizer.read_json(folder / TEMPLATE), words)
    return templates.choose(name, words)


def _family(model: object) -> Family:
    return families.of(causal_lm(model))
