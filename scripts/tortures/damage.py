"""Damage: one file of a run folder is changed, and the run is resumed, talked to, evaluated or merged.

A run that goes on, an answer, a loss or a merged model must be that of the undamaged folder, or be refused by a message
that names the file or its folder. Whatever else ends with exit code 0 is believed in silence.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tortures.children import Ran, Trouble, fitune, outcome, together
from tortures.kinds import MAIN, Bench, Verdict, copy, drawn

VERBS = ("resume", "chat", "eval", "merge")
MERGES = ("lora", "full", "nf4", "best")  # a prefix has no merged form
STOPPED_AT = 4  # steps of the run that is to be resumed, whose two checkpoints are of steps 2 and 4


# ---- mutations ----


def _flip(data: bytes, numbers: random.Random) -> bytes:
    at = numbers.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << numbers.randrange(8))]) + data[at + 1 :]


def _cut(data: bytes, numbers: random.Random) -> bytes:
    return data[: numbers.randrange(len(data))]


def _zeros(data: bytes, numbers: random.Random) -> bytes:
    at = numbers.randrange(len(data))
    length = min(len(data) - at, numbers.choice((1, 16, 512, 4096)))
    return data[:at] + b"\0" * length + data[at + length :]


def _more(data: bytes, numbers: random.Random) -> bytes:
    return data + numbers.choice((b"\0", b"\n", b"x", data[-64:], data))


def _digits(data: bytes, numbers: random.Random) -> bytes:
    """A digit is another one: what a careful editor does not see."""
    places = [at for at, byte in enumerate(data[:20000]) if 48 <= byte < 58]
    if not places:
        return _flip(data, numbers)
    at = numbers.choice(places)
    return data[:at] + str((int(chr(data[at])) + numbers.randrange(1, 10)) % 10).encode() + data[at + 1 :]


def _lines(data: bytes, numbers: random.Random) -> bytes:
    """A line is there twice, gone, or in another's place."""
    lines = data.splitlines(keepends=True)
    if len(lines) < 2:
        return _cut(data, numbers)
    at, other = numbers.sample(range(len(lines)), 2)
    way = numbers.choice(("twice", "gone", "swapped"))
    if way == "swapped":
        lines[at], lines[other] = lines[other], lines[at]
    else:
        lines[at : at + 1] = [lines[at]] * (2 if way == "twice" else 0)
    return b"".join(lines)


def _value(data: bytes, numbers: random.Random) -> bytes:
    """One value of JSON is of another type, or gone."""
    try:
        values = json.loads(data)
    except ValueError:
        return _lines(data, numbers)
    holder, key = values, None
    for _ in range(numbers.randrange(1, 4)):
        if key is not None and isinstance(holder[key], (dict, list)) and holder[key]:
            holder = holder[key]
        keys = (
            list(holder) if isinstance(holder, dict) else list(range(len(holder))) if isinstance(holder, list) else []
        )
        if not keys:
            return b"null"
        key = numbers.choice(keys)
    new: Any = numbers.choice((None, -1, "x", [], {}, True, 1e30, "gone"))
    if new == "gone":
        del holder[key]
    else:
        holder[key] = new
    return json.dumps(values).encode()


BYTES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "a bit flipped": _flip, "cut off": _cut, "zeros in it": _zeros, "longer": _more, "a digit changed": _digits,
    "lines changed": _lines, "a value changed": _value, "empty": lambda data, numbers: b"",
}  # fmt: skip


def mutate(folder: Path, other: Path, numbers: random.Random) -> str:
    """Change one file of a run folder.

    Args:
        folder: is changed.
        other: a run of the same kind with another seed, whose files may come in place of ours.
        numbers: decide which file, and how.

    Returns:
        What was done.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    kinds = sorted({path.parent for path in files})  # folders are drawn first: checkpoints have the most files
    file = numbers.choice([path for path in files if path.parent == numbers.choice(kinds)] or files)
    name, data = str(file.relative_to(folder)), file.read_bytes()
    way = numbers.choice([*BYTES, *BYTES, "gone", "a folder", "of another run", "a folder of another run"])
    if way == "gone":
        file.unlink()
    elif way == "a folder":
        file.unlink()
        file.mkdir()
    elif way == "of another run" and (other / name).is_file():
        shutil.copyfile(other / name, file)
    elif way == "a folder of another run" and file.parent != folder and (other / name).parent.is_dir():
        shutil.rmtree(file.parent)
        shutil.copytree((other / name).parent, file.parent)
        name = str(file.parent.relative_to(folder))
    else:
        way = way if way in BYTES else "a bit flipped"
        changed = BYTES[way](data, numbers) if data else b"x"
        file.write_bytes(changed if changed != data else data + b"\n")
    return f"{name}: {way}"


# ---- what is done with it ----


def stopped(bench: Bench, kind: str) -> Path:
    """A run that was killed behind its second checkpoint."""
    folder = bench.root / "stopped" / kind
    if not folder.exists():
        trouble = Trouble(folder, kill_at=_behind(bench, kind))
        fitune(*bench.words(kind, folder), place=folder.with_suffix(".said"), trouble=trouble)
    return folder


def _behind(bench: Bench, kind: str) -> int:
    """An event behind the second checkpoint, where the log has a line more."""
    events = bench.unbroken(kind)["events"]
    return max(at for at, event in enumerate(events) if f"step-{STOPPED_AT:06d}" in event) + 4


def other(bench: Bench, kind: str, verb: str) -> Path:
    """The same with another seed."""
    folder = bench.root / "other" / f"{kind}-{'stopped' if verb == 'resume' else 'finished'}"
    if not folder.exists():
        trouble = Trouble(folder, kill_at=_behind(bench, kind)) if verb == "resume" else None
        words = [*bench.words(kind, folder), "--seed", 7]
        fitune(*words, place=folder.with_suffix(".said"), trouble=trouble)
    return folder


def source(bench: Bench, kind: str, verb: str) -> Path:
    """The folder that is damaged."""
    return stopped(bench, kind) if verb == "resume" else bench.finished(kind)


def ask(bench: Bench, verb: str, run: Path, place: Path) -> tuple[Ran, Any]:
    """Do it; what came out, to be compared."""
    if verb == "resume":
        ended = fitune("train", "--resume", "--output", run, place=place)
        return ended, outcome(run) if ended.code == 0 else None
    if verb == "chat":
        ended = fitune("chat", run, "--max-new-tokens", 6, place=place, stdin="what is 1 plus 1?\n")
        return ended, ended.out
    if verb == "eval":
        ended = fitune("eval", run, "--data", bench.data, "--loss-only", "--json", place=place)
        return ended, _losses(ended.out)
    ended = fitune("merge", run, "--output", place / "merged", place=place)
    file = place / "merged" / "model.safetensors"
    return ended, hashlib.sha256(file.read_bytes()).hexdigest() if ended.code == 0 and file.is_file() else None


def _losses(out: str) -> Any:
    try:
        result = json.loads(out)
    except ValueError:
        return out
    return {name: result[name] for name in sorted(result) if name in ("base", "tuned", "rows")}


def wanted(bench: Bench, kind: str, verb: str) -> Any:
    """What the undamaged folder gives; kept in a file."""
    place = bench.root / "wanted" / f"{kind}-{verb}"
    file = place / "found.json"
    if not file.exists():
        run = copy(source(bench, kind, verb), place / "run")
        ended, found = ask(bench, verb, run, place)
        if ended.code:
            raise RuntimeError(f"{verb} of the undamaged {kind}: {ended.last()}")
        file.write_text(json.dumps(found), encoding="utf-8")
    return json.loads(file.read_text(encoding="utf-8"))


def pairs(cases: int) -> list[tuple[str, str]]:
    """What is damaged, and what is done with it; few cases are of few kinds."""
    kinds = MAIN[: max(1, min(len(MAIN), cases // 50))]
    return [(kind, verb) for kind in kinds for verb in VERBS if verb != "merge" or kind in MERGES]


def prepare(bench: Bench, cases: int, workers: int) -> dict[tuple[str, str], Any]:
    """Everything that cases are compared with."""
    some = pairs(cases)
    kinds = sorted({kind for kind, _ in some})
    others = [partial(other, bench, kind, verb) for kind in kinds for verb in ("resume", "chat")]
    together([*(partial(stopped, bench, kind) for kind in kinds), *others], workers)
    together([partial(wanted, bench, *one) for one in some], workers)
    return {one: wanted(bench, *one) for one in some}


def case(bench: Bench, seed: int, number: int, compare: dict[tuple[str, str], Any]) -> tuple[str, Verdict]:
    """Damage a run folder and use it; see kills.case."""
    numbers = drawn(seed, "damage", number)
    verb = VERBS[number % len(VERBS)]
    kind = numbers.choice([kind for kind, what in compare if what == verb])
    place = bench.root / "damage" / str(number)
    run = copy(source(bench, kind, verb), place / "run")
    done = mutate(run, other(bench, kind, verb), numbers)
    ended, found = ask(bench, verb, run, place)
    shutil.rmtree(place, ignore_errors=True)
    return f"{verb} of {kind}: {done}", _judged(done, ended, same=found == compare[kind, verb])


def _judged(done: str, ended: Ran, *, same: bool) -> Verdict:
    if ended.traceback:
        return Verdict("TRACEBACK", ended.last())
    if ended.code == 0:
        return Verdict("equal") if same else Verdict("SILENT", "it went on, and gave something else")
    name = done.partition(":")[0]
    parts = [part for part in Path(name).parts if part not in ("/", ".")]
    if not any(part in ended.err for part in parts):
        return Verdict("SILENT", f"refused, and the file is not named: {ended.last()}")
    return Verdict("refused", ended.last())
