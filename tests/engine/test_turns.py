"""Turns at a model: in the order in which threads came, and given to those who wait."""

from __future__ import annotations

import threading

import pytest

from fitune.engine.turns import Turns

pytestmark = pytest.mark.unit


def test_those_who_wait_go_first_and_nobody_goes_beside_another() -> None:
    turns, seen, inside = Turns(), list[str](), list[str]()

    def work(name: str) -> None:
        with turns:
            for _ in range(4):
                inside.append(name)
                assert inside == [name]
                seen.append(name)
                inside.remove(name)
                if turns.wanted:
                    turns.give()

    threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
    with turns:
        assert not turns.wanted
        for number, thread in enumerate(threads, 1):
            thread.start()
            while len(turns._queue) <= number:
                pass
        assert turns.wanted
    for thread in threads:
        thread.join(10)
    assert "".join(seen) == "abc" * 4


def test_the_turn_goes_on_after_an_error() -> None:
    turns = Turns()
    with pytest.raises(ValueError, match="x"), turns:
        raise ValueError("x")
    with turns:
        turns.give()  # nobody waits: goes on at once
        assert not turns.wanted
