"""Which blocks of a model a setting means.

In: a setting (all of them, every nth, or some by their numbers) and how many blocks there are. Out: numbers of blocks;
and numbers as the setting that means them. Blocks are counted from 0, from the bottom.
"""

from __future__ import annotations

from collections.abc import Iterable

from fitune.core.errors import ConfigError

AUTO = "auto"  # nobody has chosen yet: a plan will
RANGES = r"[0-9]{1,4}-[0-9]{1,4}(,[0-9]{1,4}-[0-9]{1,4})*"  # 0-11, or 0-3,8-11: first and last of each stretch
Blocks = bool | int | str


def chosen(which: Blocks, count: int) -> frozenset[int]:
    """The numbers of the blocks that a setting means.

    Args:
        which: True: all; False: none; a number n: every nth; `0-11,14-14`: by their numbers.
        count: of the model's blocks.

    Raises:
        ConfigError: a stretch that no model has, or not this one.
    """
    if not isinstance(which, str):
        return frozenset(range(int(which) - 1, count, int(which))) if which else frozenset()
    found: set[int] = set()
    for stretch in which.split(","):
        first, last = (int(end) for end in stretch.split("-"))
        if not first <= last < count:
            raise ConfigError(
                f"checkpointing, offload: blocks {stretch}",
                received=f"first {first}, last {last}",
                expected=f"a first and a last block of 0 to {count - 1}, in this order",
                fix=f"--checkpointing 0-{count - 1}, or --checkpointing auto",
            )
        found.update(range(first, last + 1))
    return frozenset(found)


def named(numbers: Iterable[int]) -> str | bool:
    """The setting that means these blocks: `0-11,14-14`; False: none."""
    stretches: list[list[int]] = []
    for number in sorted(numbers):
        if stretches and stretches[-1][1] == number - 1:
            stretches[-1][1] = number
        else:
            stretches.append([number, number])
    return ",".join(f"{first}-{last}" for first, last in stretches) or False


def text(numbers: Iterable[int]) -> str:
    """The same for people: `blocks 0 to 11 and 14`."""
    which = named(numbers)
    if not which:
        return "no block"
    ends = [stretch.split("-") for stretch in str(which).split(",")]
    parts = [first if first == last else f"{first} to {last}" for first, last in ends]
    one = len(parts) == 1 and ends[0][0] == ends[0][1]
    return f"block{'' if one else 's'} " + " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
