"""glibc's heap, replayed on paper: what a process on a CPU holds beyond its tensors, in holes between them.

In: the events of a trace and where its steps lie. Out: bytes of holes at the heap's highest.

torch asks for blocks at multiples of 64 bytes. glibc takes the smallest free piece that holds the block and what it may
have to cut off its ends (`_int_memalign`), and small objects may come to lie in the cut ends: autograd's, until the
step is over. The forward pass makes those; what is made in a backward pass, of recomputed blocks too, goes in it. Freed
blocks on both sides of one stay apart, and a block of the same size fits into none of them. Which ends are taken
depends on what else the process does, so they are drawn. How many is fitted on the cases "33M, lora" and "33M, nf4" of
benchmarks/process_memory.py, which have large activations, and as glibc is found on LoRA with half and with all of the
blocks recomputed; the others are then within 15 % of their process (results/process_memory.json).
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence

from fitune.core import processor
from fitune.memory.allocator import ENDLESS, FREE, LIVE, Block, Event, Pool

HOLES = "holes in the heap"
GRAIN = 16
HEADER = 16  # of a piece
END = 48  # what is cut off on each side: the alignment and the smallest piece, together 96
MAPPED = 32 * 2**20  # a block of that size is mapped by itself (DEFAULT_MMAP_THRESHOLD_MAX), and leaves no hole
SMALL = 2**10  # less comes out of bins of small pieces
TAKEN = {True: 0.2, False: 0.45}  # share of the blocks whose ends are taken, by whether freed pieces are merged


def taken(given: Mapping[str, str], version: tuple[int, int] | None) -> float | None:
    """The share of the blocks whose ends small objects take; None where another allocator is at work than glibc's, or
    where large blocks were set apart: neither leaves holes of this kind.

    Args:
        given: the environment.
        version: of glibc.
    """
    if version is None or any(map(given.get, processor.CHOSEN)):
        return None
    return TAKEN[
        version >= processor.MERGES_ITSELF or "glibc.malloc.tcache_count=0" in given.get(processor.TUNABLES, "")
    ]


class Heap:
    """One range of addresses, from its lowest free piece upwards.

    Attributes:
        top: the highest address in use so far, in bytes.
    """

    def __init__(self, share: float) -> None:
        """An empty heap. share: of the blocks, whose ends small objects take."""
        self._pool = Pool(split_from=GRAIN)
        self._pool.add(Block(self._pool, 0, ENDLESS, FREE))
        self._live: dict[int, Block] = {}
        self._ends: list[Block] = []
        self._share = share
        self._draw = random.Random(0)  # noqa: S311  # no secret: the same plan each time
        self.top = 0

    def allocate(self, key: int, size: int, *, taken: bool = True) -> None:
        """Put a block of `size` bytes into the smallest piece that holds it and its ends, which may be taken."""
        wanted = -(-size // GRAIN) * GRAIN + HEADER
        before = self._pool.take(wanted + 2 * END)
        assert before is not None  # the last piece is endless
        block = before.cut(END, LIVE)
        after = block.cut(wanted, FREE)
        self._live[key] = block
        self.top = max(self.top, after.address + END)
        if not taken or self._draw.random() >= self._share:
            self._pool.put(before)
        else:
            before.state = LIVE
            self._ends.append(before)
            if after.size > END:
                after, end = after.cut(END, FREE), after
                end.state = LIVE
                self._ends.append(end)
        self._pool.put(after)

    def free(self, key: int) -> None:
        """Take a block back."""
        self._pool.put(self._live.pop(key))

    def free_ends(self) -> None:
        """The small objects are gone."""
        for end in self._ends:
            self._pool.put(end)
        self._ends = []


def holes(events: Sequence[Event], course: Sequence[tuple[int, str, str]], share: float) -> int:
    """Bytes that the heap has at its highest beyond what is in use at the most.

    Args:
        events: as `allocator.replay` takes them.
        course: (first event, phase, region), as a tracer has it; small objects go where an update begins.
        share: of the blocks, whose ends small objects take.
    """
    heap, updates = Heap(share), {at for at, phase, _ in course if phase == "update"}
    regions, region = {at: region for at, _, region in course}, ""
    apart: dict[int, int] = {}
    now = most = beside = highest = 0
    for at, (key, size) in enumerate(events):
        region = regions.get(at, region)
        if at in updates:
            heap.free_ends()
        if size > 0 and SMALL <= size < MAPPED:
            heap.allocate(key, size, taken=region != "backward")
        elif size > 0:
            apart[key] = size
            beside += size
        elif size < 0 and key in apart:
            beside -= apart.pop(key)
        elif size < 0:
            heap.free(key)
        now += size
        most, highest = max(most, now), max(highest, heap.top + beside)
    return max(0, highest - most)


def beside(events: Sequence[Event], course: Sequence[tuple[int, str, str]]) -> dict[str, int]:
    """What the heap of this process would hold beside the tensors of a trace, for a plan. Args as in `holes`."""
    share = taken(os.environ, processor.glibc())
    return {} if share is None else {HOLES: holes(events, course, share)}
