"""The simulated caching allocator: each rule by hand, against a plain rewrite, in general, and against a real GPU."""

from __future__ import annotations

import inspect
import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fitune.memory.allocator import EMPTY_CACHE, Allocator, Event, OutOfBudget, Usage, replay, smallest_budget

pytestmark = pytest.mark.unit

KIB, MIB = 2**10, 2**20
BOTH = pytest.mark.parametrize("expandable", [False, True])


def filled(*sizes: int, budget: int | None = None, expandable: bool = False) -> Allocator:
    """An allocator with the blocks 0, 1, ... of these bytes."""
    made = Allocator(budget=budget, expandable=expandable)
    for key, size in enumerate(sizes):
        made.allocate(key, size)
    return made


def after(made: Allocator, *, free: tuple[int, ...] = (), empty: bool = False, then: tuple[int, ...] = ()) -> int:
    """What is reserved, in MiB, once these blocks are freed, the cache is emptied, and blocks 100, ... are made."""
    for key in free:
        made.free(key)
    if empty:
        made.empty_cache()
    for key, size in enumerate(then, start=100):
        made.allocate(key, size)
    return made.reserved // MIB


# Sizes


@BOTH
@pytest.mark.parametrize(("asked", "held"), [(0, 0), (1, 512), (512, 512), (513, 1024), (MIB - 1, MIB)])
def test_sizes_are_whole_grains(asked: int, held: int, expandable: bool) -> None:
    assert filled(asked, expandable=expandable).allocated == held


@BOTH
def test_no_bytes_take_nothing_and_can_be_freed(expandable: bool) -> None:
    made = filled(0, expandable=expandable)
    made.free(0)
    assert (made.allocated, made.reserved, made.peak_reserved) == (0, 0, 0)


@pytest.mark.parametrize(
    ("asked", "segment"),
    [
        (1, 2),
        (MIB, 2),
        (MIB + 1, 20),
        (10 * MIB - 512, 20),
        (10 * MIB - 511, 10),  # a whole 10 MiB once it is rounded
        (10 * MIB, 10),
        (10 * MIB + 1, 12),
        (33 * MIB, 34),
    ],
)
def test_segments(asked: int, segment: int) -> None:
    assert filled(asked).reserved == segment * MIB


@pytest.mark.parametrize(
    ("asked", "pages"), [(1, 2), (MIB, 2), (MIB + 1, 20), (20 * MIB, 20), (20 * MIB + 1, 40), (50 * MIB, 60)]
)
def test_pages_of_an_expandable_range(asked: int, pages: int) -> None:
    assert filled(asked, expandable=True).reserved == pages * MIB


@BOTH
def test_the_pools_are_apart(expandable: bool) -> None:
    """20 MiB lie free, but a small block does not go there; nor a large one into the small pool."""
    assert after(filled(5 * MIB, expandable=expandable), free=(0,), then=(MIB,)) == 22
    assert after(filled(MIB, expandable=expandable), free=(0,), then=(MIB + 512,)) == 22


# Choosing, splitting, joining


def test_the_best_fit_is_taken_not_the_first() -> None:
    """The first free block would hold 30 MiB too, and then 40 MiB would have to be new: 110."""
    assert after(filled(40 * MIB, 30 * MIB), free=(0, 1), then=(30 * MIB, 40 * MIB)) == 70


def test_among_equals_the_lowest_address_is_taken() -> None:
    """Of four blocks in 2 MiB the outer ones are free. From the first one on, freeing the third leaves 1 MiB at the
    end; had the last one been taken, no two free blocks would touch, and it would be 4."""
    made = filled(*[512 * KIB] * 4)
    assert after(made, free=(0, 3), then=(512 * KIB,)) == 2
    made.free(2)
    made.allocate(200, MIB)
    assert made.reserved == 2 * MIB


def test_a_small_block_leaves_a_rest_of_512_bytes() -> None:
    assert filled(MIB, MIB - 512, 512).reserved == 2 * MIB


def test_a_large_block_keeps_a_rest_of_1_mib() -> None:
    """11 MiB in a segment of 12: the rest is part of the block, and counts as allocated, as PyTorch reports it."""
    made = filled(11 * MIB)
    assert (made.allocated, made.reserved) == (12 * MIB, 12 * MIB)
    assert after(made, free=(0,)) == 12
    assert made.allocated == 0


def test_a_large_block_leaves_a_rest_above_1_mib() -> None:
    made = filled(11 * MIB - 512, MIB + 512)
    assert (made.allocated, made.reserved) == (12 * MIB, 12 * MIB)
    assert made.peak_allocated == 12 * MIB


def test_where_segments_expand_every_rest_is_left() -> None:
    made = filled(20 * MIB - 512, expandable=True)
    assert (made.allocated, made.reserved) == (20 * MIB - 512, 20 * MIB)
    made = filled(15 * MIB, 5 * MIB - 512, expandable=True)
    assert (made.allocated, made.reserved) == (20 * MIB - 512, 20 * MIB)


@BOTH
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (0, 2, 1, 3), (1, 3, 0, 2)])
def test_free_neighbours_become_one(order: tuple[int, ...], expandable: bool) -> None:
    """Four times 5 MiB in one segment, freed in whatever order: 20 MiB fit there again. Apart, it would be 40."""
    assert after(filled(*[5 * MIB] * 4, expandable=expandable), free=order, then=(20 * MIB,)) == 20


def test_blocks_of_two_segments_stay_apart_and_those_of_a_range_do_not() -> None:
    assert after(filled(10 * MIB, 10 * MIB), free=(0, 1), then=(20 * MIB,)) == 40
    assert after(filled(20 * MIB, 20 * MIB, expandable=True), free=(0, 1), then=(40 * MIB,)) == 40


# The budget


def test_at_the_limit_the_cache_is_given_back() -> None:
    """30 MiB lie free and 40 are wanted of 50: without giving back it would fail."""
    made = filled(30 * MIB, budget=50 * MIB)
    assert after(made, free=(0,), then=(40 * MIB,)) == 40
    assert (made.peak_reserved, made.freed_on_limit) == (40 * MIB, 1)


def test_at_the_limit_both_pools_give_back() -> None:
    """2 MiB of the small pool are what is missing."""
    made = filled(MIB, budget=40 * MIB)
    assert after(made, free=(0,), then=(40 * MIB,)) == 40
    assert made.freed_on_limit == 1


def test_a_segment_with_a_live_block_is_not_given_back() -> None:
    made = filled(5 * MIB, budget=50 * MIB)
    with pytest.raises(OutOfBudget, match="do not fit") as refused:
        made.allocate(1, 40 * MIB - 1)
    error = refused.value
    assert (error.wanted, error.allocated, error.reserved) == (40 * MIB - 1, 5 * MIB, 20 * MIB)
    assert made.freed_on_limit == 0


@BOTH
def test_after_a_refusal_it_goes_on(expandable: bool) -> None:
    made = filled(20 * MIB, 20 * MIB, budget=40 * MIB, expandable=expandable)
    with pytest.raises(OutOfBudget):
        made.allocate(2, 20 * MIB)
    made.free(0)
    made.allocate(2, 20 * MIB)
    assert (made.allocated, made.reserved) == (40 * MIB, 40 * MIB)


@BOTH
def test_the_budget_itself_may_be_reserved(expandable: bool) -> None:
    assert filled(20 * MIB, budget=20 * MIB, expandable=expandable).reserved == 20 * MIB
    with pytest.raises(OutOfBudget):
        filled(20 * MIB, budget=20 * MIB - 1, expandable=expandable)


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
def test_emptying_the_cache_keeps_segments_in_use(kept: int) -> None:
    others = tuple({0, 1, 2, 3} - {kept})
    assert after(filled(*[5 * MIB] * 4, 30 * MIB, MIB), free=(*others, 4, 5), empty=True) == 20


# Expandable ranges


def test_the_free_end_of_a_range_is_extended() -> None:
    """30 MiB in 40; 10 of the next 25 lie at the end already, and one page is added. Beside it, it would be 80."""
    assert filled(30 * MIB, 25 * MIB, expandable=True).reserved == 60 * MIB


def test_a_growing_block_does_not_fragment_a_range() -> None:
    """30, then 40, then 50 MiB: each needs a new segment, while a range grows to the largest."""
    events = [(0, 30 * MIB), (0, -1), (1, 40 * MIB), (1, -1), (2, 50 * MIB), (2, -1)]
    assert replay(events) == Usage(50 * MIB, 120 * MIB, 0)
    assert replay(events, expandable=True) == Usage(50 * MIB, 60 * MIB, 0)


def test_fragments_that_segments_die_of_and_a_range_does_not() -> None:
    """Four times 30 MiB come and go, and 19 stay: every segment keeps 11 MiB free, of no use to the last 40. In a range
    the free bytes are one piece at the end: 76 are live, and 40 more end at 116."""
    events: list[Event] = []
    for key in range(0, 8, 2):
        events += [(key, 30 * MIB), (key, -1), (key + 1, 19 * MIB)]
    events.append((100, 40 * MIB))
    assert replay(events).reserved == 160 * MIB
    with pytest.raises(OutOfBudget) as refused:
        replay(events, budget=158 * MIB)
    assert (refused.value.allocated, refused.value.reserved) == (76 * MIB, 120 * MIB)
    assert replay(events, budget=120 * MIB, expandable=True) == Usage(116 * MIB, 120 * MIB, 0)


def test_the_end_of_a_range_is_kept_for_what_can_extend_it() -> None:
    """0-30 is free, 30-45 live, and 15 MiB are free at the end. 12 MiB fit the end best, but it can still grow: they
    go to the front. Then 35 MiB need one page more; had they gone to the end, two (100)."""
    made = filled(30 * MIB, 10 * MIB, 5 * MIB, expandable=True)
    assert after(made, free=(0,), then=(12 * MIB, 35 * MIB)) == 80


@pytest.mark.parametrize(("hole", "beside"), [(0, 1), (1, 0)])
def test_a_hole_is_mapped_again_with_its_free_neighbour(hole: int, beside: int) -> None:
    """Three blocks of a page each; one is unmapped, then one beside it is freed. 40 MiB need 20 there; at the end, it
    would be 80."""
    made = filled(*[20 * MIB] * 3, expandable=True)
    assert after(made, free=(hole,), empty=True) == 40
    assert after(made, free=(beside,), then=(40 * MIB,)) == 60


def test_a_hole_too_small_is_passed_over() -> None:
    made = filled(*[20 * MIB] * 3, expandable=True)
    assert after(made, free=(0,), empty=True, then=(40 * MIB,)) == 80
    made.allocate(200, 20 * MIB)
    assert made.reserved == 100 * MIB  # and is still there for what it holds


@pytest.mark.parametrize("order", [(2, 3), (3, 2)])
def test_neighbouring_holes_become_one(order: tuple[int, int]) -> None:
    """Free are 8-20, with the holes 20-40 and 40-60 after it, and 65-100. As far as the first could grow it has 52 MiB,
    so that 12 MiB go to the second. Then 35 MiB need two pages in the holes; were they two, none (80)."""
    made = filled(8 * MIB, 12 * MIB, 20 * MIB, 20 * MIB, 5 * MIB, 35 * MIB, 20 * MIB, expandable=True)
    assert after(made, free=order[:1], empty=True) == 100
    assert after(made, free=order[1:], empty=True) == 80
    assert after(made, free=(1, 5), then=(12 * MIB, 35 * MIB)) == 120


def test_only_whole_pages_are_unmapped() -> None:
    """The free block from 10 to 50 MiB covers one page, 20 to 40; the 10 MiB on both sides stay and can be used."""
    made = filled(10 * MIB, 40 * MIB, 10 * MIB, expandable=True)
    assert after(made, free=(1,), empty=True) == 40
    assert after(made, then=(10 * MIB, 10 * MIB)) == 40
    assert after(made, free=(100, 101), then=(40 * MIB,)) == 60


def test_at_the_limit_whole_pages_are_unmapped() -> None:
    """A page lies free in front, and 40 MiB at the end would make 100."""
    made = filled(*[20 * MIB] * 3, budget=80 * MIB, expandable=True)
    assert after(made, free=(0,), then=(40 * MIB,)) == 80
    assert (made.peak_reserved, made.freed_on_limit) == (80 * MIB, 1)
    made = filled(*[20 * MIB] * 3, budget=78 * MIB, expandable=True)
    with pytest.raises(OutOfBudget):
        after(made, free=(0,), then=(40 * MIB,))


# Events


def test_events() -> None:
    events = [(0, 40 * MIB), (0, -5), (EMPTY_CACHE, 0), (1, 30 * MIB), (2, 0), (2, 0), (1, -1)]
    assert replay(events) == Usage(40 * MIB, 40 * MIB, 0)
    assert replay(iter(events[3:] + events[:2])) == Usage(40 * MIB, 70 * MIB, 0)
    assert replay(events[3:] + events[:2], budget=69 * MIB) == Usage(40 * MIB, 40 * MIB, 1)
    assert replay([]) == Usage(0, 0, 0)


@BOTH
def test_keys_are_live_once(expandable: bool) -> None:
    with pytest.raises(ValueError, match="block 0"):
        replay([(0, 1), (0, 1)], expandable=expandable)
    with pytest.raises(KeyError):
        replay([(0, 1), (0, -1), (0, -1)], expandable=expandable)
    with pytest.raises(ValueError, match="at least 0"):
        Allocator(expandable=expandable).allocate(0, -1)


def test_the_smallest_budget() -> None:
    """The first block must be given back for the second: 40 MiB do, 70 are taken where there is no limit."""
    events = [(0, 30 * MIB), (0, -1), (1, 40 * MIB)]
    assert smallest_budget(events) == 40 * MIB
    assert smallest_budget(events, step=16 * MIB) == 48 * MIB
    assert smallest_budget(events, step=512 * MIB) == 70 * MIB  # never more than without a limit
    assert smallest_budget([]) == 0
    # 5 MiB in use hold a segment of 20, so that the peak of allocated bytes is not enough
    assert smallest_budget([(0, 5 * MIB), (1, 5 * MIB), (1, -1), (2, 40 * MIB)]) == 60 * MIB
    assert smallest_budget([(0, 5 * MIB), (1, 15 * MIB), (1, -1), (2, 55 * MIB)], expandable=True) == 60 * MIB


# A plain rewrite

HOLE = "hole"
Piece = list  # [bytes, who has it: a key, None (free) or HOLE]


class Plain:
    """The same rules over plain lists, searched from end to end."""

    def __init__(self, budget: int, expandable: bool) -> None:
        self.budget, self.expandable = budget, expandable
        self.pools: list[list[list[Piece]]] = [[[[2**60, HOLE]]] if expandable else [] for _ in range(2)]

    def total(self, counts: Callable[[object], bool]) -> int:
        return sum(size for pool in self.pools for pieces in pool for size, who in pieces if counts(who))

    def reserved(self) -> int:
        return self.total(lambda who: who is not HOLE)

    def allocated(self) -> int:
        return self.total(lambda who: who is not HOLE and who is not None)

    def allocate(self, key: int, size: int) -> bool:
        wanted = -(-size // 512) * 512
        large = wanted > MIB
        grow = self.extend if self.expandable else self.add
        found = self.find(self.pools[large], wanted) or grow(large, wanted)
        if not found:
            self.empty()
            found = grow(large, wanted)
        if not found:
            return False
        pieces, at = found
        rest = pieces[at][0] - wanted
        if rest > (MIB if large and not self.expandable else 0):
            pieces[at : at + 1] = [[wanted, key], [rest, None]]
        else:
            pieces[at][1] = key
        return True

    def find(self, pool: list[list[Piece]], wanted: int) -> tuple[list[Piece], int] | None:
        fits = sorted(
            (size, order, at)
            for order, pieces in enumerate(pool)
            for at, (size, who) in enumerate(pieces)
            if who is None and size >= wanted
        )
        if not fits:
            return None

        def reach(fit: tuple[int, int, int]) -> int:
            size, order, at = fit
            after = pool[order][at + 1 : at + 2]
            return size + sum(more for more, who in after if who is HOLE)

        best = 0
        while best + 1 < len(fits) and self.expandable and reach(fits[best + 1]) < reach(fits[best]):
            best += 1
        _, order, at = fits[best]
        return pool[order], at

    def add(self, large: bool, wanted: int) -> tuple[list[Piece], int] | None:
        segment = 2 * MIB if not large else 20 * MIB if wanted < 10 * MIB else -(-wanted // (2 * MIB)) * 2 * MIB
        if self.reserved() + segment > self.budget:
            return None
        self.pools[large].append([[segment, None]])
        return self.pools[large][-1], 0

    def extend(self, large: bool, wanted: int) -> tuple[list[Piece], int] | None:
        (pieces,), page = self.pools[large], 20 * MIB if large else 2 * MIB
        start = at = min(begin for hole in range(len(pieces)) for begin in self.room(pieces, hole, wanted))
        while wanted > 0:
            size, who = pieces[at]
            if who is HOLE:
                size = min(size, -(-wanted // page) * page)
                if self.reserved() + size > self.budget:
                    tidy(pieces)
                    return None
                pieces[at : at + 1] = [[size, None], [pieces[at][0] - size, HOLE]]
            wanted -= size
            at += 1
            if who is HOLE and pieces[at][0] == 0:
                del pieces[at]
        tidy(pieces)
        return pieces, start

    def room(self, pieces: list[Piece], hole: int, wanted: int) -> list[int]:
        """Where a block begins that fills this hole and what is free around it; nowhere if it does not fit."""
        if pieces[hole][1] is not HOLE:
            return []
        start = hole - 1 if hole and pieces[hole - 1][1] is None else hole
        total = 0
        for size, who in pieces[start:]:
            if who is not HOLE and who is not None:
                break
            total += size
        return [start] if total >= wanted else []

    def free(self, key: int) -> None:
        for pool in self.pools:
            for pieces in pool:
                for piece in pieces:
                    if piece[1] == key:
                        piece[1] = None
                tidy(pieces)

    def empty(self) -> None:
        if not self.expandable:
            self.pools = [
                [pieces for pieces in pool if len(pieces) > 1 or pieces[0][1] is not None] for pool in self.pools
            ]
            return
        for pool, page in zip(self.pools, (2 * MIB, 20 * MIB), strict=True):
            address, made = 0, []
            for size, who in pool[0]:
                first, last = -(-address // page) * page, (address + size) // page * page
                if who is None and first < last:
                    parts = [[first - address, None], [last - first, HOLE], [address + size - last, None]]
                    made += [part for part in parts if part[0]]
                else:
                    made.append([size, who])
                address += size
            pool[0] = made
            tidy(made)


def tidy(pieces: list[Piece]) -> None:
    """Join neighbours that are both free, or both holes."""
    for at in range(len(pieces) - 1, 0, -1):
        if pieces[at][1] is pieces[at - 1][1] and pieces[at][1] in (None, HOLE):
            pieces[at - 1][0] += pieces.pop(at)[0]


SIZES = st.one_of(
    st.integers(1, 3 * MIB),
    st.integers(1, 64 * MIB),
    st.sampled_from([512, 512 * KIB, MIB, MIB + 1, 5 * MIB, 10 * MIB, 11 * MIB, 20 * MIB, 40 * MIB]),
)


@st.composite
def traces(draw: st.DrawFn) -> list[Event]:
    """Events in which blocks live for a while; a few are still live at the end."""
    events: list[Event] = []
    live: list[int] = []
    for key, (size, act) in enumerate(draw(st.lists(st.tuples(SIZES, st.integers(0, 99)), min_size=10, max_size=40))):
        if act < 5:
            events.append((EMPTY_CACHE, 0))
        elif act < 50 and live:
            events.append((live.pop(act % len(live)), -1))
        else:
            events.append((key, size))
            live.append(key)
    return events


def completes(events: list[Event], budget: int, expandable: bool) -> bool:
    try:
        replay(events, budget=budget, expandable=expandable)
    except OutOfBudget:
        return False
    return True


@BOTH
@given(events=traces(), budget=st.integers(0, 600).map(lambda mib: mib * MIB))
def test_it_does_what_the_plain_rewrite_does(events: list[Event], budget: int, expandable: bool) -> None:
    """At every event, also after refusals: a block that was refused is not there to be freed."""
    made, plain = Allocator(budget=budget, expandable=expandable), Plain(budget, expandable)
    refused = set()
    for key, size in events:
        if key == EMPTY_CACHE:
            made.empty_cache()
            plain.empty()
        elif size < 0 and key not in refused:
            made.free(key)
            plain.free(key)
        elif size > 0:
            given_ = plain.allocate(key, size)
            try:
                made.allocate(key, size)
            except OutOfBudget:
                refused.add(key)
            assert (key not in refused) == given_
        assert (made.allocated, made.reserved) == (plain.allocated(), plain.reserved())


# Properties


@BOTH
@given(events=traces())
def test_what_always_holds(events: list[Event], expandable: bool) -> None:
    made = Allocator(expandable=expandable)
    live: dict[int, int] = {}
    for key, size in events:
        if size > 0:
            made.allocate(key, size)
            live[key] = -(-size // 512) * 512
        elif size < 0:
            made.free(key)
            del live[key]
        else:
            made.empty_cache()
        assert made.reserved >= made.allocated
        assert made.reserved % (2 * MIB) == 0
        # where segments do not expand, a large block may keep a rest of up to 1 MiB
        spare = 0 if expandable else sum(MIB for size in live.values() if size > MIB)
        assert 0 <= made.allocated - sum(live.values()) <= spare
    for key in live:
        made.free(key)
    made.empty_cache()
    assert (made.allocated, made.reserved) == (0, 0)
    assert made.peak_reserved >= made.peak_allocated
    assert made.freed_on_limit == 0


@BOTH
@given(events=traces())
def test_what_was_reserved_is_budget_enough(events: list[Event], expandable: bool) -> None:
    usage = replay(events, expandable=expandable)
    assert replay(events, budget=usage.reserved, expandable=expandable) == usage


@given(events=traces())
def test_small_blocks_are_allocated_alike_in_segments_and_ranges(events: list[Event]) -> None:
    small = [(key, min(size, MIB)) for key, size in events]
    assert replay(small).allocated == replay(small, expandable=True).allocated
    assert replay(events).allocated >= replay(events, expandable=True).allocated


@BOTH
@given(events=traces())
def test_the_smallest_budget_completes_and_a_step_less_does_not(events: list[Event], expandable: bool) -> None:
    least = smallest_budget(events, expandable=expandable)
    assert completes(events, least, expandable)
    assert least == 0 or not completes(events, least - 2 * MIB, expandable)
    assert replay(events, expandable=True).allocated <= least <= replay(events, expandable=expandable).reserved


# The real one


def replayed(events: list[Event], cuda: Any) -> list[tuple[int, int]]:
    """Bytes allocated and reserved after each event, by torch's own allocator."""
    blocks, found = {}, []
    for key, size in events:
        if size > 0:
            blocks[key] = cuda.caching_allocator_alloc(size)
        elif size < 0:
            cuda.caching_allocator_delete(blocks.pop(key))
        else:
            cuda.empty_cache()
        found.append((cuda.memory_allocated(), cuda.memory_reserved()))
    return found


ON_THE_GPU = f"""
from __future__ import annotations
import json, sys, torch
{inspect.getsource(replayed)}
print(json.dumps(replayed(json.load(sys.stdin), torch.cuda)))
"""


def random_events(count: int, seed: int) -> list[Event]:
    """Sizes of all kinds, up to 40 blocks at a time (under 1 GiB), and now and then an emptied cache.

    The sizes are random to the byte, so that free blocks are hardly ever equal: there the driver's addresses decide.
    """
    draw = random.Random(seed)
    events: list[Event] = []
    live: list[int] = []
    for key in range(count):
        if draw.random() < 0.01:
            events.append((EMPTY_CACHE, 0))
        elif live and (len(live) == 40 or draw.random() < 0.45):
            events.append((live.pop(draw.randrange(len(live))), -1))
        else:
            low, high = draw.choice([(1, MIB), (MIB, 10 * MIB), (10 * MIB, 50 * MIB)])
            events.append((key, draw.randint(low, high)))
            live.append(key)
    return events


class Simulated:
    """Looks like torch.cuda, and is the simulation."""

    def __init__(self, expandable: bool) -> None:
        self.made, self.keys = Allocator(expandable=expandable), itertools.count()

    def caching_allocator_alloc(self, size: int) -> int:
        key = next(self.keys)
        self.made.allocate(key, size)
        return key

    def caching_allocator_delete(self, key: int) -> None:
        self.made.free(key)

    def empty_cache(self) -> None:
        self.made.empty_cache()

    def memory_allocated(self) -> int:
        return self.made.allocated

    def memory_reserved(self) -> int:
        return self.made.reserved


def on_the_gpu(events: list[Event], *, expandable: bool) -> list[tuple[int, int]]:
    """In a process of its own: nothing else is allocated there, and how segments grow is set when it starts."""
    run = subprocess.run(
        [sys.executable, "-c", ON_THE_GPU],
        input=json.dumps(events),
        env={**os.environ, "PYTORCH_ALLOC_CONF": f"expandable_segments:{expandable}"},
        capture_output=True,
        text=True,
        check=True,
    )
    return [(allocated, reserved) for allocated, reserved in json.loads(run.stdout)]


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@BOTH
def test_the_real_allocator_reserves_the_same(expandable: bool, where: str) -> None:
    """Without a GPU the simulation stands in for torch.cuda: that shows that the replay works."""
    events = random_events(2000, seed=0)
    if where == "cuda":
        found = on_the_gpu(events, expandable=expandable)
    else:
        compile(ON_THE_GPU, "on the GPU", "exec")
        found = replayed(events, Simulated(expandable))
    made = Allocator(expandable=expandable)
    for at, ((key, size), there) in enumerate(zip(events, found, strict=True)):
        if size > 0:
            made.allocate(key, size)
        elif size < 0:
            made.free(key)
        else:
            made.empty_cache()
        assert (made.allocated, made.reserved) == there, f"event {at}: {key}, {size}"
