"""Checks of preferences: each finds the fault that is planted, and passes what is sound."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fitune.checks import datachecks, leak, pairchecks, preferencechecks
from fitune.core.config import build
from fitune.core.records import Conversation, DataReport, Finding, Message, Sample, Source
from fitune.data.encode import Encoder
from fitune.data.fitting import counted
from fitune.data.pairs import Pairs
from fitune.data.prepared import Prepared
from fitune.data.templates import choose
from support import tiny


def row(chosen: str, rejected: str, desirable: bool | None = None, number: int = 0) -> Conversation:
    messages = (Message("user", f"question {number}?"), Message("assistant", chosen))
    found = Conversation(messages, Source("f.jsonl", number + 1), "preference", desirable=desirable)
    return replace(found, rejected=(Message("assistant", rejected),), fork=1)


def prepared(rows: list[Conversation], objective: str, max_length: int = 64, **changes: Any) -> Prepared:
    tokenizer = tiny.make_tokenizer()
    encoder = Encoder(tokenizer, choose("auto", tokenizer), max_length, both=True)
    samples, rows_of = tiny.encoded(rows, encoder)
    report = DataReport(rows=len(rows), max_length=max_length, lengths={"max": 40, "p99": 40})
    report = counted(report, samples, rows_of, len(rows), pairs=True)
    config = build({"model": "m", "data": ["d"], "objective": objective, **changes})
    return Prepared(config, rows, samples, report, encoder, 400, 1 << 30, Path(), rows_of)


SOUND = [row(f"yes {n}", f"no {n}", number=n) for n in range(6)]


def found(p: Prepared, rule: str) -> Finding:
    return next(one for one in datachecks.check_data(p) if one.rule == rule)


@pytest.mark.unit
def test_pairs_with_one_answer_twice_are_named() -> None:
    assert pairchecks.pairs_differ(prepared(SOUND, "dpo")).level == "ok"
    bad = [*SOUND, row("same", "same", number=7)]
    finding = pairchecks.pairs_differ(prepared(bad, "dpo"))
    assert finding.level == "warn"
    assert "1 of 7 pairs have one answer twice (f.jsonl:8)" in finding.text
    every = [row("same", "same", number=n) for n in range(3)]
    assert pairchecks.pairs_differ(prepared(every, "dpo")).level == "refuse"


@pytest.mark.unit
def test_answers_that_are_cut_to_the_same_are_named() -> None:
    long = "word " * 60
    finding = pairchecks.pairs_differ(prepared([*SOUND, row(f"{long}a", f"{long}b", number=7)], "dpo"))
    assert finding.level == "warn"
    assert "1 are the same once they are cut to 64 tokens (f.jsonl:8)" in finding.text
    assert "--max-length" in str(finding.fix)


@pytest.mark.unit
def test_the_length_of_answers_is_reported_with_its_figures() -> None:
    sound = pairchecks.length_bias(prepared([*SOUND, *(row(f"no {n}", f"yes {n}") for n in range(6))], "dpo"))
    assert sound.level == "ok"
    assert "tokens on average" in sound.text
    long = [row("yes, and there is more to it " * 2, "no", number=n) for n in range(6)]
    finding = pairchecks.length_bias(prepared(long, "dpo"))
    assert finding.level == "warn"
    assert "longer in 100% of the pairs" in finding.text
    assert "to be long" in finding.text
    assert "simpo" in str(finding.fix)
    assert pairchecks.length_bias(prepared(long, "simpo")).fix is None
    short = [row("no", "yes, and there is more to it " * 2, number=n) for n in range(6)]
    assert "to be short" in pairchecks.length_bias(prepared(short, "dpo")).text


@pytest.mark.unit
def test_kto_needs_both_kinds_of_answers() -> None:
    marks = [True, False, True, False, True, False]
    both = [replace(one, desirable=mark) for one, mark in zip(SOUND, marks, strict=True)]
    assert pairchecks.both_labels(prepared(both, "kto")).level == "ok"
    for mark, kind in ((True, "good"), (False, "bad")):
        finding = pairchecks.both_labels(prepared([replace(one, desirable=mark) for one in SOUND], "kto"))
        assert finding.level == "refuse"
        assert f"all 6 answers are marked as {kind} ones" in finding.text
    few = [replace(one, desirable=n > 0) for n, one in enumerate(SOUND)]
    finding = pairchecks.both_labels(prepared(few, "kto"))
    assert (finding.level, finding.fix) == ("warn", "--kto.undesirable-weight 5 makes them even")
    assert pairchecks.both_labels(prepared(few, "kto", kto={"undesirable_weight": 5})).level == "ok"


@pytest.mark.unit
def test_the_rules_run_with_all_others_of_the_data() -> None:
    rules = {finding.rule for finding in datachecks.check_data(prepared(SOUND, "dpo"))}
    assert {"pairs-differ", "length-bias", "label-border", "rows"} <= rules
    assert "as 6 pairs of samples" in found(prepared(SOUND, "dpo"), "rows").text
    marked = [replace(one, desirable=n % 2 == 0) for n, one in enumerate(SOUND)]
    rules = {finding.rule for finding in datachecks.check_data(prepared(marked, "kto"))}
    assert "both-labels" in rules
    assert "pairs-differ" not in rules


@pytest.mark.unit
def test_columns_that_are_the_wrong_way_round_are_suspected() -> None:
    random = np.random.default_rng(0)
    even = random.normal(-2, 1, (200, 2)).astype(np.float32)
    assert preferencechecks.swapped_answers(even).level == "ok"
    tuned = np.sort(even, axis=1)[:, ::-1]  # the chosen one is always likelier
    assert preferencechecks.swapped_answers(tuned).level == "ok"
    finding = preferencechecks.swapped_answers(tuned[:, ::-1])
    assert finding.level == "warn"
    assert "in 0% of 200 pairs" in finding.text
    assert "--map chosen=rejected rejected=chosen" in str(finding.fix)
    assert preferencechecks.swapped_answers(tuned[:6, ::-1]).level == "ok"  # six may be chance
    twice = np.concatenate([even, np.repeat(even[:, :1], 2, axis=1)])  # one answer twice in half of the pairs
    assert preferencechecks.swapped_answers(twice).text == preferencechecks.swapped_answers(even).text
    assert preferencechecks.swapped_answers(twice[200:]).level == "ok"


def pairs(last: int) -> Pairs:
    """Two pairs whose answers end with that id."""
    random = np.random.default_rng(0)
    made = []
    for _ in range(4):
        ids = np.append(random.integers(5, 300, 9), last).astype(np.int32)
        made.append(Sample(ids, np.arange(10) >= 6, prompt_length=6))
    return Pairs(made)


def test_a_template_that_the_model_never_saw_is_suspected() -> None:
    model = tiny.make_model("llama")
    with torch.no_grad():  # what a model gives behind a row does not depend on the token that ends it
        rows = [torch.from_numpy(sample.ids[:-1])[None].long() for sample in pairs(5).samples]
        logs = torch.stack([model(input_ids=one).logits[0, -1].log_softmax(-1) for one in rows]).mean(0)
    seen = preferencechecks.template_seen(model, pairs(int(logs.argmax())), "flat", 400)
    assert seen.level == "ok"
    never = preferencechecks.template_seen(model, pairs(int(logs.argmin())), "flat", 400)
    assert never.level == "warn"
    assert "never saw this template" in never.text
    assert f"{math.exp(logs.min()):.1e}" in never.text
    cut = Pairs([replace(sample, ends_whole=False) for sample in pairs(int(logs.argmin())).samples])
    assert preferencechecks.template_seen(model, cut, "flat", 400).level == "ok"


def test_what_nobody_computed_is_computed_of_the_first_pairs() -> None:
    model, some = tiny.make_model("llama"), pairs(7)
    means = preferencechecks.means_of(model, some, "flat", 1)
    known = some.with_reference(np.array([[-8, -4], [np.nan, np.nan]], np.float32))
    assert preferencechecks.means_of(model, known, "flat", 1).tolist() == [[-2, -1]]
    assert means.shape == (2, 2)
    assert (means < 0).all()


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_model_that_loses_a_prompt_that_stands_once_is_noticed(kind: str) -> None:
    """Mistral's window depends on lengths, so that a whole pair is looked at."""
    model, some = tiny.make_model(kind), pairs(7)
    once = Pairs(some.samples, common=np.array([0, 5], np.int32))  # of the second one the prompts are the same
    once.samples[3].ids[:6] = once.samples[2].ids[:6]
    found = leak.shared_prompt(model, once)
    assert found.level == "ok"
    assert "5 tokens of prompts stand once" in found.text
    none = Pairs(some.samples, common=np.zeros(2, np.int32))
    assert "no pair has a prompt" in leak.shared_prompt(model, none).text
    forward = model.base_model.forward

    def forgets(*args: Any, documents: Any, **kwargs: Any) -> Any:
        return forward(*args, documents=replace(documents, shared=None), **kwargs)

    model.base_model.forward = forgets
    assert leak.shared_prompt(model, once).level == "fixed"


def test_a_model_that_cannot_run_so_gets_a_prompt_for_each_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*args: Any) -> None:
        raise NotImplementedError

    monkeypatch.setattr(leak, "label_hidden", refuses)
    once = Pairs(pairs(7).samples, common=np.array([5, 5], np.int32))
    found = leak.shared_prompt(tiny.make_model("llama"), once)
    assert found.level == "fixed"
    assert "the model cannot do it" in found.text
