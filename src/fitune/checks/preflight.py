"""Checks before the first step: each rule is a function of its own, named as in the report.

In: what was prepared. Out: Findings. `refuse` stops the run before it costs anything; `warn` is printed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fitune.checks import textchecks
from fitune.checks.contradictions import contradictions
from fitune.core.config import RunConfig
from fitune.core.errors import Collector, TrainingError, shorten
from fitune.core.events import Watcher
from fitune.core.records import Conversation, Finding, Sample, Source
from fitune.data import labels, pipeline
from fitune.data.prepared import PROBE_CHARACTERS, PROBES, Prepared
from fitune.data.store import Samples, cut_answers, ends_whole
from fitune.data.templates import ChatTemplate
from fitune.data.templates.base import kept_date
from fitune.data.tokenizer import parity
from fitune.engine.checkpoint import RunFolder
from fitune.models import quant
from fitune.models.families import Family
from fitune.models.model import trainable

SHARED = 0.05  # of the held-out rows, above which their loss says little
NAMED = 3  # rows that a finding names


Rule = Callable[[Prepared], Finding]


def rows(p: Prepared) -> Finding:
    """How many rows came in and went out; columns that no format uses are named once."""
    r = p.report
    formats = ", ".join(f"{n:,} {name}" for name, n in r.formats.items())
    parts = [f"{r.rows:,} read ({formats}), {r.kept:,} trained, {r.held_out:,} held out"]
    if r.samples != r.kept:
        why = ", one for each answer, because the template writes answers otherwise once something follows them: "
        parts.append(f"as {r.samples:,} samples{why if r.repeated else ''}{r.cost()}")
    if r.unused_columns:
        parts.append(f"columns not used: {', '.join(sorted(r.unused_columns))}")
    return Finding("rows", "ok", "; ".join([*parts, *r.notes]))


def bad_row(p: Prepared) -> Finding:
    """Rows that cannot be used refuse the run, or are counted and listed where the user wants them skipped."""
    r = p.report
    slots = ", ".join(f"{{{{{name}}}}} in {count:,} rows" for name, count in r.unfilled_slots.items())
    if r.skipped_bad:
        listed = "; ".join(r.skipped[:3])
        return Finding("bad-row", "warn", f"{r.skipped_bad:,} bad rows skipped: {listed}", "fix them in the file")
    if slots:
        name = next(iter(r.unfilled_slots))
        return Finding("bad-row", "warn", f"slots that nothing fills: {slots}", f"--fill {name}=...")
    return Finding("bad-row", "ok", "every row can be used")


def truncation(p: Prepared) -> Finding:
    """Rows that lose answer tokens make a model that stops in mid-sentence; one that answers half a question guesses.

    Refused above `max_lost` where a longer max_length, within what the model can hold, would keep them; where no length
    would, only the user can decide between this model and this data: it is said, and the run goes on.
    """
    r, count = p.report, len(p.conversations)
    lost = r.cut_answer + r.dropped
    text = (
        f"max length {r.max_length}: {r.cut_prompt} prompts and {r.cut_answer} answers cut, {r.dropped} rows dropped "
        f"(longest {r.lengths['max']:.0f}); {lost / count:.1%} of the rows lose answer tokens{_first_lost(p)}"
    )
    if r.cut_text:
        text += f"; prompts that lose more than old exchanges, a part of the user's text: {r.cut_text}"
    if lost <= p.config.max_lost * count:
        more = f"--max-length {min(p.limit, int(r.lengths['max']))}" if r.max_length < p.limit else None
        return Finding("truncation", "warn", text, more) if lost or r.cut_text else Finding("truncation", "ok", text)
    if r.lost_at_limit > p.config.max_lost * count:
        return Finding("truncation", "warn", f"{text}; even the model's longest, {p.limit}, would cut too many")
    longer = min(p.limit, int(r.lengths["p99"]))
    return Finding(
        "truncation", "refuse", text, f"--max-length {longer}, or --max-lost {lost / count:.2f} to accept it"
    )


def _first_lost(p: Prepared) -> str:
    """The first rows that were dropped or whose answers were cut, by name."""
    there = np.zeros(len(p.conversations), np.bool_)
    there[p.rows_of] = True
    cut = cut_answers(p.samples)
    rows = sorted({*np.flatnonzero(~there).tolist(), *p.rows_of[cut].tolist()})
    if not rows:
        return ""
    return f" ({', '.join(str(p.conversations[row].source) for row in rows[:NAMED])}{', ...' * (len(rows) > NAMED)})"


def labels_empty(p: Prepared) -> Finding:
    """Rows without a trained token teach nothing; those that lost all of them to cutting are named by `truncation`."""
    r = p.report
    if not r.kept:
        return Finding("labels-empty", "refuse", "no row has a token to train on", "a larger --max-length")
    share = r.trained_tokens / max(1, r.tokens)
    return Finding("labels-empty", "ok", f"{share:.0%} of {r.tokens:,} tokens trained, at least one in each row kept")


def eos_supervised(p: Prepared) -> Finding:
    """The last trained token of every whole row is a stop token; of a cut row it is not."""
    whole = ends_whole(p.samples)
    wrong = np.flatnonzero(np.isin(p.facts.last_trained, p.encoder.stop_ids) != whole)
    if len(wrong):
        return Finding("eos-supervised", "refuse", f"{len(wrong)} rows end wrongly, the first at {_source(p, wrong)}")
    text = f"the stop token ends {whole.sum():,} of {len(p.samples):,} rows, trained in each"
    return Finding("eos-supervised", "ok", text)


def _source(p: Prepared, samples: NDArray[np.int64]) -> Source | None:
    """Where the first of these samples comes from."""
    return p.samples[int(samples[0])].source


def stop_token_trained(p: Prepared) -> Finding:
    """A stop token that no row trains is one the model never learns to say."""
    tokenizer, encoder = p.encoder.tokenizer, p.encoder
    names = ", ".join(f"{tokenizer.convert_ids_to_tokens(i)} ({i})" for i in encoder.stop_ids)
    if len(p.samples) and not p.facts.trains_stop.any():
        text = f"no row trains a stop token ({names}): the model would never stop"
        return Finding("stop-token-trained", "refuse", text, "a larger --max-length, so that answers are not cut")
    wanted = encoder.template.stop
    if wanted and tokenizer.convert_ids_to_tokens(encoder.stop_id) != wanted:
        text = f"the template's {wanted!r} is no token of this vocabulary; answers end with {names}"
        return Finding("stop-token-trained", "warn", text)
    return Finding("stop-token-trained", "ok", f"answers end with {names}")


def label_border(p: Prepared) -> Finding:
    """Labels begin with each answer's first token and are of that answer alone: its text and its stop.

    The textbook collator masks `seq_len - 1` tokens of the prompt and lets the model shift: it trains the last one.
    Others train headers, or a template's own system text, where an answer does not follow a question. So each answer
    must have the labels that it has behind a question, wherever it stands.
    """
    for row, sample, turns in _trained(p):
        if text := labels.wrong(p.encoder, row, sample, turns):
            text = f"{sample.source}: {text}; expected {labels.EXPECTED}"
            return Finding("label-border", "refuse", text, labels.FIX)
    return Finding("label-border", "ok", "labels are the answers' own tokens and their stops, from the first one on")


def answers_whole(p: Prepared) -> Finding:
    """The labels of a row that nothing cut say its whole answers: a model trained on parts of them stops too early."""
    tried = 0
    for row, sample, turns in _trained(p):
        if text := labels.missing(p.encoder, row, sample, turns):
            return Finding("answers-whole", "refuse", f"{sample.source}: {text}", labels.FIX)
        tried += 1
    return Finding("answers-whole", "ok", f"the labels of {tried} samples are the whole texts of their answers")


def _trained(p: Prepared) -> Iterator[tuple[Conversation, Sample, list[int]]]:
    """Up to PROBES rows, their uncut samples, and the turns that each of these trains."""
    last = np.flatnonzero(np.append(p.rows_of[1:] != p.rows_of[:-1], len(p.rows_of) > 0))
    for end in last[:: max(1, len(last) // PROBES)]:
        row = p.conversations[int(p.rows_of[end])]
        if row.format == "text" or row.characters() > PROBE_CHARACTERS:
            continue
        first = int(np.searchsorted(p.rows_of, p.rows_of[end]))
        yield from labels.of_row(p.encoder, row, [p.samples[n] for n in range(first, int(end) + 1)])


def bpe_boundary(p: Prepared) -> Finding:
    """How many borders between prompt and answer a tokenizer would merge over, were they encoded together."""
    merged = tried = 0
    for conversation, _ in _pairs(p):
        segments = p.encoder.template.render(conversation.messages, conversation.tools)
        for before, after in pairwise(segments):
            if after.trained and not before.trained and before.text and after.text:
                ids = [
                    p.encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
                    for text in (before.text, after.text, before.text + after.text)
                ]
                merged += ids[0] + ids[1] != ids[2]
                tried += 1
    text = f"prompt and answer are encoded apart; together {merged} of {tried} borders tried would differ"
    return Finding("bpe-boundary", "fixed" if merged else "ok", text)


def padding_side(p: Prepared) -> Finding:
    """Rows hold no padding, at neither end: what is padded later is told by position, so pad = EOS is safe."""
    pad = p.encoder.tokenizer.pad_token_id
    if pad is None or pad in p.encoder.stop_ids:
        return Finding("padding-side", "ok", "no padding in the rows; the pad token is never looked at")
    for side, ids in (("left", p.facts.first), ("right", p.facts.last)):
        if len(padded := np.flatnonzero(ids == pad)):
            return Finding("padding-side", "refuse", f"{_source(p, padded)}: padded on the {side}")
    return Finding("padding-side", "ok", "no padding in the rows")


def _pairs(p: Prepared) -> list[tuple[Conversation, Sample]]:
    """Up to PROBES rows with their (last) samples, evenly over the data."""
    last = np.flatnonzero(np.append(p.rows_of[1:] != p.rows_of[:-1], len(p.rows_of) > 0))
    some = [(p.conversations[int(p.rows_of[n])], p.samples[int(n)]) for n in last[:: max(1, len(last) // PROBES)]]
    return [(row, sample) for row, sample in some if row.format != "text" and row.characters() <= PROBE_CHARACTERS]


def _some(p: Prepared) -> list[Conversation]:
    """Up to PROBES rows, evenly over the data."""
    some = p.conversations[:: max(1, len(p.conversations) // PROBES)]
    return [row for row in some if row.characters() <= PROBE_CHARACTERS]


def answer_tokens(p: Prepared) -> Finding:
    """See `textchecks.answer_tokens`."""
    return textchecks.answer_tokens(p.encoder, p.conversations)


def lost_characters(p: Prepared) -> Finding:
    """See `textchecks.lost_characters`."""
    return textchecks.lost_characters(p.encoder, p.conversations)


def byte_fallback(p: Prepared) -> Finding:
    """See `textchecks.byte_fallback`."""
    return textchecks.byte_fallback(p.encoder.tokenizer, p.samples)


def double_bos(p: Prepared) -> Finding:
    """Two BOS tokens at the start of a row."""
    bos = p.encoder.tokenizer.bos_token_id
    doubled = np.flatnonzero((p.facts.first == p.facts.second) & (p.facts.first == (-2 if bos is None else bos)))
    if len(doubled):
        text = f"{len(doubled)} rows begin with two BOS tokens, the first at {_source(p, doubled)}"
        return Finding("double-bos", "refuse", text)
    return Finding("double-bos", "ok", "no row begins with two BOS tokens")


def template_parity(p: Prepared) -> Finding:
    """The prompt that chat will send is, token for token, the prompt that was trained."""
    for conversation in _some(p):
        if conversation.format == "text":
            continue  # nobody asks for it
        prompt = p.encoder.prompt(conversation.prompt(), conversation.tools)
        sample = p.encoder.with_max_length(1 << 30).sample(conversation)
        if sample is not None and sample.ids[: len(prompt)].tolist() != prompt:
            return Finding("template-parity", "refuse", f"{conversation.source}: chat would send other tokens")
    return Finding(
        "template-parity", "ok", f"chat sends the tokens that are trained (template {p.encoder.template.name})"
    )


def chat_template(p: Prepared) -> Finding:
    """What the tokenizer's own template does that its texts do not show: a date that it writes, texts that move."""
    template = p.encoder.template
    told = kept_date(template)
    moved = isinstance(template, ChatTemplate) and template.moves_system
    if moved and any(message.role == "system" for row in _some(p) for message in row.messages):
        where = "system texts stand in the first user's turn"
        why = "as asked" if p.config.system_role == "first-user" else "the chat template has no place for them"
        return Finding("chat-template", "fixed", "; ".join(filter(None, (f"{where} ({why})", told))))
    return Finding("chat-template", "ok", told or f"template {template.name}: no date, no text moved")


def tokenizer_parity(p: Prepared) -> Finding:
    """The tokenizer in use splits texts as the folder's sentencepiece file does; repeated spaces are a known trap."""
    texts = [m.content for c in _some(p) for m in c.messages]
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
    """What a cache kept is what would be made now: its keys tell content and code, this looks at the rows."""
    if p.cached is None:
        return Finding("stale-cache", "ok", "the data was read and encoded anew")
    kept, cached = p.cached.samples, p.cached
    for row, now in zip(cached.rows, cached.first, strict=False):
        if row != now:
            return Finding("stale-cache", "refuse", f"the cached row {row.source} is not what the file holds now")
    of = kept.column("row")
    some = np.unique(of[:: max(1, len(of) // PROBES)])
    for row in some:
        places = np.flatnonzero(of == row)
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
    return Finding("stale-cache", "ok", f"from the cache; {len(some)} of its rows encoded again gave the same tokens")


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
    truncation,
    labels_empty,
    eos_supervised,
    stop_token_trained,
    answer_tokens,
    double_bos,
    template_parity,
    chat_template,
    label_border,
    answers_whole,
    bpe_boundary,
    padding_side,
    tokenizer_parity,
    lost_characters,
    byte_fallback,
    folder_agrees,
    id_range,
)


def held_out_apart(trained: Samples, held_out: Samples) -> Finding:
    """Held-out rows that are trained too measure memory, not what was learned.

    Args:
        trained: samples that are trained.
        held_out: samples that are not to be.
    """
    if not len(held_out):
        return Finding("held-out-apart", "ok", "no rows are held out")
    wanted = {sample.ids.tobytes() for sample in held_out}
    lengths = {len(ids) // 4 for ids in wanted}
    there = [n for n, length in enumerate(trained.column("length").tolist()) if length in lengths]
    both = wanted.intersection(ids.astype(np.int32).tobytes() for _, ids, _ in trained.pieces(there))
    share = sum(sample.ids.tobytes() in both for sample in held_out) / len(held_out)
    text = f"{share:.1%} of the held-out samples are trained too"
    if share > SHARED:
        fix = "leave out the duplicates, or hold out other rows: --eval-data FILE"
        return Finding("held-out-apart", "warn", f"{text}: their loss says little of what was learned", fix)
    return Finding("held-out-apart", "ok", text)


def check_data(prepared: Prepared) -> list[Finding]:
    """Run every data rule. What is refused is raised by `raise_refused`."""
    trained, held_out = prepared.samples, prepared.held_out
    apart = [held_out_apart(trained, held_out)] if held_out is not None and isinstance(trained, Samples) else []
    return [*(rule(prepared) for rule in DATA_RULES), *apart]


def read(
    config: RunConfig, folder: Path, words: Any, *, limit: int, vocabulary: int, watch: Watcher | None = None
) -> pipeline.Data:
    """The data of a config, read, prepared and checked; see `pipeline.read`.

    A run that is resumed gives its template the date that it had.
    """
    run = RunFolder(config.output) if config.output else None
    date = run.read("template").get("date") if run is not None and run.has("template") else None
    return pipeline.read(
        config, folder, words, limit=limit, vocabulary=vocabulary, watch=watch, check=check_data, date=date
    )


def family_found(family: Family) -> Finding:
    """Which names fitune goes by; those of a model that is not in the table are said aloud."""
    if not family.found:
        return Finding("family", "ok", f"{family.model_type}: {family.describe()}")
    return Finding("family", "warn", f"{family.model_type} is not in the table; by its names: {family.describe()}")


def trainable_set(model: Any, expected: Mapping[str, int] | None, dtype: torch.dtype = torch.float32) -> Finding:
    """The trainable parameters are, by name and size, those of the method's closed form, in the dtype asked for."""
    parameters = trainable(model)
    sizes = {name: p.numel() for name, p in parameters.items()}
    count, total = sum(sizes.values()), sum(quant.numel(p) for p in model.parameters())
    if expected is not None and sizes != dict(expected):
        differing = sorted(n for n in sizes.keys() | expected.keys() if sizes.get(n) != expected.get(n))
        text = f"{count:,} parameters are trainable, {sum(expected.values()):,} expected; differing: {differing[:3]}"
        return Finding("trainable-set", "refuse", text)
    if not parameters:
        return Finding("trainable-set", "refuse", "nothing is trainable")
    kind = str(dtype).removeprefix("torch.")
    low = [name for name, p in parameters.items() if p.dtype != dtype]
    if low:
        return Finding("trainable-set", "refuse", f"{len(low)} trainable tensors are not {kind}, the first {low[0]}")
    return Finding(
        "trainable-set", "ok", f"{count:,} of {total:,} parameters trainable ({count / total:.4%}), all {kind}"
    )


def raise_refused(findings: Sequence[Finding]) -> None:
    """Raise what was refused, all at once."""
    problems = Collector()
    for finding in findings:
        if finding.level == "refuse":
            problems.problems.append(TrainingError(f"{finding.rule}: {finding.text}", fix=finding.fix))
    problems.raise_any()
