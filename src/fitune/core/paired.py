"""Statistics of the same rows measured twice: intervals by bootstrap, exact tests, and the correction for many of them.

In: what each row had before and after. Out: intervals and probabilities. Everything is drawn from a fixed seed, so the
same figures give the same answer.

Shapes: R = rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

DRAWS = 10_000
NUMBERS = 4_000_000  # random numbers that are held at once
MOST = 200_000_000  # of all draws together: of very many rows fewer draws are enough
LEVEL = 0.95
Floats = NDArray[np.float64]


def interval(values: Floats, weights: Floats, *, seed: int = 0) -> tuple[float, float]:
    """The middle 95 % of sum(values) / sum(weights) over rows drawn with replacement (Efron 1979, percentiles).

    Args:
        values: (R,), of each row the difference between after and before.
        weights: (R,), what a row counts for: its tokens, or 1.
        seed: of the draws.
    """
    generator, found = np.random.default_rng([seed, 1]), list[Floats]()
    for count in _parts(len(values)):
        rows = generator.integers(0, len(values), (count, len(values)))
        found.append(values[rows].sum(1) / weights[rows].sum(1))
    low, high = np.quantile(np.concatenate(found), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def flipped(values: Floats, *, seed: int = 0) -> float:
    """How probable is a sum of differences that is so far from 0, if before and after were the same but for chance?

    Two-sided, by turning the sign of each row's difference at random (Fisher 1935); the draws count the observed one,
    so the probability is never 0 and never too small.

    Args:
        values: (R,), the differences.
        seed: of the draws.
    """
    generator, reached, drawn = np.random.default_rng([seed, 2]), 0, 0
    observed = abs(float(values.sum())) * (1 - 1e-12)  # the same sum in another order counts, too
    for count in _parts(len(values)):
        signs = generator.integers(0, 2, (count, len(values))) * 2 - 1
        reached += int((np.abs(signs @ values) >= observed).sum())
        drawn += count
    return (1 + reached) / (1 + drawn)


def _parts(rows: int) -> Iterator[int]:
    """The draws, in parts that fit into memory."""
    left, each = min(DRAWS, max(1_000, MOST // rows)), max(1, NUMBERS // rows)
    while left > 0:
        yield min(each, left)
        left -= each


def exact(better: int, worse: int) -> float:
    """The sign test: how probable is so uneven a split, or one more so, if both sides were as likely? Two-sided.

    Of answers that are right or wrong it is McNemar's exact test (1947). Rows without a difference do not count.

    Args:
        better, worse: rows that changed to one side and to the other.
    """
    count, fewer = better + worse, min(better, worse)
    of_all = count * math.log(2) - math.lgamma(count + 1)
    terms = (math.exp(-of_all - math.lgamma(k + 1) - math.lgamma(count - k + 1)) for k in range(fewer + 1))
    return min(1.0, 2 * math.fsum(terms))


def holm(probabilities: Sequence[float]) -> list[float]:
    """Each probability, corrected for their number, so that one false alarm among all of them stays as rare as it is of
    a single test (Holm 1979)."""
    order = sorted(range(len(probabilities)), key=probabilities.__getitem__)
    corrected, highest = [0.0] * len(order), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * probabilities[place]))
        corrected[place] = highest
    return corrected
