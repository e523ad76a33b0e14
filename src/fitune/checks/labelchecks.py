"""Checks of samples: what is trained of each row, what was cut, and whether chat asks as training did.

In: what was prepared. Out: Findings, each rule a function of its own, named as in the report.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fitune.core.records import Conversation, Finding, Sample, Source
from fitune.data import labels
from fitune.data.prepared import PROBE_CHARACTERS, PROBES, Prepared
from fitune.data.store import cut_answers, ends_whole
from fitune.data.templates import ChatTemplate
from fitune.data.templates.base import kept_date

NAMED = 3  # rows that a finding names


def truncation(p: Prepared) -> Finding:
    """Few rows are cut: cut answers teach the model to stop in mid-sentence, cut questions to guess.

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
    kept = np.zeros(len(p.conversations), np.bool_)
    kept[p.rows_of] = True
    cut = cut_answers(p.samples)
    rows = sorted({*np.flatnonzero(~kept).tolist(), *p.rows_of[cut].tolist()})
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
    """Every stop token is trained in some row: the model never learns to produce one that is not."""
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
    """Where nothing was cut, the labels hold each whole answer: a model trained on parts of them stops too early."""
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


def double_bos(p: Prepared) -> Finding:
    """No row starts with two BOS tokens."""
    bos = p.encoder.tokenizer.bos_token_id
    doubled = np.flatnonzero((p.facts.first == p.facts.second) & (p.facts.first == (-2 if bos is None else bos)))
    if len(doubled):
        text = f"{len(doubled)} rows begin with two BOS tokens, the first at {_source(p, doubled)}"
        return Finding("double-bos", "refuse", text)
    return Finding("double-bos", "ok", "no row begins with two BOS tokens")


def padding_side(p: Prepared) -> Finding:
    """Rows have no padding at either end: padding added later is known by its position, so pad = EOS is safe."""
    pad = p.encoder.tokenizer.pad_token_id
    if pad is None or pad in p.encoder.stop_ids:
        return Finding("padding-side", "ok", "no padding in the rows; the pad token is never looked at")
    for side, ids in (("left", p.facts.first), ("right", p.facts.last)):
        if len(padded := np.flatnonzero(ids == pad)):
            return Finding("padding-side", "refuse", f"{_source(p, padded)}: padded on the {side}")
    return Finding("padding-side", "ok", "no padding in the rows")


def bpe_boundary(p: Prepared) -> Finding:
    """Counts the borders of prompt and answer that the tokenizer would merge over if it encoded both together."""
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


def _pairs(p: Prepared) -> list[tuple[Conversation, Sample]]:
    """Up to PROBES rows with their (last) samples, evenly over the data."""
    last = np.flatnonzero(np.append(p.rows_of[1:] != p.rows_of[:-1], len(p.rows_of) > 0))
    pairs = [(p.conversations[int(p.rows_of[n])], p.samples[int(n)]) for n in last[:: max(1, len(last) // PROBES)]]
    return [(row, sample) for row, sample in pairs if row.format != "text" and row.characters() <= PROBE_CHARACTERS]


def some_rows(p: Prepared) -> list[Conversation]:
    """Up to PROBES rows, evenly over the data."""
    rows = p.conversations[:: max(1, len(p.conversations) // PROBES)]
    return [row for row in rows if row.characters() <= PROBE_CHARACTERS]


def template_parity(p: Prepared) -> Finding:
    """The prompt that chat will send is, token for token, the prompt that was trained."""
    for conversation in some_rows(p):
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
    """Reports what the tokenizer's own template does unseen: a date that it writes, texts that it moves."""
    template = p.encoder.template
    date_note = kept_date(template)
    moved = isinstance(template, ChatTemplate) and template.moves_system
    if moved and any(message.role == "system" for row in some_rows(p) for message in row.messages):
        where = "system texts stand in the first user's turn"
        why = "as asked" if p.config.system_role == "first-user" else "the chat template has no place for them"
        return Finding("chat-template", "fixed", "; ".join(filter(None, (f"{where} ({why})", date_note))))
    return Finding("chat-template", "ok", date_note or f"template {template.name}: no date, no text moved")
