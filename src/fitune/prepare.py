"""From a config to everything that a run needs, checked: data, model, memory.

In: a RunConfig. Out: a Job. Whatever is wrong is found here, before the first step, and told together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fitune import families, formats, lengths, methods, preflight, readers, rows, templates, tokenizer
from fitune.batches import Loader
from fitune.checkpoint import sha256
from fitune.config import DataSource, RunConfig
from fitune.console import Watcher
from fitune.encode import Encoder, encode_all
from fitune.errors import Collector, ConfigError
from fitune.memory import Estimate, estimate, resident_mib
from fitune.model import Tuned, attach, check_weights, load_model, locate, pick_device, read_config, trainable
from fitune.records import Conversation, DataReport, Finding, Layout, Sample


@dataclass
class Job:
    """A run that is ready to start."""

    config: RunConfig  # resolved: no auto is left
    tuned: Tuned
    loader: Loader
    layout: Layout
    held_out: list[Sample]
    held_out_rows: list[Conversation]
    report: DataReport
    findings: list[Finding]
    memory: Estimate
    data_sha256: dict[str, str]
    total_steps: int
    eval_every: int
    save_every: int
    lr: float

    @property
    def trainable(self) -> int:
        """How many parameters are trained."""
        return sum(p.numel() for p in trainable(self.tuned.model).values())

    @property
    def total(self) -> int:
        """How many parameters there are."""
        return sum(p.numel() for p in self.tuned.model.parameters())


def resolve(config: RunConfig) -> RunConfig:
    """The config with absolute paths, so that the run folder can be used from anywhere.

    Raises:
        ConfigError, DataError, ModelError, Problems: the cheap mistakes, all of them at once.
    """
    problems = Collector()
    with problems.gather():
        methods.find(config.method)
    changes: dict[str, Any] = {"data": [], "eval_data": []}
    for name, given in (("data", config.data), ("eval_data", config.eval_data)):
        for source in given:
            with problems.gather():
                changes[name].append(_absolute(source))
    for source in [*config.sources(), *config.eval_sources()]:
        with problems.gather():
            formats.check(source.format or "auto", source.map)
    with problems.gather():
        folder = locate(config.model)
        changes["model"] = str(folder.resolve())
        families.find(read_config(folder).model_type)
        check_weights(folder)
        templates.choose(config.template, tokenizer.load(folder))
    problems.raise_any()
    changes["output"] = config.output or _free_folder(folder.name, config.method)
    return config.model_copy(update=changes)


def _absolute(source: str | DataSource) -> str | DataSource:
    """The source with its absolute path, of a data set on the hub that of its snapshot; its first row can be read."""
    path = readers.locate(source if isinstance(source, str) else source.path)
    next(readers.read_rows(path), None)
    # a link's own name is kept: it tells the kind of file, which that of its target may not
    path = path.resolve() if path.is_dir() else path.parent.resolve() / path.name
    return str(path) if isinstance(source, str) else source.model_copy(update={"path": str(path)})


def _free_folder(model: str, method: str) -> str:
    number = 1
    while (path := Path("runs") / f"{model}-{method}-{number}").exists():
        number += 1
    return str(path)


def prepare(config: RunConfig, watch: Watcher) -> Job:
    """Read and check the data, load the model, put the method on it, check that too.

    Args:
        config: as `resolve` gave it.
        watch: is told what is found.

    Raises:
        FituneError: whatever refuses the run.
    """
    folder = Path(config.model)
    model_config = read_config(folder)
    words = tokenizer.load(folder)
    report = DataReport()
    conversations = _load(config.sources(), report, config)
    encoder = Encoder(words, templates.choose(_template(config, conversations), words))
    limit = getattr(model_config, "max_position_embeddings", None) or 1 << 30
    encoder, config = _fit_length(config, encoder, conversations, limit, report)
    train_rows, held_out_rows = _split(conversations, config)
    train_rows = rows.weigh(train_rows, config.seed, report)
    samples = encode_all(train_rows, encoder, report)
    held_out = encode_all(held_out_rows, encoder, DataReport())
    report.kept += len(held_out) if not config.eval_data else 0
    checked = preflight.Prepared(config, train_rows, samples, report, encoder, model_config.vocab_size, limit)
    findings = preflight.check_data(checked)

    runtime = resident_mib()
    device = pick_device(config.device)
    base = load_model(folder, device=str(device))
    model, family, expected = attach(base, config)
    layout, leak = preflight.packing_leak(model, samples, config.layout)
    model_findings = [preflight.trainable_set(model, expected), leak]
    preflight.raise_refused(model_findings)
    findings += model_findings
    by_length = layout == "padded"
    loader = Loader(samples, config.batch_size, config.accumulation, config.seed, config.batch_tokens, by_length)
    total = config.max_steps or loader.total_steps(config.epochs)
    eval_every = config.eval_every or max(1, -(-total // 5))
    return Job(
        config=config,
        tuned=Tuned(model, words, encoder.template, encoder, family),
        loader=loader,
        layout=layout,
        held_out=held_out,
        held_out_rows=[row for row in held_out_rows if row.prompt()],  # text has no prompt to show an answer to
        report=report,
        findings=findings,
        memory=estimate(model, model_config, longest_batch=loader.largest(), runtime_mib=runtime),
        data_sha256=_fingerprint(config),
        total_steps=total,
        eval_every=eval_every,
        save_every=config.save_every or eval_every,
        lr=config.lr or methods.find(config.method).default_lr,
    )


def _load(sources: Sequence[DataSource], report: DataReport, config: RunConfig) -> list[Conversation]:
    return rows.load(sources, report, seed=config.seed, fill=config.fill, skip_bad=config.skip_bad)


def _template(config: RunConfig, conversations: Sequence[Conversation]) -> str:
    """The template's name; where nothing but plain text is trained, auto adds nothing to it."""
    only_text = all(row.format == "text" for row in conversations)
    return "plain" if config.template == "auto" and only_text else config.template


def _fingerprint(config: RunConfig) -> dict[str, str]:
    """The SHA-256 of every file that is read: a resumed run must find the same."""
    sources = [*config.sources(), *config.eval_sources()]
    return {str(file): sha256(file) for source in sources for file in readers.files(Path(source.path))}


def _fit_length(
    config: RunConfig, encoder: Encoder, conversations: Sequence[Conversation], limit: int, report: DataReport
) -> tuple[Encoder, RunConfig]:
    """The encoder with the run's max_length; lengths of the uncut rows go into the report.

    Raises:
        ConfigError: a max_length above the model's own limit.
    """
    whole = [len(s) for s in (encoder.sample(c) for c in conversations) if s is not None]
    report.lengths = lengths.summary(whole or [1])
    if config.max_length == "auto":
        report.max_length = lengths.automatic(whole or [1], limit)
    elif config.max_length > limit:
        raise ConfigError("max_length is above what the model can hold", received=config.max_length, expected=limit)
    else:
        report.max_length = config.max_length
    return encoder.with_max_length(report.max_length), config.model_copy(update={"max_length": report.max_length})


def _split(conversations: list[Conversation], config: RunConfig) -> tuple[list[Conversation], list[Conversation]]:
    """Training rows and held-out rows; the split depends on the seed alone."""
    if config.eval_data:
        return conversations, _load(config.eval_sources(), DataReport(), config)
    count = min(config.val_rows, round(config.val_share * len(conversations)))
    if config.val_share and len(conversations) > 1:
        count = max(1, count)
    order = np.random.default_rng([config.seed, 2**31]).permutation(len(conversations))
    held_out = set(order[:count].tolist())
    keep = [c for n, c in enumerate(conversations) if n not in held_out]
    return keep, [conversations[n] for n in sorted(held_out)]
