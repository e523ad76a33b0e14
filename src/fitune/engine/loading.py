"""A run folder, or a model folder, to something that can be talked to.

In: a path. Out: Tuned, with the run's own template and stop tokens.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fitune.core import locks
from fitune.core.config import RunConfig
from fitune.core.errors import ConfigError, RunFolderError
from fitune.core.options import QuantOptions
from fitune.data import sums, templates, tokenizer
from fitune.data.encode import Encoder
from fitune.data.templates import Template
from fitune.engine import integrity
from fitune.engine.checkpoint import RunFolder
from fitune.models import families, weights
from fitune.models import quant as quants
from fitune.models.families import Family
from fitune.models.handover import TEMPLATE, read_answer_tokens
from fitune.models.model import Tuned, causal_lm, load_model, locate, pick_device
from fitune.models.precision import choose

WEIGHTS, CONFIG = "the base's weights", "the base's config.json"  # what a run folder keeps digests of


def load(
    path: str | Path,
    *,
    model: str | Path | None = None,
    device: str = "auto",
    template: str = "auto",
    precision: str | None = None,
    quant: str | QuantOptions | None = None,
    plain: bool = False,
) -> Tuned:
    """The model of a run folder with what the run trained; or a plain model folder.

    Args:
        path: a run folder, a model folder, or a hub id.
        model: where the base of a run lies now, if it was moved; the weights must be the same.
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
        if model is not None:
            raise ConfigError(
                f"--model is for a run whose base was moved, and {path} is no run",
                received=str(model),
                fix="leave --model out",
            )
        folder = locate(str(path))
        integrity.check_adapter(folder)
        words = tokenizer.load(folder)
        shape = _template(folder, template, words)
        plain_model = load_model(folder, precision=precision or "fp32", quant=quant or "none", **how)
        quants.trust.notice(quants.faults(plain_model))
        encoder = Encoder(words, shape, answer_tokens=read_answer_tokens(folder) if template == "auto" else ())
        return Tuned(plain_model, words, shape, encoder, _family(plain_model))
    config = finished(run)
    base = base_of(run, config, model)
    words = tokenizer.load(run.tokenizer)
    shape = templates.from_dict(run.read("template"), words)
    loaded = load_model(
        base,
        precision=precision or config.precision,
        adapter=run.adapter,
        storage=config.storage_dtype if precision is None else "auto",
        quant=config.quant if quant is None else quant,
        **how,
    )
    quants.trust.notice(quants.faults(causal_lm(loaded)))
    encoder = Encoder(words, shape, answer_tokens=config.answer_tokens)
    return Tuned(loaded, words, shape, encoder, _family(loaded))


def finished(run: RunFolder, reads: Sequence[str] = integrity.MODEL, missing: Sequence[str] = ()) -> RunConfig:
    """The settings of a finished run, of which all that a verb reads is as the run left it.

    Args:
        run: the run.
        reads: files and folders of it.
        missing: those of them that need not be there.

    Raises:
        RunFolderError: it is not finished, or something in it is otherwise.
    """
    warned = integrity.check(run, reads, missing=missing)
    if warned is not None:
        quants.trust.warn_once(f"warning: {warned.text}; {warned.fix}")
    done = run.adapter.is_dir() if warned is not None else integrity.was_finished(run)
    if not done:
        working = locks.holder(run.path)
        raise RunFolderError(
            f"{run.path}: this run {'still goes on' if working else 'is not finished'}",
            received=working,
            fix="wait until it has ended"
            if working
            else f"fitune train --resume --output {shlex.quote(str(run.path))}",
        )
    return run.read_config()


def base_of(run: RunFolder, config: RunConfig, model: str | Path | None = None) -> str:
    """The folder of a run's base model, or the one it was moved to.

    Args:
        run: the run.
        config: the run's.
        model: where the base lies now; None: where the run found it.

    Raises:
        ModelError: it is not there.
        RunFolderError: what lies there is another model.
    """
    if model is None and not Path(config.model).is_dir():
        raise RunFolderError(
            f"{config.model}: no such folder, and it is the base model of the run {run.path}",
            expected="the folder that the run was trained on",
            fix="restore it; --model NEW says where it is now",
        )
    folder = Path(config.model) if model is None else locate(str(model))
    weights.check(folder)
    known = run.read("data").get("inputs", {}) if run.has("data") else {}
    there: dict[str, Callable[[], dict[str, Any]]] = {
        WEIGHTS: lambda: weights.facts(folder),
        CONFIG: lambda: config_of(folder),
        integrity.TENSORS: lambda: weights.summed(folder),
    }
    for name, found in there.items():
        if name in known and known[name] != found() and known[name] != (mine := _fresh(name, folder, found)):
            changed = f"{name} changed since the run {run.path} began"
            raise RunFolderError(
                f"{folder}: {changed if model is None else f'not the base model of the run {run.path}'}",
                received=_digests(known[name], mine),
                expected=_digests(mine, known[name]),
                fix="restore it, or give the folder that the run was trained on, wherever it lies now: --model FOLDER",
            )
    return config.model if model is None else str(folder.resolve())


def config_of(folder: Path) -> dict[str, Any]:
    """The sum of a base's config.json, as data.json keeps it."""
    return {"config.json": sums.summed(folder / "config.json")}


def _fresh(name: str, folder: Path, found: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The same, from the files themselves: a sum that was kept may be damaged."""
    return weights.summed(folder, fresh=True) if name == integrity.TENSORS else found()


def _digests(other: dict[str, Any], mine: dict[str, Any]) -> str:
    """The files that differ, with their digests."""
    told = {name: value for name, value in mine.items() if other.get(name) != value}
    texts = [
        f"{name} {value[0]:,} bytes, header {value[1][:16]}"
        if isinstance(value, list)
        else f"{name} SHA-256 {value.get('sha256', value.get('sha256_tree', ''))[:16]}"
        for name, value in sorted(told.items())
    ]
    return f"{', '.join(texts[:3])}{f' and {len(texts) - 3} more' if len(texts) > 3 else ''}" or "none of these files"


def _template(folder: Path, name: str, words: Any) -> Template:
    """The template of a model folder: a merged one brings its own."""
    if name == "auto" and (folder / TEMPLATE).is_file():
        return templates.from_dict(tokenizer.read_json(folder / TEMPLATE), words)
    return templates.choose(name, words)


def _family(model: object) -> Family:
    return families.of(causal_lm(model))
