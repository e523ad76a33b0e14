"""Statistics of rows measured twice: by hand, by enumeration, and how often they alarm where nothing changed."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from fitune.core import paired
from fitune.core.verdict import ALL, Measured, Pairs, decided, together

pytestmark = pytest.mark.unit


def test_the_exact_test_by_hand_and_for_many_rows() -> None:
    assert paired.exact(0, 0) == 1.0
    assert paired.exact(3, 3) == 1.0
    assert paired.exact(0, 6) == pytest.approx(2 / 64)
    assert paired.exact(8, 1) == pytest.approx(2 * (1 + 9) / 512)
    few = sum(math.comb(4000, k) for k in range(1901))
    assert paired.exact(2100, 1900) == pytest.approx(2 * few / 2**4000, rel=1e-9)


def test_signs_turned_at_random_are_near_all_turns_together() -> None:
    values = np.array([0.3, 0.1, -0.2, 0.7, 0.4, 0.25, 0.05])
    sums = [abs(float(np.dot(signs, values))) for signs in product((-1, 1), repeat=len(values))]
    share = sum(one >= abs(values.sum()) - 1e-12 for one in sums) / len(sums)
    assert paired.flipped(values) == pytest.approx(share, abs=0.01)
    assert paired.flipped(values) == paired.flipped(values)
    assert paired.flipped(np.zeros(5)) == 1.0


def test_holm_by_hand() -> None:
    assert paired.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert paired.holm([0.9, 0.6]) == [1.0, 1.0]
    assert paired.holm([]) == []


@pytest.fixture
def _few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paired, "DRAWS", 500)


@pytest.mark.usefixtures("_few_draws")
def test_an_interval_holds_the_true_difference_as_often_as_it_says() -> None:
    """Of 200 samples some 95 % must; 180 to 199 is what chance makes of that."""
    generator, hits = np.random.default_rng(0), 0
    for _ in range(200):
        tokens = generator.integers(3, 30, 40).astype(np.float64)
        low, high = paired.interval(tokens * generator.normal(0.2, 0.5, 40), tokens)
        hits += low <= 0.2 <= high
    assert 180 <= hits <= 199


def _rows(seed: int, *, worse: str = "") -> Measured:
    """120 answers of four kinds that change by chance to both sides alike; those of one kind to the worse alone."""
    generator, kinds = np.random.default_rng(seed), [f"kind {n % 4}" for n in range(120)]
    before = (generator.random(120) < 0.9).astype(np.float64)
    after = np.where(generator.random(120) < 0.15, generator.permutation(before), before)
    after = np.where([kind == worse for kind in kinds], before * (generator.random(120) < 0.4), after)
    tokens = generator.integers(3, 12, 120).astype(np.float64)
    losses = generator.gamma(2.0, 1.0, 120) * tokens
    noise = generator.normal(0, 0.05, 120) * tokens
    known = Pairs("known", before, after, np.ones(120))
    return Measured("general", [Pairs("loss", losses, losses + noise, tokens), known], kinds)


@pytest.mark.usefixtures("_few_draws")
def test_planted_regressions_are_found_and_chance_is_no_alarm() -> None:
    clean = [decided("run", [_rows(seed)]) for seed in range(40)]
    assert sum(bool(run.forgot) for run in clean) <= 1  # at most one in twenty is what the correction allows
    for seed in range(40):
        found = decided("run", [_rows(seed, worse="kind 2")])
        assert "kind 2" in found.forgot
        assert set(found.forgot) <= {ALL, "kind 2"}


@pytest.mark.usefixtures("_few_draws")
def test_without_the_correction_there_would_be_alarms(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: each of many tests taken by itself."""
    monkeypatch.setattr("fitune.core.verdict.holm", list)
    monkeypatch.setattr("fitune.core.verdict.exact", lambda better, worse: paired.exact(better, worse) / 5)
    assert any(decided("run", [_rows(seed)]).forgot for seed in range(40))


def test_a_loss_changes_only_beyond_what_counts_as_a_difference() -> None:
    tokens, losses = np.full(50, 4.0), np.linspace(1, 9, 50)
    for change, outcome in ((0.002, "no difference shown"), (0.05, "worse"), (-0.05, "better")):
        pairs = Pairs("loss", losses, losses + change * tokens, tokens)
        section = decided("run", [Measured("held-out", [pairs], ["a"] * 50)]).sections[0]
        assert section.outcome == outcome
        assert section.kinds[0].changes[0].difference == pytest.approx(change)


def test_several_runs_are_compared_by_their_mean() -> None:
    measured = [[_rows(seed, worse="kind 1")] for seed in range(3)]
    assert "kind 1" in together("mean", measured).forgot
    one = together("mean", measured[:1]).sections[0]
    assert one.kinds == decided("run", measured[0]).sections[0].kinds
