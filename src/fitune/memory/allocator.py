"""PyTorch's caching allocator for CUDA, replayed on paper: what a run's allocations reserve, and where they fail.

In: a list of events (a block takes bytes, a block is freed, the cache is emptied), a budget in bytes, and whether
segments can expand. Out: the peaks that `torch.cuda.max_memory_allocated` and `max_memory_reserved` would report, how
often the cache had to be given back, or `OutOfBudget`; and the smallest budget with which the events complete.

The source is PyTorch, c10/cuda/CUDACachingAllocator.cpp (2.11 to 2.13) with its default settings: one stream, no
`max_split_size_mb`, no `garbage_collection_threshold`, no `roundup_power2_divisions`, no graphs. Three things are
simpler than there. A new segment lies above all earlier ones, while the driver may reuse an address; this decides
ties between equal blocks alone. Expandable segments have endless addresses instead of 9/8 of the GPU's memory. And the
budget is what the driver gives: `set_per_process_memory_fraction` refuses expandable segments a little earlier.

Sizes and addresses are bytes. A block is one of: live (a tensor has it), free (cached), unmapped (addresses of an
expandable range without memory behind them). Blocks of one segment know their neighbours.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from fitune.core.units import MIB

Event = tuple[int, int]  # (block key, bytes): above 0 allocates, below 0 frees; (EMPTY_CACHE, 0) empties the cache

EMPTY_CACHE: Final = -1

GRAIN: Final = 512  # every block is a multiple of it
SMALL: Final = MIB  # the largest block of the small pool
SMALL_SEGMENT: Final = 2 * MIB  # what the small pool asks of the driver, and its page when segments expand
LARGE_SEGMENT: Final = 20 * MIB  # the same of the large pool
LARGE: Final = 10 * MIB  # from here on a block gets a segment of its own, in steps of STEP
STEP: Final = 2 * MIB

FREE: Final = 0
LIVE: Final = 1
_UNMAPPED: Final = 2
ENDLESS: Final = 1 << 60  # addresses of an expandable range; also the budget where there is no limit
_SIZE_BITS: Final = 64  # a free block sorts by its size, shifted by this, then by its address


class OutOfBudget(Exception):
    """An allocation does not fit, not even after the cache was given back.

    Attributes:
        wanted: bytes that were asked for.
        allocated: bytes in live blocks at that moment.
        reserved: bytes that the allocator still held.
    """

    def __init__(self, wanted: int, allocated: int, reserved: int) -> None:
        self.wanted, self.allocated, self.reserved = wanted, allocated, reserved
        super().__init__(f"{wanted} bytes do not fit: {allocated} allocated, {reserved} reserved")


@dataclass(frozen=True)
class Usage:
    """What a replay took, in bytes.

    Attributes:
        allocated: the peak of bytes in live blocks.
        reserved: the peak of bytes held from the driver.
        freed_on_limit: how often cached memory had to be given back because the budget was reached.
    """

    allocated: int
    reserved: int
    freed_on_limit: int


class Block:
    """A piece of a segment."""

    __slots__ = ("address", "after", "before", "pool", "size", "state")

    def __init__(self, pool: Pool, address: int, size: int, state: int) -> None:
        self.pool, self.address, self.size, self.state = pool, address, size, state
        self.before: Block | None = None
        self.after: Block | None = None

    def cut(self, size: int, state: int) -> Block:
        """Keep the first `size` bytes; the rest becomes a neighbour of its own, which is returned."""
        rest = Block(self.pool, self.address + size, self.size - size, state)
        after = self.after
        rest.before, rest.after, self.after, self.size = self, after, rest, size
        if after is not None:
            after.before = rest
        return rest

    def join(self) -> None:
        """Take in the neighbour after this block."""
        gone = self.after
        assert gone is not None
        self.size += gone.size
        after = self.after = gone.after
        if after is not None:
            after.before = self


class Pool:
    """The free blocks of one pool, best fit first; subclasses say where new memory comes from and goes back to.

    `order` and `blocks` are the same free blocks side by side: bisecting plain numbers is several times faster than
    comparing objects, and even thousands of entries are shifted in less time than a tree takes to rebalance in Python.
    """

    def __init__(self, split_from: int) -> None:
        self.split_from = split_from  # a rest of at least this many bytes is split off
        self.reserved = 0
        self.order: list[int] = []
        self.blocks: list[Block] = []

    def take(self, size: int) -> Block | None:
        """The smallest free block that holds `size`, at the lowest address among equals; it leaves the free ones."""
        at = bisect_left(self.order, size << _SIZE_BITS)
        if at == len(self.order):
            return None
        del self.order[at]
        return self.blocks.pop(at)

    def put(self, block: Block) -> Block:
        """Make a block free, as one with its free neighbours; the block that they are now."""
        block.state = FREE
        after, before = block.after, block.before
        if after is not None and after.state == FREE:
            self.drop(after)
            block.join()
        if before is not None and before.state == FREE:
            self.drop(before)
            before.join()
            block = before
        self.add(block)
        return block

    def add(self, block: Block) -> None:
        """Enter a block among the free ones."""
        rank = (block.size << _SIZE_BITS) + block.address
        at = bisect_left(self.order, rank)
        self.order.insert(at, rank)
        self.blocks.insert(at, block)

    def drop(self, block: Block) -> None:
        """Take a block out of the free ones."""
        at = bisect_left(self.order, (block.size << _SIZE_BITS) + block.address)
        del self.order[at], self.blocks[at]

    def grow(self, size: int, limit: int) -> Block | None:
        """A block of at least `size` from new memory; None if the pool would then hold more than `limit`."""
        raise NotImplementedError

    def give_back(self) -> None:
        """Give the driver what no live block needs."""
        raise NotImplementedError


class _Segments(Pool):
    """Memory from `cudaMalloc`: segments that come and go as a whole."""

    def __init__(self, *, small: bool) -> None:
        super().__init__(split_from=GRAIN if small else SMALL + GRAIN)  # a large rest must be above 1 MiB
        self.top = 0

    def grow(self, size: int, limit: int) -> Block | None:
        segment = _segment_size(size)
        if self.reserved + segment > limit:
            return None
        block = Block(self, self.top, segment, FREE)
        self.top += segment
        self.reserved += segment
        return block

    def give_back(self) -> None:
        for block in [b for b in self.blocks if b.before is None and b.after is None]:
            self.drop(block)
            self.reserved -= block.size


class _Range(Pool):
    """Memory from `cuMemMap`: one range of addresses, behind which pages are mapped and unmapped."""

    def __init__(self, *, small: bool) -> None:
        super().__init__(split_from=GRAIN)
        self.page = SMALL_SEGMENT if small else LARGE_SEGMENT
        self.unmapped = [Block(self, 0, ENDLESS, _UNMAPPED)]  # by address; always whole pages

    def take(self, size: int) -> Block | None:
        """As above, but a block that could still expand counts as large as it could become: it is kept for later."""
        blocks = self.blocks
        at = bisect_left(self.order, size << _SIZE_BITS)
        if at == len(blocks):
            return None
        while at + 1 < len(blocks) and _reach(blocks[at + 1]) < _reach(blocks[at]):
            at += 1
        del self.order[at]
        return blocks.pop(at)

    def grow(self, size: int, limit: int) -> Block | None:
        start = self._place(size)
        block = start if start.state == FREE else self._map(start, min(size, start.size), limit)
        while block is not None and block.size < size:
            hole = block.after
            assert hole is not None
            # what was mapped before a refusal stays, as a free block: the caller gives it back with the cache
            block = self._map(hole, min(size - block.size, hole.size), limit)
        if block is not None:
            self.drop(block)
        return block

    def _place(self, size: int) -> Block:
        """The first block of the lowest free addresses, mapped or not, that together hold `size`."""
        for hole in self.unmapped:
            before = hole.before
            start = before if before is not None and before.state == FREE else hole
            if _holds(start, size):
                return start
        raise AssertionError("the range is endless")

    def _map(self, hole: Block, size: int, limit: int) -> Block | None:
        """Put memory behind the first `size` bytes of a hole, in whole pages; the free block that this makes."""
        size = _round_up(size, self.page)
        if self.reserved + size > limit:
            return None
        at = self.unmapped.index(hole)
        # the rest of the hole takes its place
        self.unmapped[at : at + 1] = [hole.cut(size, _UNMAPPED)] if size < hole.size else []
        self.reserved += size
        return self.put(hole)

    def give_back(self) -> None:
        for block in list(self.blocks):
            start = _round_up(block.address, self.page)
            end = (block.address + block.size) // self.page * self.page
            if start < end:
                self._unmap(block, start, end)

    def _unmap(self, block: Block, start: int, end: int) -> None:
        """Take the pages from `start` to `end` from behind a free block; what is left on both sides stays free."""
        self.drop(block)
        self.reserved -= end - start
        if start > block.address:
            hole = block.cut(start - block.address, _UNMAPPED)
            self.add(block)
        else:
            hole = block
        if end < hole.address + hole.size:
            self.add(hole.cut(end - start, FREE))
        hole.state = _UNMAPPED
        self._enter(hole)

    def _enter(self, hole: Block) -> None:
        """Enter a hole among the others, as one with its neighbours."""
        after, before = hole.after, hole.before
        if after is not None and after.state == _UNMAPPED:
            self.unmapped.remove(after)
            hole.join()
        if before is not None and before.state == _UNMAPPED:
            before.join()
        else:
            self.unmapped.insert(bisect_left([h.address for h in self.unmapped], hole.address), hole)


class Allocator:
    """One GPU's allocator.

    Attributes:
        allocated: bytes in live blocks now. As PyTorch reports it, whole blocks count: a rest that is too small to be
            split off a large block (1 MiB or less, unless segments expand) is part of it.
        peak_allocated: the most that `allocated` was.
        peak_reserved: the most that `reserved` was.
        freed_on_limit: how often cached memory had to be given back because the budget was reached.
    """

    def __init__(self, *, budget: int | None = None, expandable: bool = False) -> None:
        """An empty allocator.

        Args:
            budget: the most bytes that may be reserved, which is what the driver would give; None: no limit.
            expandable: as with PYTORCH_ALLOC_CONF=expandable_segments:True.
        """
        kind = _Range if expandable else _Segments
        self._small: Pool = kind(small=True)
        self._large: Pool = kind(small=False)
        self._budget = ENDLESS if budget is None else budget
        self._live: dict[int, Block | None] = {}
        self.allocated = self.peak_allocated = self.peak_reserved = self.freed_on_limit = 0

    @property
    def reserved(self) -> int:
        """Bytes held from the driver now, in live blocks or cached."""
        return self._small.reserved + self._large.reserved

    def allocate(self, key: int, size: int) -> None:
        """Give the block `key` `size` bytes; 0 takes nothing.

        Raises:
            OutOfBudget: they do not fit. The block is not there then, the cache has been given back, and the allocator
                can be used on.
            ValueError: the key is in use, or the size is below 0.
        """
        if key in self._live or size < 0:
            raise ValueError(f"block {key} of {size} bytes: the key must be free and the size at least 0")
        if size == 0:
            self._live[key] = None
            return
        wanted = -(-size // GRAIN) * GRAIN
        pool = self._small if wanted <= SMALL else self._large
        block = pool.take(wanted)
        if block is None:
            block = self._grow(pool, wanted, size)
        if block.size - wanted >= pool.split_from:
            pool.add(block.cut(wanted, FREE))
        block.state = LIVE
        self._live[key] = block
        self.allocated += block.size
        if self.allocated > self.peak_allocated:
            self.peak_allocated = self.allocated

    def free(self, key: int) -> None:
        """Take the block `key` back into the cache.

        Raises:
            KeyError: no such block is live.
        """
        block = self._live.pop(key)
        if block is not None:
            self.allocated -= block.size
            block.pool.put(block)

    def empty_cache(self) -> None:
        """Give the driver all that no live block needs: whole free segments, or whole free pages."""
        self._large.give_back()
        self._small.give_back()

    def _grow(self, pool: Pool, wanted: int, asked: int) -> Block:
        """A block from new memory; if need be in exchange for the cache."""
        block = self._ask(pool, wanted)
        if block is not None:
            return block
        held = self.reserved
        self.empty_cache()
        self.freed_on_limit += self.reserved < held
        block = self._ask(pool, wanted)
        if block is None:
            raise OutOfBudget(asked, self.allocated, self.reserved)
        return block

    def _ask(self, pool: Pool, wanted: int) -> Block | None:
        """A block from new memory within the budget; None if there is none."""
        block = pool.grow(wanted, self._budget - self.reserved + pool.reserved)
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return block


def replay(events: Iterable[Event], *, budget: int | None = None, expandable: bool = False) -> Usage:
    """What the events take, from an empty allocator on.

    Args:
        events: (key, bytes); above 0 allocates the block, below 0 frees it (how far below does not matter), 0 does
            nothing unless the key is EMPTY_CACHE.
        budget: the most bytes that may be reserved; None: no limit.
        expandable: as with PYTORCH_ALLOC_CONF=expandable_segments:True.

    Raises:
        OutOfBudget: an allocation does not fit.
        KeyError: a block is freed that is not live.
        ValueError: a block is allocated that is live.
    """
    allocator = Allocator(budget=budget, expandable=expandable)
    allocate, free = allocator.allocate, allocator.free
    for key, size in events:
        if size > 0:
            allocate(key, size)
        elif size < 0:
            free(key)
        elif key == EMPTY_CACHE:
            allocator.empty_cache()
    return Usage(allocator.peak_allocated, allocator.peak_reserved, allocator.freed_on_limit)


def smallest_budget(events: Sequence[Event], *, expandable: bool = False, step: int = STEP) -> int:
    """The smallest budget in bytes, to within `step`, with which the events complete.

    Bisects the multiples of `step` between the peak of the bytes that the events ask for, below which nothing
    completes, and what they reserve without a limit: one replay for each halving. The events complete with the answer
    and fail with `step` less. More memory does not always help an allocator (it gives the cache back later, and then
    chooses other blocks), so a budget below a failing one may complete; such ones are not looked for.

    Args:
        events: as `replay` takes them; they are read several times.
        expandable: as with PYTORCH_ALLOC_CONF=expandable_segments:True.
        step: bytes, above 0. Reserved memory comes in steps of 2 MiB, so that less gains nothing.

    Raises:
        KeyError, ValueError: as `replay` does.
    """
    peak = replay(events, expandable=expandable).reserved
    fails, completes = (_live_peak(events) - 1) // step, -(-peak // step)
    while completes - fails > 1:
        middle = (fails + completes) // 2
        try:
            replay(events, budget=middle * step, expandable=expandable)
            completes = middle
        except OutOfBudget:
            fails = middle
    return min(completes * step, peak)


def _live_peak(events: Iterable[Event]) -> int:
    """The peak of bytes that the events ask for, in whole grains: less is never reserved, however blocks are chosen."""
    sizes: dict[int, int] = {}
    live = peak = 0
    for key, size in events:
        if size > 0:
            sizes[key] = _round_up(size, GRAIN)
            live += sizes[key]
            peak = max(peak, live)
        elif size < 0:
            live -= sizes.pop(key)
    return peak


def _segment_size(size: int) -> int:
    """Bytes asked of the driver for a block of `size`."""
    if size <= SMALL:
        return SMALL_SEGMENT
    return LARGE_SEGMENT if size < LARGE else _round_up(size, STEP)


def _reach(block: Block) -> int:
    """Bytes of a free block and of the hole after it."""
    after = block.after
    return block.size + (after.size if after is not None and after.state == _UNMAPPED else 0)


def _holds(block: Block | None, size: int) -> bool:
    """Whether `size` bytes fit from this block on, before a live one comes."""
    while size > 0 and block is not None and block.state != LIVE:
        size -= block.size
        block = block.after
    return size <= 0


def _round_up(size: int, grain: int) -> int:
    return -(-size // grain) * grain
