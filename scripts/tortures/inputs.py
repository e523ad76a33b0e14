"""Malformed inputs: whatever a user, or the internet, hands over ends in one message and exit code 2."""

from __future__ import annotations

import shutil

import broken_inputs
from tortures.children import MOST_CPU, MOST_MIB, fitune
from tortures.kinds import Bench, Verdict, drawn


def case(bench: Bench, seed: int, number: int) -> tuple[str, Verdict]:
    """One malformed input; see kills.case."""
    numbers = drawn(seed, "input", number)
    one = broken_inputs.CASES[number] if number < len(broken_inputs.CASES) else numbers.choice(broken_inputs.CASES)
    place = bench.root / "input" / str(number)
    path = place / one.name
    path.parent.mkdir(parents=True)
    one.make(path)
    whole = one.good is not None and not one.bad
    words: list[object] = ["--model", bench.model("llama"), "--data", path]
    words = ["inspect", *words] if whole else ["train", *words, "--output", place / "run"]
    ended = fitune(*words, place=place / "said")
    code, says = ended.code, ended.last()
    shutil.rmtree(place, ignore_errors=True)
    told = f"{one.name}: exit code {code}"
    if ended.traceback:
        return told, Verdict("TRACEBACK", says)
    if ended.cpu > MOST_CPU or ended.mib > MOST_MIB:
        return told, Verdict("SLOW", f"{ended.cpu:.0f} s, {ended.mib:,.0f} MiB")
    if not whole:
        if code == 0:
            return told, Verdict("SILENT", "taken as if it were whole")
        return told, Verdict("refused", says) if one.says in ended.err else Verdict("SILENT", f"not named: {says}")
    return told, Verdict("equal") if code == 0 else Verdict("SILENT", f"refused, and it is good: {says}")
