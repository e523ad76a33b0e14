"""Malformed inputs: whatever a user, or the internet, hands over ends in one message and exit code 2, soon.

Every second case is a file of rows (scripts/broken_inputs.py), the others are a model's folder or an adapter with one
file damaged (scripts/broken_folders.py). What is taken all the same must do no harm: exit code 0, in time.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import broken_folders
import broken_inputs
from tortures.children import MOST_CPU, MOST_MIB, Ran, fitune
from tortures.kinds import Bench, Verdict, drawn


def case(bench: Bench, seed: int, number: int) -> tuple[str, Verdict]:
    """One malformed input; see kills.case."""
    place = bench.root / "input" / str(number)
    place.mkdir(parents=True)
    made = _rows if number % 2 == 0 else _folder
    try:
        case, ended, verdict = made(bench, seed, number, place)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    if ended.traceback:
        return case, Verdict("TRACEBACK", ended.last())
    if ended.cpu > MOST_CPU or ended.mib > MOST_MIB:
        return case, Verdict("SLOW", f"{ended.cpu:.0f} s, {ended.mib:,.0f} MiB")
    return case, verdict


def _rows(bench: Bench, seed: int, number: int, place: Path) -> tuple[str, Ran, Verdict]:
    one = broken_inputs.CASES[(number // 2 + 37 * (seed - 1)) % len(broken_inputs.CASES)]
    path = place / one.name
    one.make(path)
    whole = one.good is not None and not one.bad
    words: list[object] = ["--model", bench.model("llama"), "--data", path]
    words = ["inspect", *words] if whole else ["train", *words, "--output", place / "run"]
    ended = fitune(*words, place=place / "said")
    case = f"{one.name}: exit code {ended.code}"
    if whole:
        good = ended.code == 0
        return case, ended, Verdict("equal") if good else Verdict("SILENT", f"refused, and it is good: {ended.last()}")
    if ended.code == 0:
        return case, ended, Verdict("SILENT", "taken as if it were whole")
    named = one.says in ended.err
    return case, ended, Verdict("refused" if named else "SILENT", ended.last())


def _folder(bench: Bench, seed: int, number: int, place: Path) -> tuple[str, Ran, Verdict]:
    numbers = drawn(seed, "input", number)
    what = numbers.choice(("model", "model", "adapter"))
    source = bench.model("llama") if what == "model" else bench.finished("lora") / "adapter"
    (damage,) = broken_folders.draw(source, seed=numbers.randrange(10**9), count=1)
    folder = broken_folders.copy_of(source, place / what)
    damage.do(folder)
    verb = "train" if what == "adapter" else numbers.choice(("train", "plan", "inspect"))
    words: list[object] = [verb, "--model", folder if what == "model" else bench.model("llama"), "--data", bench.data]
    words += [] if verb == "inspect" else ["--max-steps", 1, "--batch-size", 2, "--precision", "fp32"]
    words += ["--output", place / "run", "--sample-prompts", 0, "--lora.rank", 4] if verb == "train" else []
    words += ["--adapter", folder, "--lora.dropout", 0.2] if what == "adapter" else []
    ended = fitune(*words, place=place / "said")
    case = f"{verb} with {what}/{damage}: exit code {ended.code}"
    if ended.code == 0:
        return case, ended, Verdict("equal")
    named = what in ended.err or "chat template" in ended.err  # the folder, a file of it, or what of it does not fit
    return case, ended, Verdict("refused" if named else "SILENT", ended.last())
