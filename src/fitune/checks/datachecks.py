"""Checks of the data before the first step: rows, cache, tokenizer, folder. The list of all data rules stands here.

In: what was prepared. Out: Findings, each rule a function of its own, named as in the report. `refuse` stops the run
before it costs anything; `warn` is printed. No torch here: `fitune inspect` starts with these alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fitune.checks import labelchecks, pairchecks, textchecks
from fitune.checks.contradictions import contradictions
from fitune.checks.labelchecks import some_rows
from fitune.core.config import RunConfig
from fitune.core.errors import shorten
from fitune.core.events import Watcher
from fitune.core.options import Wanted
from fitune.core.records import Finding, Sample
from fitune.data import pipeline
from fitune.data.prepared import PROBE_CHARACTERS, PROBES, Prepared
from fitune.data.store import Samples
from fitune.data.tokenizer import parity
from fitune.data.tokenizer.interface import Tokenizer

SHARED = 0.05  # of the held-out rows, above which their loss says little

Rule = Callable[[Prepared], Finding]


def rows(p: Prepared) -> Finding:
    """How many rows came in and went out; columns that no format uses are named once."""
    r = p.report
    formats = ", ".join(f"{n:,} {name}" for name, n in r.formats.items())
    parts = [f"{r.rows:,} read ({formats}), {r.kept:,} trained, {r.held_out:,} held out"]
    if r.pairs:
        parts.append(f"as {r.pairs:,} pairs of samples; both of a pair begin with the same {r.shared:,} tokens in all")
    elif r.samples != r.kept:
        why = ", one for each answer, because the template writes answers otherwise once something follows them: "
        parts.append(f"as {r.samples:,} samples{why if r.repeated else ''}{r.cost()}")
    if r.unused_columns:
        parts.append(f"columns not used: {', '.join(sorted(r.unused_columns))}")
    return Finding("rows", "ok", "; ".join([*parts, *r.notes]))


def bad_row(p: Prepared) -> Finding:
    """Rows that cannot be used stop the run; with --skip-bad they are left out, counted and listed."""
    r = p.report
    slots = ", ".join(f"{{{{{name}}}}} in {count:,} rows" for name, count in r.unfilled_slots.items())
    if r.skipped_bad:
        listed = "; ".join(r.skipped[:3])
        return Finding("bad-row", "warn", f"{r.skipped_bad:,} bad rows skipped: {listed}", "fix them in the file")
    if slots:
        name = next(iter(r.unfilled_slots))
        return Finding("bad-row", "warn", f"slots that nothing fills: {slots}", f"--fill {name}=...")
    return Finding("bad-row", "ok", "every row can be used")


def answer_tokens(p: Prepared) -> Finding:
    """See `textchecks.answer_tokens`."""
    return textchecks.answer_tokens(p.encoder, p.conversations)


def lost_characters(p: Prepared) -> Finding:
    """See `textchecks.lost_characters`."""
    return textchecks.lost_characters(p.encoder, p.conversations)


def byte_fallback(p: Prepared) -> Finding:
    """See `textchecks.byte_fallback`."""
    return textchecks.byte_fallback(p.encoder.tokenizer, p.samples)


def tokenizer_parity(p: Prepared) -> Finding:
    """The tokenizer in use splits texts as the folder's sentencepiece file does; repeated spaces are a known trap."""
    texts = [m.content for c in some_rows(p) for m in c.messages]
    found = parity(p.folder, p.encoder.tokenizer, texts)
    if found:
        text = f"{len(found)} of {len(texts)} texts are split unlike sentencepiece does: {shorten(found[0].text, 40)}"
        return Finding("tokenizer-parity", "warn", text, "training and chat agree; other programs may not")
    return Finding("tokenizer-parity", "ok", "texts are split as the tokenizer's own file says")


def id_range(p: Prepared) -> Finding:
    """Every id has a row in the embedding."""
    highest = int(p.facts.highest.max(initial=0))
    if highest >= p.vocabulary:
        text = f"token id {highest} is beyond the model's vocabulary of {p.vocabulary}"
        return Finding("id-range", "refuse", text, "the tokenizer belongs to another model")
    return Finding("id-range", "ok", f"all ids are below {p.vocabulary:,}")


def _weights(sample: Sample) -> NDArray[np.float32]:
    return np.ones(len(sample), np.float32) if sample.weights is None else sample.weights


def stale_cache(p: Prepared) -> Finding:
    """Cached rows and tokens are what would be made now; where they are not, the data is read again."""
    if p.cached is None:
        return Finding("stale-cache", "ok", "the data was read and encoded anew")
    kept, cached = p.cached.samples, p.cached
    for row, now in zip(cached.rows, cached.first, strict=False):
        if row != now:
            return Finding("stale-cache", "refuse", f"the cached row {row.source} is not what the file holds now")
    row_of = kept.column("row")
    numbers = np.unique(row_of[:: max(1, len(row_of) // PROBES)])
    for row in numbers:
        places = np.flatnonzero(row_of == row)
        if kept.rows[int(row)].characters() > PROBE_CHARACTERS:
            continue
        made = cached.encoder.samples(kept.rows[int(row)])
        same = len(made) == len(places) and all(
            np.array_equal(new.ids, kept[int(n)].ids)
            and np.array_equal(new.mask, kept[int(n)].mask)
            and np.array_equal(_weights(new), _weights(kept[int(n)]))
            for new, n in zip(made, places, strict=True)
        )
        if not same:
            return Finding(
                "stale-cache", "refuse", f"the cached tokens of {kept.rows.source(int(row))} are out of date"
            )
    return Finding(
        "stale-cache", "ok", f"from the cache; {len(numbers)} of its rows encoded again gave the same tokens"
    )


def folder_agrees(p: Prepared) -> Finding:
    """The files of the folder say the same of the model: its type, its classes, its version."""
    if found := contradictions(p.folder):
        fix = "make them say the same, or download the folder again; --template says which prompts are meant"
        return Finding("folder", "warn", f"the files of {p.folder} contradict each other: {'; '.join(found)}", fix)
    return Finding("folder", "ok", "the folder's files say the same of the model")


DATA_RULES: tuple[Rule, ...] = (
    rows,
    stale_cache,
    bad_row,
    labelchecks.truncation,
    labelchecks.labels_empty,
    labelchecks.eos_supervised,
    labelchecks.stop_token_trained,
    answer_tokens,
    labelchecks.double_bos,
    labelchecks.template_parity,
    labelchecks.chat_template,
    labelchecks.label_border,
    labelchecks.answers_whole,
    labelchecks.bpe_boundary,
    labelchecks.padding_side,
    tokenizer_parity,
    lost_characters,
    byte_fallback,
    folder_agrees,
    id_range,
)


MORE_RULES: dict[Wanted, tuple[Rule, ...]] = {  # of preferences
    "answers": (),
    "pairs": (pairchecks.pairs_differ, pairchecks.length_bias),
    "labels": (pairchecks.both_labels,),
}


def held_out_apart(trained: Samples, held_out: Samples) -> Finding:
    """Few held-out rows are trained too: their loss would measure memory, not what was learned.

    Args:
        trained: samples that are trained.
        held_out: samples that are not to be.
    """
    if not len(held_out):
        return Finding("held-out-apart", "ok", "no rows are held out")
    wanted = {sample.ids.tobytes() for sample in held_out}
    lengths = {len(ids) // 4 for ids in wanted}
    alike = [n for n, length in enumerate(trained.column("length").tolist()) if length in lengths]
    both = wanted.intersection(ids.astype(np.int32).tobytes() for _, ids, _ in trained.pieces(alike))
    share = sum(sample.ids.tobytes() in both for sample in held_out) / len(held_out)
    text = f"{share:.1%} of the held-out samples are trained too"
    if share > SHARED:
        fix = "leave out the duplicates, or hold out other rows: --eval-data FILE"
        return Finding("held-out-apart", "warn", f"{text}: their loss says little of what was learned", fix)
    return Finding("held-out-apart", "ok", text)


def check_data(prepared: Prepared) -> list[Finding]:
    """Run every data rule. What is refused is raised by `raise_refused`."""
    trained, held_out = prepared.samples, prepared.held_out
    if held_out is not None and isinstance(trained, Samples):
        every = slice(None, None, 2 if prepared.report.pairs else 1)  # of a pair the first
        apart = [held_out_apart(trained.view(every), held_out.view(every))]
    else:
        apart = []
    wanted = prepared.config.wanted if prepared.report.pairs else "answers"
    return [*(rule(prepared) for rule in (*DATA_RULES, *MORE_RULES[wanted])), *apart]


def read(
    config: RunConfig, folder: Path, tokenizer: Tokenizer, *, limit: int, vocabulary: int, watch: Watcher | None = None
) -> pipeline.Data:
    """The data of a config, read, prepared and checked; see `pipeline.read`.

    A run that is resumed gives its template the date that it had.
    """
    target = pipeline.Target(folder, tokenizer, limit, vocabulary)
    return pipeline.read(config, target, watch=watch, check=check_data, date=_date_of_run(config))


def _date_of_run(config: RunConfig) -> str | None:
    """The date that the template of a run in this folder wrote; None: a new run, which takes today's."""
    if not config.output:
        return None
    from fitune.engine.checkpoint import RunFolder  # imports torch, which a look at data does without

    run = RunFolder(config.output)
    return run.read("template").get("date") if run.has("template") else None
