"""How long a row may be: `max_length: auto`, and what each choice would cut.

In: for each sample its length, the length that it needs so that no answer is cut, and the length that leaves all but
old exchanges as it is. Out: a max_length and the numbers behind it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fitune.core.records import LengthChoice

MOST_LOST = 0.01  # auto is raised until at most this share of the rows loses anything but old exchanges
LITTLE = 1.25  # the longest row is taken where it makes a micro-batch at most so much larger


def rule_of_thumb(lengths: ArrayLike) -> int:
    """Mean without outliers (1.5 x the interquartile range) x 1.5, rounded up to a multiple of 8."""
    values = np.asarray(lengths, dtype=np.float64)
    q1, q3 = np.percentile(values, [25, 75])
    inside = values[(values >= q1 - 1.5 * (q3 - q1)) & (values <= q3 + 1.5 * (q3 - q1))]
    return _up_to_8(float(inside.mean()) * 1.5)


def automatic(
    lengths: ArrayLike, intact: ArrayLike, limit: int, *, batch_size: int = 1, batch_tokens: int | None = None
) -> int:
    """The rule of thumb, raised until at most MOST_LOST of the rows lose anything but old exchanges; the longest row
    where that costs little.

    Nothing is padded, so a longer limit costs memory only where a long row is in a micro-batch: one row of it is the
    longest then, and the others are as long as 95 % of the rows are at most.

    Args:
        lengths: of the uncut samples.
        intact: of each, the shortest length that cuts nothing but old exchanges.
        limit: the longest that the model can hold.
        batch_size: rows of a micro-batch.
        batch_tokens: tokens of a micro-batch, in place of batch_size.
    """
    values = np.sort(np.asarray(intact))
    may_lose = int(len(values) * MOST_LOST)
    found = max(rule_of_thumb(lengths), _up_to_8(float(values[-1 - may_lose])))
    longest = _up_to_8(float(np.max(lengths)))
    others = (batch_size - 1) * summary(lengths)["p95"]

    def largest(length: float) -> float:
        """Tokens of a micro-batch with a row of this length."""
        return max(batch_tokens, length) if batch_tokens else length + others

    if found < longest and largest(longest) <= LITTLE * largest(found):
        found = longest
    return min(limit, found)


def summary(lengths: ArrayLike) -> dict[str, float]:
    """mean, p50, p95, p99 and max."""
    values = np.asarray(lengths)
    p50, p95, p99 = np.percentile(values, [50, 95, 99], method="higher")
    return {"mean": float(values.mean()), "p50": int(p50), "p95": int(p95), "p99": int(p99), "max": int(values.max())}


def choices(lengths: ArrayLike, needed: ArrayLike, intact: ArrayLike, *, chosen: int, auto: int) -> list[LengthChoice]:
    """What the chosen length, the rule of thumb, auto and the percentiles would each cut.

    Args:
        lengths: of the uncut samples.
        needed: of each, the shortest length that cuts nothing of its answers.
        intact: of each, the shortest length that cuts nothing but old exchanges.
        chosen: the run's max_length.
        auto: what `automatic` says.
    """
    named = {
        "chosen": chosen,
        "auto": auto,
        "rule of thumb": rule_of_thumb(lengths),
        **{name: int(value) for name, value in summary(lengths).items() if name != "mean"},
    }
    whole, must, text = np.asarray(lengths), np.asarray(needed), np.asarray(intact)
    return [
        LengthChoice(name, at, _share(whole > at), _share(must > at), _share(text > at)) for name, at in named.items()
    ]


def _share(rows: NDArray[np.bool_]) -> float:
    return float(rows.mean())


def _up_to_8(value: float) -> int:
    return int(np.ceil(value / 8)) * 8
