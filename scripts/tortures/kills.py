"""Kills: a real SIGKILL of a real process at a place drawn from those where it touches its files, or after a time.

A killed run goes on as its user would let it, perhaps to be killed again; its end is compared with the unbroken run's,
bit for bit, and its folder with that run's list of files. Half of the places lie inside a save.
"""

from __future__ import annotations

import signal
from pathlib import Path

from tortures.children import Trouble, fitune
from tortures.kinds import KINDS, Bench, Verdict, drawn, go_on, judged

SAVING = ("/checkpoints/", "/.tmp-", ".tmp-")


def inside_a_save(event: str) -> bool:
    """Does this event belong to a checkpoint or another folder that is written beside its place?"""
    return "/checkpoints/" in event or ".tmp-adapter" in event


def kinds_of(cases: int) -> list[str]:
    """The kinds that so many cases are drawn from."""
    return list(KINDS)[: max(2, min(len(KINDS), cases // 3 or 2))]


def case(bench: Bench, seed: int, number: int, kinds: list[str]) -> tuple[str, Verdict]:
    """Kill a run and let it go on.

    Args:
        bench: models, data, unbroken runs.
        seed, number: decide everything.
        kinds: of methods; case n takes the n-th.

    Returns:
        What was done, in a few words, and what became of it.
    """
    numbers, kind = drawn(seed, "kill", number), kinds[number % len(kinds)]
    place = bench.root / "kill" / str(number)
    run, unbroken = place / "run", bench.unbroken(kind)
    events = [event.replace(str(bench.finished(kind)), str(run)) for event in unbroken["events"]]
    saves = [at for at, event in enumerate(events) if inside_a_save(event)]
    done, inside, command = [], False, bench.words(kind, run)
    for again in range(numbers.choice((1, 1, 2))):
        way = numbers.random()
        if way < 0.2 and not again:
            trouble = Trouble(run, kill_after=numbers.uniform(0.1, 1.2) * float(unbroken["cpu"]))
            done.append(f"after {trouble.kill_after:.2f} s")
        else:
            at = numbers.choice(saves) if way < 0.65 else numbers.randrange(len(events))
            trouble = Trouble(run, kill_at=at)
            inside |= at in saves and not again
            done.append(f"at event {at} ({_short(events[at], run)})")
        ended = fitune(*command, place=place, trouble=trouble)
        command = ["train", "--resume", "--output", run]
        if ended.code == 0:
            break  # it was through before
        if ended.code != -signal.SIGKILL:
            if ended.traceback:
                return _case(kind, done, inside), Verdict("TRACEBACK", ended.last())
            command = bench.words(kind, run)  # what --resume refuses, the same command must do
    ended, how = go_on(bench, kind, run, place)
    return f"{_case(kind, done, inside)}, {how}", judged(bench, kind, run, ended)


def _case(kind: str, done: list[str], inside: bool) -> str:
    return f"{kind} {'inside a save ' if inside else ''}{' and '.join(done)}"


def _short(event: str, run: Path) -> str:
    return event.replace(str(run), "RUN")
