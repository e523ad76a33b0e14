"""How long a row may be: `max_length: auto`, and what each choice would cut.

In: for each sample its length, and the length that it needs so that no answer is cut. Out: a max_length and the numbers
behind it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fitune.records import LengthChoice

MOST_LOST = 0.01  # auto is raised until at most this share of the rows loses answer tokens


def rule_of_thumb(lengths: ArrayLike) -> int:
    """Mean without outliers (1.5 x the interquartile range) x 1.5, rounded up to a multiple of 8."""
    values = np.asarray(lengths, dtype=np.float64)
    q1, q3 = np.percentile(values, [25, 75])
    inside = values[(values >= q1 - 1.5 * (q3 - q1)) & (values <= q3 + 1.5 * (q3 - q1))]
    return _up_to_8(float(inside.mean()) * 1.5)


def automatic(lengths: ArrayLike, needed: ArrayLike, limit: int) -> int:
    """The rule of thumb, raised until at most MOST_LOST of the rows lose answer tokens.

    Args:
        lengths: of the uncut samples.
        needed: of each, the shortest length that cuts nothing of its answers.
        limit: the longest that the model can hold.
    """
    values = np.sort(np.asarray(needed))
    may_lose = int(len(values) * MOST_LOST)
    return min(limit, max(rule_of_thumb(lengths), _up_to_8(float(values[-1 - may_lose]))))


def summary(lengths: ArrayLike) -> dict[str, float]:
    """mean, p50, p95, p99 and max."""
    values = np.asarray(lengths)
    p50, p95, p99 = np.percentile(values, [50, 95, 99], method="higher")
    return {"mean": float(values.mean()), "p50": int(p50), "p95": int(p95), "p99": int(p99), "max": int(values.max())}


def choices(lengths: ArrayLike, needed: ArrayLike, limit: int, chosen: int) -> list[LengthChoice]:
    """What the chosen length, the rule of thumb, auto and the percentiles would each cut; a length is told once."""
    named = {
        "chosen": chosen,
        "auto": automatic(lengths, needed, limit),
        "rule of thumb": rule_of_thumb(lengths),
        **{name: int(value) for name, value in summary(lengths).items() if name != "mean"},
    }
    whole, must = np.asarray(lengths), np.asarray(needed)
    return [LengthChoice(name, at, _share(whole > at), _share(must > at)) for name, at in named.items()]


def _share(rows: NDArray[np.bool_]) -> float:
    return float(rows.mean())


def _up_to_8(value: float) -> int:
    return int(np.ceil(value / 8)) * 8
