"""The rows of an optimizer step, shared out over processes by their tokens.

In: how long the rows of a step are. Out: which of them each process takes. The longest go first, each to the process
that has the fewest tokens yet (Graham 1969, "Bounds on Multiprocessing Timing Anomalies"); then rows are exchanged
between the process with the most and the others while that makes it shorter. It follows from the lengths alone.
"""

from __future__ import annotations

from collections.abc import Sequence

EXCHANGES = 100  # at most so many: each makes the longest share shorter


def shares(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Which rows each process takes, by their places in the step and in their order there.

    Args:
        lengths: tokens of each row.
        ranks: how many processes. With fewer rows than that some take none.
    """
    found: list[list[int]] = [[] for _ in range(ranks)]
    sums = [0] * ranks
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        rank = sums.index(min(sums))
        found[rank].append(row)
        sums[rank] += lengths[row]
    for _ in range(EXCHANGES):
        if not _exchange(found, sums, lengths):
            break
    return [sorted(rows) for rows in found]


def _exchange(found: list[list[int]], sums: list[int], lengths: Sequence[int]) -> bool:
    """Exchange a row of the longest share for a shorter one, or none, of another: the one after which the longer of
    both is shortest."""
    most = sums.index(max(sums))
    best: tuple[int, int, int, int | None] | None = (
        None  # the longer of both afterwards, the other, what goes, what comes
    )
    for other in range(len(found)):
        if other == most:
            continue
        for row in found[most]:
            for back in (None, *found[other]):
                moved = lengths[row] - (0 if back is None else lengths[back])
                after = max(sums[most] - moved, sums[other] + moved)
                if moved > 0 and after < (sums[most] if best is None else best[0]):
                    best = after, other, row, back
    if best is None:
        return False
    _, other, row, back = best
    found[most].remove(row)
    found[other].append(row)
    if back is not None:
        found[other].remove(back)
        found[most].append(back)
    moved = lengths[row] - (0 if back is None else lengths[back])
    sums[most], sums[other] = sums[most] - moved, sums[other] + moved
    return True
