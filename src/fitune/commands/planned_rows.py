"""The rows of a request: their lengths, by a tokenizer or estimated, and what a run with them asks of memory.

In: a checked request, and a tokenizer folder where there is one. Out: Rows; and the Work that a plan goes over. A run
reads its rows here too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fitune.checks import datachecks
from fitune.commands.request import Request
from fitune.core.config import RunConfig
from fitune.core.errors import ConfigError, DataError
from fitune.core.events import Watcher
from fitune.core.files import expand
from fitune.core.letters import FULL_WIDTH
from fitune.core.records import Conversation, DataReport, Layout, LengthChoice, Message, Sample, Units
from fitune.data import pipeline, rows, tokenizer
from fitune.data.batches import Loader
from fitune.data.cache import Cache
from fitune.data.lengths import automatic, choices, summary
from fitune.data.pairs import Pairs
from fitune.data.store import in_pairs
from fitune.data.tokenizer.new_tokens import NewToken, add_tokens
from fitune.memory import frozen, steps
from fitune.memory import plan as plans

ASSUMED_LENGTH = 1024  # of a row, where neither data nor max_length say anything
ESTIMATED = 20_000  # rows whose lengths are estimated; more are alike
# Characters for a token, measured with five tokenizers on Chinese and English instructions
WIDE, NARROW, LATIN = 1.4, 0.5, 4.2
BIG_VOCABULARY = 60_000  # from here on Chinese words are tokens of their own
EXTRA = 12  # tokens of a template for each message
FULL_WIDTH_LETTER = re.compile(f"[{FULL_WIDTH}]")


@dataclass(frozen=True)
class Rows:
    """What is known of the data.

    samples, held_out: rows to train on and to evaluate with; where there is no tokenizer they have lengths alone.
    max_length: tokens of the longest row. note: how that is known, where it must be said. report: of the data, where it
    was read. tokenizer: its folder, where there is one; added: tokens that it got. lengths: of the uncut rows, as
    `lengths.summary` gives them; choices: what each length would cut.
    """

    samples: Units
    held_out: Units
    max_length: int
    note: str = ""
    report: DataReport | None = None
    tokenizer: Path | None = None
    added: Sequence[NewToken] = ()
    lengths: Mapping[str, float] = field(default_factory=dict)
    choices: Sequence[LengthChoice] = ()


@dataclass(frozen=True)
class ReadRows:
    """Rows that were read with a tokenizer, with all that the pipeline found, and the tokenizer itself."""

    rows: Rows
    data: pipeline.Data
    tokenizer: Any


def read(request: Request, folder: Path, watch: Watcher, *, to_train: bool) -> ReadRows:
    """Read, tokenize and check the data of a request.

    Args:
        request: as it was checked.
        folder: of the tokenizer.
        watch: progress is reported to it.
        to_train: every token must be one that the model has; a plan may be made with another model's tokenizer.

    Raises:
        DataError: the data cannot be used.
    """
    config, size = request.config, int(request.model_config.vocab_size)
    loaded = tokenizer.load(folder)
    added = add_tokens(loaded, config.new_tokens, config.answer_tokens) if config.new_tokens else []
    vocabulary = max([size, *(token.id + 1 for token in added)]) if to_train else max(size, len(loaded))
    data = datachecks.read(config, folder, loaded, limit=request.longest_row, vocabulary=vocabulary, watch=watch)
    report = data.report
    found = Rows(
        in_pairs(data.samples, config.wanted),
        in_pairs(data.held_out, config.wanted),
        report.max_length,
        report=report,
        tokenizer=folder,
        added=added,
        lengths=report.lengths,
        choices=report.length_choices,
    )
    return ReadRows(found, data, loaded)


def rows_of(request: Request, tokenizer_folder: str | Path | None, watch: Watcher) -> Rows:
    """The rows for a plan: with lengths by the tokenizer, by their characters, or as long as max_length without data.

    Args:
        request: as it was checked.
        tokenizer_folder: a tokenizer folder, for a model that is not here; None: the model's own, where it has one.
        watch: progress is reported to it.

    Raises:
        FituneError: no row fits the model, or none is left to train on.
    """
    config, limit = request.config, request.longest_row
    _check_length(config, limit)
    folder = expand(tokenizer_folder) if tokenizer_folder is not None else request.folder
    if tokenizer_folder is None and (not request.has_data or folder is None or not _has_tokenizer(folder)):
        return _without_tokenizer(request)
    assert folder is not None
    if not request.has_data:
        loaded = tokenizer.load(folder)
        added = add_tokens(loaded, config.new_tokens, config.answer_tokens) if config.new_tokens else []
        return replace(_no_data(config, limit), tokenizer=folder, added=added)
    found = read(request, folder, watch, to_train=False).rows
    if not len(found.samples):
        raise DataError("no row is left to train on", fix="`fitune inspect` reports what became of each row")
    return found


def _check_length(config: RunConfig, limit: int) -> None:
    """Raises ConfigError where no row can be of the longest length."""
    if limit < 2:
        left = f"room for {max(0, limit)} tokens"
        raise ConfigError("virtual tokens leave no room for a row", received=left, expected="room for 2 or more")
    if config.max_length != "auto" and config.max_length > limit:
        raise ConfigError("max_length is above what the model can hold", received=config.max_length, expected=limit)


def _without_tokenizer(request: Request) -> Rows:
    """Rows where only their characters are known, or nothing; new tokens come behind the vocabulary."""
    config, size, limit = request.config, request.model_config.vocab_size, request.longest_row
    added = [NewToken(text, size + n, (0,)) for n, text in enumerate(config.new_tokens)]
    known = _estimated(config, size, limit) if request.has_data else _no_data(config, limit)
    return replace(known, added=added)


def _no_data(config: RunConfig, limit: int) -> Rows:
    length = min(limit, ASSUMED_LENGTH if config.max_length == "auto" else config.max_length)
    each = 1 if config.wanted == "answers" else 2  # samples of a row
    rows_ = [_blank(length)] * (2 * each * config.batch_size * config.accumulation)
    held_out = in_pairs(rows_[: each * config.batch_size], config.wanted)
    return Rows(in_pairs(rows_, config.wanted), held_out, length, f"no data given: every row has {length:,} tokens")


def _has_tokenizer(folder: Path) -> bool:
    return any(folder.glob("tokenizer*")) or any(folder.glob("*.model")) or (folder / "vocab.json").is_file()


def _estimated(config: RunConfig, vocabulary: int, limit: int) -> Rows:
    """Rows of about the lengths that a tokenizer would give them."""
    sources, cache = config.sources(), Cache()
    found = rows.load(
        sources, seed=config.seed, fill=config.fill, skip_bad=config.skip_bad, cache=cache, wanted=config.wanted
    ).rows
    every, each = max(1, len(found) // ESTIMATED), 1 if config.wanted == "answers" else 2
    sides = (side for row in islice(found, 0, None, every) for side in (row, row.other())[:each])
    guessed = np.array([_tokens(row, vocabulary) for row in sides])
    auto = automatic(guessed, guessed, limit, batch_size=config.batch_size, batch_tokens=config.batch_tokens)
    longest = auto if config.max_length == "auto" else min(limit, config.max_length)
    samples = [_blank(int(length)) for length in np.minimum(guessed, longest)]
    count = len(samples) // each
    share = max(1, min(config.val_rows, round(config.val_share * count)))
    share = share if config.val_share or config.eval_data else 0
    note = (
        f"no tokenizer at hand (--tokenizer FOLDER): lengths of {count:,} rows are estimated from their "
        "characters, which may be a third off"
    )
    cut = choices(guessed, guessed, guessed, chosen=longest, auto=auto)
    units, held_out = (in_pairs(some, config.wanted) for some in (samples, samples[: each * share]))
    return Rows(units, held_out, longest, note, lengths=summary(guessed), choices=cut)


def _tokens(row: Conversation, vocabulary: int) -> int:
    text = "".join(part for message in row.messages for part in _texts(message))
    text += json.dumps([dict(tool) for tool in row.tools], ensure_ascii=False) if row.tools else ""
    wide = len(FULL_WIDTH_LETTER.findall(text))
    each = WIDE if vocabulary >= BIG_VOCABULARY else NARROW
    return max(2, round(wide / each + (len(text) - wide) / LATIN) + EXTRA * len(row.messages))


def _texts(message: Message) -> list[str]:
    called = [call.name + call.arguments for call in message.tool_calls]
    return [message.content, message.context, *called]


def _blank(length: int) -> Sample:
    """A row of that length, of which every token but the first is trained."""
    return Sample((np.arange(length) % 8).astype(np.int32), np.arange(length) > 0)


# ---- work ----


def make_loader(config: RunConfig, samples: Units, layout: Layout) -> Loader:
    """The order of the rows and their micro-batches."""
    by_length = layout == "padded"
    return Loader(
        laid_out(samples, layout), config.batch_size, config.accumulation, config.seed, config.batch_tokens, by_length
    )


def laid_out(units: Units, layout: Layout) -> Units:
    """Rows as a layout takes them: the prompt of both answers of a pair stands once in a flat batch alone."""
    return units.apart() if isinstance(units, Pairs) and layout != "flat" else units


def work_of(request: Request, known: Rows, layout: Layout | None = None) -> plans.Work:
    """What a run with these rows asks of memory.

    Args:
        request: as it was checked.
        known: its rows.
        layout: of its batches; None: that which the model will most likely take.
    """
    config = _with_tokenizer(request.config.model_copy(update={"max_length": known.max_length}), known.tokenizer)
    layout = layout or steps.likely_layout(config.layout, request.model_config)
    samples, held_out = (
        units.supposed() if isinstance(units, Pairs) else units for units in (known.samples, known.held_out)
    )
    loader = make_loader(config, samples, layout)
    total = config.max_steps or loader.total_steps(config.epochs)
    deciding = steps.deciding(loader, total, request.processes)
    largest = steps.largest_held_out(laid_out(held_out, layout), config.batch_size)
    epochs = frozen.epochs(config, request.where, loader, total) if known.report is not None else None
    return plans.Work(
        config, request.model_config, deciding, largest, layout, known.added, epochs=epochs, processes=request.processes
    )


def _with_tokenizer(config: RunConfig, tokenizer_folder: Path | None) -> RunConfig:
    """A prompt given as text begins as its tokens; without a tokenizer as others, of which there are as many."""
    if tokenizer_folder is not None and config.method == "prompt" and config.prompt.init == "text":
        return config.model_copy(update={"model": str(tokenizer_folder)})
    return plans.without_prompt_text(config)
