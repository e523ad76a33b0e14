"""A run folder, or a model folder, to a model that answers.

In: a path. Out: Tuned, with the run's own template and stop tokens.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from torch import nn
from transformers import PreTrainedTokenizerBase

from fitune.core import locks
from fitune.core.config import RunConfig
from fitune.core.errors import ConfigError, RunFolderError
from fitune.core.options import QuantOptions
from fitune.data import sums, templates, tokenizer
from fitune.data.encode import Encoder
from fitune.data.templates import Template
from fitune.engine import integrity
from fitune.engine.checkpoint import RunFolder
from fitune.models import families, kernel_faults, weights
from fitune.models import quant as quants
from fitune.models.devices import pick_device
from fitune.models.families import Family
from fitune.models.handover import TEMPLATE, read_answer_tokens
from fitune.models.interfaces import causal_lm
from fitune.models.load import Tuned, load_model
from fitune.models.locate import locate
from fitune.models.precision import choose

WEIGHTS, CONFIG = "the base's weights", "the base's config.json"  # keys of data.json, whose values are digests
Digests = Mapping[str, object]  # of files, by their names


class _Where(TypedDict):
    """How a model is loaded, whatever it is."""

    device: str
    plain: bool


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
        model: where the base model of a run is now, if it was moved; the weights must be the same.
        device: where it computes.
        template: for a model folder only; a run brings its own.
        precision: of the computation: fp32, bf16, fp16, or auto, what the device computes fast. Default: the run's own;
            of a model folder fp32.
        quant: how the base model's linear layers are quantized. Default: as in the run; of a model folder not at all.
        plain: replace quantized layers by plain ones with the same values.

    Raises:
        ModelError, RunFolderError: it cannot be used.
    """
    run = RunFolder(path)
    where = pick_device(device)
    precision = choose(where)[0] if precision == "auto" else precision
    how: _Where = {"device": str(where), "plain": plain}
    if not (run.path / "config.yaml").is_file():
        if model is not None:
            raise ConfigError(
                f"--model is for a run whose base model was moved, and {path} is no run folder",
                received=str(model),
                fix="leave --model out",
            )
        locks.check(run.path)  # of a run that begins there is nothing yet but its lock
        return _of_folder(locate(str(path)), template, precision or "fp32", quant or "none", how)
    config = finished(run)
    base = base_of(run, config, model)
    vocabulary = tokenizer.load(run.tokenizer)
    chat_template = templates.from_dict(run.read("template"), vocabulary)
    loaded = load_model(
        base,
        precision=precision or config.precision,
        adapter=run.adapter,
        storage=config.storage_dtype if precision is None else "auto",
        quant=config.quant if quant is None else quant,
        **how,
    )
    kernel_faults.notice(quants.faults(causal_lm(loaded)))
    encoder = Encoder(vocabulary, chat_template, answer_tokens=config.answer_tokens)
    return Tuned(loaded, vocabulary, chat_template, encoder, _family(loaded))


def _of_folder(folder: Path, template: str, precision: str, quant: str | QuantOptions, how: _Where) -> Tuned:
    """A model that is no run; see `load`."""
    integrity.check_adapter(folder)
    vocabulary = tokenizer.load(folder)
    chat_template = template_of(folder, template, vocabulary)
    model = load_model(folder, precision=precision, quant=quant, **how)
    kernel_faults.notice(quants.faults(model))
    answer_tokens = read_answer_tokens(folder) if template == "auto" else ()
    encoder = Encoder(vocabulary, chat_template, answer_tokens=answer_tokens)
    return Tuned(model, vocabulary, chat_template, encoder, _family(model))


def finished(run: RunFolder, reads: Sequence[str] = integrity.MODEL, missing: Sequence[str] = ()) -> RunConfig:
    """The settings of a finished run whose files were not changed since it ended.

    Args:
        run: the run.
        reads: the files and folders of it that the command reads.
        missing: those of them that need not be there.

    Raises:
        RunFolderError: it is none, it is not finished, or one of these files was changed.
    """
    if not run.path.is_dir():
        raise RunFolderError(f"{run.path}: no such folder", expected="a finished run's folder (--output of train)")
    warned = integrity.check(run, reads, missing=missing)
    if warned is not None:
        kernel_faults.warn_once(f"warning: {warned.text}; {warned.fix}")
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
        model: where the base model is now; None: where the run found it.

    Raises:
        ModelError: it is not there.
        RunFolderError: that folder has another model.
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
    there: dict[str, Callable[[], Digests]] = {
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
                fix="restore it, or say where the folder that the run was trained on is now: --model FOLDER",
            )
    return config.model if model is None else str(folder.resolve())


def config_of(folder: Path) -> Digests:
    """The SHA-256 of a base model's config.json, as data.json keeps it."""
    return {"config.json": sums.summed(folder / "config.json")}


def _fresh(name: str, folder: Path, found: Callable[[], Digests]) -> Digests:
    """The same digests, made anew from the files: those in the cache may be damaged."""
    return weights.summed(folder, fresh=True) if name == integrity.TENSORS else found()


def _digests(other: Digests, mine: Digests) -> str:
    """The files that differ, with their digests."""
    texts = [f"{name} {_digest(value)}" for name, value in sorted(mine.items()) if other.get(name) != value]
    return f"{', '.join(texts[:3])}{f' and {len(texts) - 3} more' if len(texts) > 3 else ''}" or "none of these files"


def _digest(value: object) -> str:
    """The start of a digest: of weights (length in bytes, SHA-256 of the header), else the SHA-256 of the file."""
    if isinstance(value, list):
        return f"{value[0]:,} bytes, header {value[1][:16]}"
    sums: Mapping[str, str] = value if isinstance(value, dict) else {}
    return f"SHA-256 {sums.get('sha256', sums.get('sha256_tree', ''))[:16]}"


def template_of(folder: Path, name: str, vocabulary: PreTrainedTokenizerBase) -> Template:
    """The template of a model folder: a merged one brings its own."""
    if name == "auto" and (folder / TEMPLATE).is_file():
        return templates.from_dict(tokenizer.read_json(folder / TEMPLATE), vocabulary)
    return templates.choose(name, vocabulary)


def _family(model: nn.Module) -> Family:
    return families.of(causal_lm(model))
