"""What batches of preferences add up, and the means that a step or an evaluation reports.

In: sums and counts in the order of FIGURES. Out: Rewards.
"""

from __future__ import annotations

from collections.abc import Sequence

from fitune.core.records import Rewards

# sums over the chosen (or good) and the rejected (or bad) answers, and how many of them there are
FIGURES = ("chosen", "rejected", "chosen_logp", "rejected_logp", "right", "kl", "good", "bad", "answers", "compared")


def rewards_of(seen: Sequence[float]) -> Rewards:
    """The means of what batches added up."""
    found = dict(zip(FIGURES, seen, strict=True))

    def mean(name: str, count: str) -> float | None:
        return found[name] / found[count] if found[count] else None

    chosen, rejected = mean("chosen", "good"), mean("rejected", "bad")
    return Rewards(
        chosen=chosen,
        rejected=rejected,
        margin=None if chosen is None or rejected is None else chosen - rejected,
        accuracy=mean("right", "compared"),
        chosen_logp=mean("chosen_logp", "good"),
        rejected_logp=mean("rejected_logp", "bad"),
        kl=mean("kl", "answers"),
    )
