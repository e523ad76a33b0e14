"""Races: two processes on one run folder, or on one cache, started at the same moment or one a little later.

One of two that train wins and ends as the unbroken run; the other is refused. Who only reads gets what is whole.
"""

from __future__ import annotations

import time

from tortures.children import Trouble, end, fitune, start
from tortures.kinds import MAIN, Bench, Verdict, drawn, go_on, judged

PAIRS = (
    "train + train",
    "train + resume",
    "resume + resume",
    "train + chat",
    "resume + eval",
    "one cache",
    "merge + merge",
)


def case(bench: Bench, seed: int, number: int) -> tuple[str, Verdict]:
    """Two processes at once; see kills.case."""
    numbers, pair = drawn(seed, "race", number), PAIRS[number % len(PAIRS)]
    kind = MAIN[(number // len(PAIRS)) % len(MAIN)]
    kind = "lora" if pair == "merge + merge" else kind
    place = bench.root / "race" / str(number)
    run, other = place / "run", place / "other"
    new, go = bench.words(kind, run), ["train", "--resume", "--output", run]
    merge = ["merge", bench.finished(kind), "--output", run]
    first, second = {
        "train + train": (new, new),
        "train + resume": (new, go),
        "resume + resume": (go, go),
        "train + chat": (new, ["chat", run, "--max-new-tokens", 4]),
        "resume + eval": (go, ["eval", run, "--data", bench.data, "--loss-only", "--json"]),
        "one cache": (
            [*new, "--cache", place / "cache"],
            [*bench.words(kind, other), "--cache", place / "cache"],
        ),
        "merge + merge": (merge, merge),
    }[pair]
    if first is go:  # something to go on from
        marks = [at for at, event in enumerate(bench.unbroken(kind)["events"]) if "step-000002" in event]
        fitune(*new, place=place / "before", trouble=Trouble(run, kill_at=marks[-1] + 4))
    one = start(first, place / "first")
    wait = numbers.choice((0.0, 0.0, numbers.uniform(0, 2)))
    time.sleep(wait)
    two = start(second, place / "second", stdin="1 + 1?\n")
    ended = [end(one, place / "first"), end(two, place / "second")]
    case = f"{pair}, {kind}, {wait:.2f} s apart: exit codes {ended[0].code} and {ended[1].code}"
    for done in ended:
        if done.traceback:
            return case, Verdict("TRACEBACK", done.last())
    if pair == "merge + merge":
        return case, _merges(ended[0].code, ended[1].code)
    if pair == "one cache":
        both = [judged(bench, kind, folder, done) for folder, done in zip((run, other), ended, strict=True)]
        return case, next((v for v in both if v.result != "equal"), both[0])
    trains = [done for done, words in zip(ended, (first, second), strict=True) if words[0] == "train"]
    winners = [done for done in trains if done.code == 0]
    if len(trains) == 2 and len(winners) == 2 and wait == 0:
        finished = [done for done in trains if "finished" in done.out + done.err]
        if not finished and pair != "resume + resume":
            return case, Verdict("SILENT", "both trained one folder")
    if not winners:
        last, how = go_on(bench, kind, run, place)
        return f"{case}, {how}", judged(bench, kind, run, last)
    return case, judged(bench, kind, run, winners[0])


def _merges(first: int, second: int) -> Verdict:
    if 0 not in (first, second):
        return Verdict("DEAD END", "neither wrote the merged model")
    return Verdict("equal")
