"""glibc's heap on paper: holes between tensors, and when a plan has them."""

from __future__ import annotations

import pytest

from fitune.core import processor
from fitune.memory import heap
from fitune.memory.heap import MAPPED, TAKEN, Heap, holes

MIB = 2**20
OLD = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"}


def test_a_freed_block_is_used_again_unless_its_ends_are_taken() -> None:
    tops = []
    for share in (0.0, 1.0):
        made = Heap(share)
        made.allocate(0, MIB)
        made.allocate(1, MIB)
        before = made.top
        made.free(0)
        made.allocate(2, MIB)
        tops.append(made.top - before)
    assert tops[0] == 0
    assert tops[1] > MIB  # glibc's bug 30723: the hole is 96 bytes too small


def test_neighbours_become_one_when_the_small_objects_are_gone() -> None:
    made = Heap(1.0)
    for key in range(3):
        made.allocate(key, MIB)
    before = made.top
    made.free(0)
    made.free(1)
    made.free_ends()
    made.allocate(3, 2 * MIB)
    assert made.top == before


def layers(count: int, size: int) -> list[tuple[int, int]]:
    """Events of a forward pass: of five blocks of a layer one stays; at the end all go."""
    events: list[tuple[int, int]] = []
    for layer in range(count):
        keys = range(5 * layer, 5 * layer + 5)
        events += [(key, size) for key in keys]
        events += [(key, -size) for key in keys[:4]]
    return events + [(5 * layer + 4, -size) for layer in range(count)]


def test_holes_grow_with_the_share_of_ends_that_are_taken() -> None:
    """Of the 54 MiB that are in use: hardly any where all is merged, four blocks a layer where nothing is."""
    events = layers(50, MIB)
    none, some, many, all_of_them = (holes(events, [], share) / MIB for share in (0.0, TAKEN[True], TAKEN[False], 1.0))
    assert none < 1
    assert none < some < many < all_of_them
    assert all_of_them == pytest.approx(4 * 49, rel=0.05)


def test_holes_of_a_step_are_gone_in_the_next() -> None:
    """Small objects live until the update: two steps take no more than one."""
    events = layers(50, MIB)
    again = [(key + 1000, size) for key, size in events]
    one, two = (holes(which, [(len(events), "update", "")], 1.0) for which in (events, events + again))
    assert two == one
    assert holes(events + again, [], 1.0) > one  # without the update they would


def test_a_backward_pass_leaves_no_small_objects() -> None:
    """Blocks that are recomputed there leave no holes, as many as there are."""
    events = layers(50, MIB)
    assert holes(events, [(0, "step", "backward")], 1.0) < MIB
    assert holes(events, [(0, "step", "forward")], 1.0) > 100 * MIB


def test_blocks_that_are_mapped_by_themselves_leave_no_holes() -> None:
    assert holes(layers(10, MAPPED), [], 1.0) == 0


@pytest.mark.parametrize(
    ("given", "version", "expected"),
    [
        ({}, (2, 36), TAKEN[False]),
        (OLD, (2, 36), TAKEN[True]),
        ({}, (2, 39), TAKEN[True]),
        ({"GLIBC_TUNABLES": "glibc.malloc.arena_max=1"}, (2, 36), TAKEN[False]),
        ({"MALLOC_MMAP_THRESHOLD_": "131072"}, (2, 36), None),
        ({"LD_PRELOAD": "libjemalloc.so.2"}, (2, 41), None),
        ({}, None, None),
    ],
)
def test_holes_depend_on_the_allocator(
    given: dict[str, str], version: tuple[int, int] | None, expected: float | None
) -> None:
    assert heap.taken(given, version) == expected


def test_what_a_process_holds_between_its_tensors_follows_its_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    found = []
    for version in ((2, 36), (2, 39), None):
        monkeypatch.setattr(processor, "glibc", lambda version=version: version)
        found.append(heap.beside(layers(50, MIB), []).get(heap.HOLES, 0))
    assert found[0] > found[1] > found[2] == 0
