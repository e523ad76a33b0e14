"""What will be trained, seen before it is: rows, lengths, labels, tokens.

In: conversations and their samples, a tokenizer. Out: an Inspection, which prints, is JSON, and is a page.
"""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fitune.checks import datachecks
from fitune.core import letters
from fitune.core.config import RunConfig
from fitune.core.events import Silent, Ticker, Watcher
from fitune.core.records import Conversation, DataReport, Finding, LengthChoice, Sample
from fitune.data import tokenizer as tokenizer_folders
from fitune.data.fitting import NO_LIMIT
from fitune.data.tokenizer.interface import Tokenizer
from fitune.data.tokenizer.new_tokens import add_tokens
from fitune.models.locate import locate
from fitune.views import cells
from fitune.views.charts import NARROW, WIDE, Bar, bar_chart
from fitune.views.pages import render
from fitune.views.terminal import LENGTHS, findings_table, length_rows, lengths_table, pairs
from fitune.views.tokens import CHINESE, TokenizerView, TokenView, coloured, token_views, tokenizer_view

BINS = 24
MOST_EXAMPLES = 5  # groups of equal rows that are shown
MOST_TEXTS = 20_000  # texts that the tokenizer view counts over, and
MOST_CHARACTERS = 10_000  # of each so much


def language(text: str) -> str:
    """zh, ja, ko, en (Latin letters), mixed or other, by the letters of a text."""
    if re.search(f"[{letters.KANA}]", text):
        return "ja"
    if re.search(f"[{letters.HANGUL}]", text):
        return "ko"
    chinese = len(CHINESE.findall(text))
    latin = len(re.findall(f"[{letters.LATIN}]", text)) / 4  # a word has several letters
    if not chinese and not latin:
        return "other"
    share = chinese / (chinese + latin)
    return "zh" if share > 0.7 else "en" if share < 0.1 else "mixed"


@dataclass
class Texts:
    """What is counted over all conversations, in one pass and without keeping them."""

    languages: Counter[str] = field(default_factory=Counter)
    whole: array[int] = field(default_factory=lambda: array("Q"))  # digests of rows, and of their prompts
    prompts: array[int] = field(default_factory=lambda: array("Q"))
    texts: list[str] = field(default_factory=list)

    def add(self, row: Conversation) -> None:
        """One more row."""
        self.languages[language(" ".join(m.content for m in row.messages))] += 1
        self.whole.append(_digest([[m.role, m.content, m.context] for m in row.messages]))
        self.prompts.append(_digest([[m.role, m.content, m.context] for m in row.prompt()]))
        if len(self.texts) < MOST_TEXTS:
            self.texts += [m.content[:MOST_CHARACTERS] for m in row.messages]


def duplicates(whole: ArrayLike, prompts: ArrayLike, source: Callable[[int], object]) -> dict[str, Any]:
    """Rows that are there more than once, whole or by their prompt alone.

    Args:
        whole, prompts: a digest of each row, and of its prompt.
        source: where a row stands.
    """
    rows, prompts = np.asarray(whole), np.asarray(prompts)
    _, of, counts = np.unique(rows, return_inverse=True, return_counts=True)
    examples: dict[int, list[str]] = {}
    for number in np.flatnonzero(counts[of] > 1).tolist():
        group = int(of[number])
        if group in examples or len(examples) < MOST_EXAMPLES:
            examples.setdefault(group, []).append(str(source(number)))
    return {
        "rows": len(rows) - len(counts),
        "prompts": len(prompts) - len(np.unique(prompts)),
        "examples": [places[:4] for places in examples.values()],
    }


def _digest(value: object) -> int:
    digest = hashlib.blake2b(json.dumps(value, ensure_ascii=False).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def histogram(lengths: ArrayLike) -> list[tuple[int, int, int]]:
    """(from, to, rows) bins of a round width over the lengths; the last one takes what is longer than the 99.5 %."""
    values = np.asarray(lengths)
    top = int(np.percentile(values, 99.5, method="higher"))
    width = max(8, -(-top // BINS // 8) * 8)
    edges = [*range(0, top + 1, width), max(int(values.max()) + 1, top + 1)]
    counts, _ = np.histogram(values, edges)
    return [(edges[n], edges[n + 1] - 1, int(count)) for n, count in enumerate(counts)]


def padding_wasted(lengths: ArrayLike, batch_size: int) -> float:
    """Share of a padded batch's tokens that would be padding, with rows in random order."""
    order = np.random.default_rng(0).permutation(np.asarray(lengths))
    starts = np.arange(0, len(order), batch_size)
    rows = np.minimum(batch_size, len(order) - starts)
    padded = int((np.maximum.reduceat(order, starts) * rows).sum())
    return 1 - float(order.sum()) / max(1, padded)


@dataclass(frozen=True)
class SampleView:
    """A sample token by token."""

    source: str
    tokens: list[TokenView]


@dataclass
class Inspection:
    """All of it."""

    data: list[str]
    model: str
    template: str
    rows: dict[str, Any]  # read, kept, dropped, bad, cut, duplicates, empty answers
    bad: list[tuple[str, int, str]]  # why rows are bad: the reason, how many, and where it was met first
    notes: list[str]  # how columns and files were understood
    by_source: dict[str, int]
    by_format: dict[str, int]
    languages: dict[str, int]
    lengths: dict[str, float]
    length_choices: list[LengthChoice]
    histogram: list[tuple[int, int, int]]
    max_length: int
    label_share: float
    padding_wasted: dict[str, float]
    duplicates: dict[str, Any]
    findings: list[Finding]
    tokenizers: list[TokenizerView]
    samples: list[SampleView]

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def inspect(
    config: RunConfig, *, samples: int = 3, tokenizers: Sequence[str] = (), watch: Watcher | None = None
) -> Inspection:
    """Look at data as a run would train on it.

    Args:
        config: the settings of the run; config.model may be a folder with nothing but tokenizer files.
        samples: how many rows are shown token by token.
        tokenizers: further folders whose tokenizers are compared on the same data.
        watch: progress is reported to it.

    Raises:
        FituneError: data or a tokenizer that cannot be read at all. Bad rows are counted, not raised.
    """
    watch = watch or Silent()
    folder = locate(config.model)
    tokenizer = tokenizer_folders.load(folder)
    if config.new_tokens:
        add_tokens(tokenizer, config.new_tokens, config.answer_tokens)
    limit, vocabulary = _model_facts(folder, tokenizer)
    config = config.model_copy(update={"skip_bad": True, "val_share": 0.0})
    data = datachecks.read(config, folder, tokenizer, limit=limit, vocabulary=vocabulary, watch=watch)
    report = data.report
    texts = Texts()
    progress = Ticker(watch, "looking", len(data.conversations))
    for number, row in enumerate(data.conversations, 1):
        texts.add(row)
        progress(number)
    progress.end()
    lengths = data.whole_lengths
    named = [
        (folder.name, tokenizer),
        *((Path(path).name, tokenizer_folders.load(locate(path))) for path in tokenizers),
    ]
    doubles = duplicates(texts.whole, texts.prompts, data.conversations.source)
    return Inspection(
        data=[source.path for source in config.sources()],
        model=str(folder),
        template=data.encoder.template.name,
        rows=_row_counts(report, doubles["rows"]),
        bad=bad_rows(report),
        notes=report.notes,
        by_source=_by_name(data.conversations.files()),
        by_format=report.formats,
        languages=dict(texts.languages.most_common()),
        lengths=report.lengths,
        length_choices=report.length_choices,
        histogram=histogram(lengths),
        max_length=report.max_length,
        label_share=report.trained_tokens / max(1, report.tokens),
        padding_wasted={str(size): padding_wasted(lengths, size) for size in (4, 8, 16)},
        duplicates=doubles,
        findings=data.findings,
        tokenizers=[tokenizer_view(name, one, texts.texts[:MOST_TEXTS]) for name, one in named],
        samples=[SampleView(str(s.source), token_views(tokenizer, s)) for s in _spread(data.samples, samples)],
    )


def _row_counts(report: DataReport, duplicates: int) -> dict[str, int]:
    """What became of the rows, by the names that are shown."""
    return {
        "read": report.rows + report.skipped_bad,
        "kept": report.kept,
        "dropped": report.dropped,
        "bad": report.skipped_bad,
        "prompts cut": report.cut_prompt,
        "answers cut": report.cut_answer,
        "duplicates": duplicates,
        "empty answers": report.bad_reasons.get("the answer is empty", 0),
    }


def bad_rows(report: DataReport) -> list[tuple[str, int, str]]:
    """Why rows are bad, the most frequent reason first: the reason, how many, and the first of them."""
    found = sorted(report.bad_reasons.items(), key=lambda item: -item[1])
    return [(reason, count, report.bad_first.get(reason, "")) for reason, count in found]


def _model_facts(folder: Path, tokenizer: Tokenizer) -> tuple[int, int]:
    """Longest row and embedding rows, from config.json; where there is none, from the tokenizer."""
    if not (folder / "config.json").is_file():
        return NO_LIMIT, len(tokenizer)
    from fitune.models.configs import longest_row, read_config  # imports torch, which a tokenizer alone does not need

    config = read_config(folder)
    return longest_row(config), max(config.vocab_size, len(tokenizer))


def _spread(samples: Sequence[Sample], count: int) -> list[Sample]:
    """So many samples, evenly over the data."""
    return list(samples[:: max(1, len(samples) // count)][:count]) if count else []


def _by_name(counts: Mapping[str, int]) -> dict[str, int]:
    """Counts by file, under the files' names alone; of files with one name, together."""
    named: Counter[str] = Counter()
    for path, rows in counts.items():
        named[Path(path).name] += rows
    return dict(named.most_common())


# ---- shown in a terminal, and as a page ----


def show(seen: Inspection, console: Console, *, ids: bool = False) -> None:
    """Everything as tables, bars and coloured tokens.

    Args:
        seen: what was found.
        console: where to.
        ids: print the ids beside the tokens.
    """
    console.print(
        pairs("rows", {**seen.rows, "by source": _counts(seen.by_source), "by format": _counts(seen.by_format)})
    )
    if seen.bad:
        console.print(_bad_table(seen.bad))
    padding = ", ".join(f"{share:.0%} of batches of {size}" for size, share in seen.padding_wasted.items())
    console.print(
        pairs(
            "tokens",
            {
                "template": seen.template,
                "trained": f"{seen.label_share:.1%} of the tokens",
                "padding saved": f"{padding} would have been padding",
                "languages": _counts(seen.languages),
                "lengths": ", ".join(f"{name} {value:.0f}" for name, value in seen.lengths.items()),
            },
        )
    )
    most = max(count for _, _, count in seen.histogram)
    for low, high, count in seen.histogram:
        mark = " < max length" if low <= seen.max_length <= high else ""
        console.print(f"{low:>6}-{high:<6} {'█' * round(count / most * 40)} {count:,}{mark}", highlight=False)
    console.print(lengths_table(seen.length_choices))
    console.print(findings_table(seen.findings))
    console.print(_tokenizer_table(seen.tokenizers))
    for sample in seen.samples:
        console.print(f"[bold]{escape(sample.source)}[/]  (green: trained; ▶ the border between prompt and answer)")
        console.print(coloured(sample.tokens, ids=ids), soft_wrap=True)


def _bad_table(bad: Sequence[tuple[str, int, str]]) -> Table:
    table = Table(title="bad rows, left out", title_justify="left", box=None, pad_edge=False)
    table.add_column("rows", justify="right")
    table.add_column("reason", overflow="fold")
    table.add_column("the first of them", overflow="fold")
    for reason, count, first in bad:
        table.add_row(f"{count:,}", escape(reason), escape(first))
    return table


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in list(counts.items())[:8])


def _tokenizer_table(views: Sequence[TokenizerView]) -> Table:
    table = Table(title="tokenizers" if len(views) > 1 else "tokenizer", title_justify="left")
    table.add_column("")
    for view in views:
        table.add_column(escape(view.name), overflow="fold")
    for name, values in _tokenizer_rows(views):
        table.add_row(name, *map(escape, values))
    return table


def _tokenizer_rows(views: Sequence[TokenizerView]) -> list[tuple[str, list[str]]]:
    """Names and values of what is shown of tokenizers, for the terminal and the page alike."""

    def per_character(view: TokenizerView) -> str:
        value = view.tokens_per_chinese_character
        return "no Chinese" if value is None else f"{value:.2f}"

    return [
        ("vocabulary", [f"{v.kind}, {v.vocabulary:,} tokens" for v in views]),
        ("tokens", [f"{v.tokens:,}" for v in views]),
        ("characters per token", [f"{v.characters_per_token:.2f}" for v in views]),
        ("tokens per Chinese character", [per_character(v) for v in views]),
        ("byte fallback, unknown", [f"{v.byte_fallback_tokens:,}, {v.unknown_tokens:,} tokens" for v in views]),
        ("characters dropped", [", ".join(v.dropped) or "none" for v in views]),
        ("one token, several characters", [" ".join(v.several_characters) or "none seen" for v in views]),
        ("one character, several tokens", [" ".join(v.several_tokens) or "none seen" for v in views]),
    ]


def page(seen: Inspection) -> str:
    """The same as one self-contained HTML page."""
    bars = [Bar(f"{low}", count) for low, _, count in seen.histogram]
    return render(
        "inspect",
        title=f"fitune inspect: {', '.join(Path(path).name for path in seen.data)}",
        subtitle=f"tokenizer {seen.model}, template {seen.template}",
        numbers=[(name, f"{value:,}") for name, value in seen.rows.items()]
        + [("tokens trained", f"{seen.label_share:.1%}"), ("max length", f"{seen.max_length:,}")],
        chart=[bar_chart(bars, x_label="tokens of a row", y_label="rows", width=width) for width in (WIDE, NARROW)],
        seen=seen,
        samples=[(sample, cells.sample(sample.tokens)) for sample in seen.samples],
        tokenizer_rows=_tokenizer_rows(seen.tokenizers),
        lengths=(LENGTHS, length_rows(seen.length_choices)),
        findings=[asdict(finding) for finding in seen.findings],
    )
