"""How long a row may be: `max_length: auto` and what each choice would cut.

In: (prompt, answer) lengths of all rows in tokens. Out: a max_length and the numbers behind it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MOST_CUT = 0.01  # auto is raised until at most this share of the rows is longer


def rule_of_thumb(lengths: Sequence[int]) -> int:
    """Mean without outliers (1.5 x the interquartile range) x 1.5, rounded up to a multiple of 8."""
    values = np.asarray(lengths, dtype=np.float64)
    q1, q3 = np.percentile(values, [25, 75])
    inside = values[(values >= q1 - 1.5 * (q3 - q1)) & (values <= q3 + 1.5 * (q3 - q1))]
    return _up_to_8(float(inside.mean()) * 1.5)


def automatic(lengths: Sequence[int], limit: int) -> int:
    """The rule of thumb, raised until at most MOST_CUT of the rows are longer, and never above the model's limit."""
    values = np.sort(np.asarray(lengths))
    enough = int(values[min(len(values) - 1, int(np.ceil(len(values) * (1 - MOST_CUT))) - 1)])
    return min(limit, max(rule_of_thumb(lengths), _up_to_8(enough)))


def summary(lengths: Sequence[int]) -> dict[str, float]:
    """mean, p50, p95, p99 and max."""
    values = np.asarray(lengths)
    p50, p95, p99 = np.percentile(values, [50, 95, 99], method="higher")
    return {"mean": float(values.mean()), "p50": int(p50), "p95": int(p95), "p99": int(p99), "max": int(values.max())}


def _up_to_8(value: float) -> int:
    return int(np.ceil(value / 8)) * 8
