"""From the settings to samples: data read, split, encoded, cut and checked.

In: a RunConfig, a tokenizer, what the model can hold. Out: Data. No model is loaded, so `inspect` works with a
tokenizer folder alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fitune import lengths, preflight, rows, templates
from fitune.config import RunConfig
from fitune.encode import Encoder, encode_all
from fitune.errors import ConfigError
from fitune.records import Conversation, DataReport, Finding, Sample


@dataclass
class Data:
    """What a run trains on, and what the rules found."""

    conversations: list[Conversation]  # training rows
    samples: list[Sample]
    whole_lengths: list[int]  # of the samples before anything was cut
    held_out: list[Sample]
    held_out_rows: list[Conversation]  # those that can be asked, for the answers before and after
    encoder: Encoder  # with the run's max_length
    report: DataReport
    findings: list[Finding]


def read(config: RunConfig, folder: Path, words: Any, *, limit: int, vocabulary: int) -> Data:
    """Read and check the data.

    Args:
        config: the settings.
        folder: where the tokenizer's files are.
        words: the tokenizer.
        limit: longest row, in tokens, that the model can hold.
        vocabulary: rows of the model's embedding.

    Raises:
        FituneError: data that cannot be used. What the rules refuse is only found, not raised.
    """
    report = DataReport()
    conversations = _load(config, report)
    shape = templates.choose(_template(config, conversations), words)
    encoder = Encoder(words, shape, train_on=config.train_on)
    train_rows, held_out_rows = _split(conversations, config, report)
    report.held_out = len(held_out_rows)
    train_rows = rows.weigh(train_rows, config.seed, report)
    whole = [encoder.samples(row) for row in train_rows]
    encoder = encoder.with_max_length(_length(config, whole, limit, report))
    samples = encode_all(train_rows, encoder, report, policy=config.length_policy, whole=whole)
    held_out = encode_all(held_out_rows, encoder, DataReport())
    prepared = preflight.Prepared(config, train_rows, samples, report, encoder, vocabulary, limit, folder)
    findings = preflight.check_data(prepared)
    asked = [row for row in held_out_rows if _can_be_asked(row, encoder)]
    lengths_before = [len(sample) for made in whole for sample in made]
    return Data(train_rows, samples, lengths_before, held_out, asked, encoder, report, findings)


def _can_be_asked(row: Conversation, encoder: Encoder) -> bool:
    """Has the row a prompt (text has none), and is that short enough to be answered?"""
    return bool(row.prompt()) and len(encoder.prompt(row.prompt(), row.tools)) < (encoder.max_length or 0)


def _load(config: RunConfig, report: DataReport) -> list[Conversation]:
    return rows.load(config.sources(), report, seed=config.seed, fill=config.fill, skip_bad=config.skip_bad)


def _length(config: RunConfig, whole: list[list[Sample]], limit: int, report: DataReport) -> int:
    """The run's max_length; what it and others would cut goes into the report.

    Raises:
        ConfigError: a max_length above the model's own limit.
    """
    if config.max_length != "auto" and config.max_length > limit:
        raise ConfigError("max_length is above what the model can hold", received=config.max_length, expected=limit)
    all_lengths = [len(sample) for made in whole for sample in made] or [1]
    needed = [sample.needed for made in whole for sample in made] or [1]
    auto = lengths.automatic(all_lengths, needed, limit)
    report.max_length = auto if config.max_length == "auto" else config.max_length
    report.lengths = lengths.summary(all_lengths)
    report.length_choices = lengths.choices(all_lengths, needed, limit, report.max_length)
    return report.max_length


def _split(
    conversations: list[Conversation], config: RunConfig, report: DataReport
) -> tuple[list[Conversation], list[Conversation]]:
    """Training rows and held-out rows; the split depends on the seed alone."""
    if config.eval_data:
        given = config.model_copy(update={"data": config.eval_data, "take": [], "weight": []})
        held_out_report = DataReport()
        held_out = _load(given, held_out_report)
        report.skipped_bad += held_out_report.skipped_bad  # the counts are of training rows, but what is bad is told
        report.skipped = [*report.skipped, *held_out_report.skipped][: rows.MOST_PROBLEMS]
        return conversations, held_out
    count = min(config.val_rows, round(config.val_share * len(conversations)))
    if config.val_share and len(conversations) > 1:
        count = max(1, count)
    order = np.random.default_rng([config.seed, 2**31]).permutation(len(conversations))
    chosen = set(order[:count].tolist())
    keep = [c for n, c in enumerate(conversations) if n not in chosen]
    return keep, [replace(conversations[n], weight=1.0) for n in sorted(chosen)]


def _template(config: RunConfig, conversations: list[Conversation]) -> str:
    """The template's name; where nothing but plain text is trained, auto adds nothing to it."""
    only_text = all(row.format == "text" for row in conversations)
    return "plain" if config.template == "auto" and only_text else config.template
