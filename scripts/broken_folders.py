"""Damaged files, drawn at random with a seed: whatever a folder of a model, a run, an adapter or data may have become.

In: a folder, a seed, a number. Out: damages, each of one file of one kind, which can be done to a copy of the folder.
Every file meets every kind before any meets one twice. tests/commands/test_damage.py and
scripts/torture.py draw from here:

    for damage in draw(folder, seed=7, count=50):
        damage.do(copy_of(folder, elsewhere))

    python scripts/broken_folders.py FOLDER --seed 7 --count 50     lists them
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

OTHERS: tuple[Any, ...] = (  # what a field may hold in place of its value
    None, True, False, -1, 0, 1, -(10**9), 10**12, 10**18, 0.5, -2.5, 1e308, float("nan"), float("inf"), "", "x", "0",
    "../../x", "字", "\n", "a" * 5000, [], [None], [1], ["x"], [[]], {}, {"x": 1}, {"x": {"y": None}},
)  # fmt: skip
TOPS: tuple[Any, ...] = (None, True, 0, -1, 1e999, "x", [], [1], [None], ["x"], [[1]], {}, {"x": 1}, {"": None})
JSON, YAML, TEXT = (".json",), (".yaml", ".yml"), (".jsonl", ".jinja", ".txt", ".md", ".csv", ".tsv")
DEEP = 5_000


@dataclass(frozen=True)
class Damage:
    """What becomes of one file.

    Args:
        file: its path in the folder.
        kind: of KINDS.
        what: the field and its new value, or the place that changed.
        change: does it to the file at a path.
    """

    file: str
    kind: str
    what: str
    change: Callable[[Path], object]

    def do(self, folder: Path) -> Path:
        """Damage the file in a folder (a copy, for nothing can be undone); its path."""
        path = folder / self.file
        self.change(path)
        return path

    def __str__(self) -> str:
        return f"{self.file}: {self.kind}{f' ({self.what})' if self.what else ''}"


def copy_of(folder: Path, target: Path) -> Path:
    """A copy whose files can be damaged."""
    return Path(shutil.copytree(folder, target))


# ---- kinds: each gives the change, and what is said of it; None: it is not for this file ----

Made = tuple[Callable[[Path], object], str] | None


def _replace(path: Path, make: Callable[[Path], None]) -> None:
    path.unlink()
    make(path)


def _absent(path: Path, random_: random.Random) -> Made:
    return Path.unlink, ""


def _written(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def _empty(path: Path, random_: random.Random) -> Made:
    return _written(b""), ""


def _folder(path: Path, random_: random.Random) -> Made:
    return lambda path: _replace(path, Path.mkdir), ""


def _pipe(path: Path, random_: random.Random) -> Made:
    return (lambda path: _replace(path, os.mkfifo), "") if hasattr(os, "mkfifo") else None


def _device(path: Path, random_: random.Random) -> Made:
    name = random_.choice(["/dev/zero", "/dev/null", "/dev/full", "/dev/stdin"])
    return (lambda path: _replace(path, lambda path: path.symlink_to(name)), name) if Path(name).exists() else None


def _cut(path: Path, random_: random.Random) -> Made:
    content = path.read_bytes()
    at = random_.randrange(len(content)) if content else 0
    return _written(content[:at]), f"{at:,} of {len(content):,} bytes left"


def _zeros(path: Path, random_: random.Random) -> Made:
    return _written(b"\0" * max(1, path.stat().st_size)), "every byte is NUL"


def _nul(path: Path, random_: random.Random) -> Made:
    content = bytearray(path.read_bytes())
    at = random_.randrange(max(1, len(content)))
    content[at : at + 64] = b"\0" * len(content[at : at + 64])
    return _written(bytes(content)), f"NUL from byte {at:,}"


def _flip(path: Path, random_: random.Random) -> Made:
    content = bytearray(path.read_bytes())
    if not content:
        return None
    at, bit = random_.randrange(len(content)), random_.randrange(8)
    content[at] ^= 1 << bit
    return _written(bytes(content)), f"bit {bit} of byte {at:,}"


def _not_text(path: Path, random_: random.Random) -> Made:
    content = path.read_bytes()
    at = random_.randrange(max(1, len(content)))
    return _written(content[:at] + b"\xff\xfe\xc3\x28" + content[at:]), f"no UTF-8 at byte {at:,}"


def _noise(path: Path, random_: random.Random) -> Made:
    return _written(random_.randbytes(random_.choice([7, 300, 5_000]))), "random bytes"


def _pointer(path: Path, random_: random.Random) -> Made:
    return _written(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"), "a Git LFS pointer"


def _twice(path: Path, random_: random.Random) -> Made:
    return _written(path.read_bytes() * 2), "its content twice"


def _top(path: Path, random_: random.Random) -> Made:
    if path.suffix not in JSON + YAML:
        return None
    value = random_.choice(TOPS)
    return _written(_text(path, value)), repr(value)


def _deep(path: Path, random_: random.Random) -> Made:
    if path.suffix not in JSON + YAML:
        return None
    lists, objects = (lambda n: b"[" * n + b"]" * n), (lambda n: b'{"a":' * n + b"1" + b"}" * n)
    text = random_.choice([lists(DEEP), objects(DEEP), objects(120)])
    return _written(text), f"nested {text.count(b'[') or text.count(b'{'):,} deep"


def _laughs(path: Path, random_: random.Random) -> Made:
    if path.suffix not in YAML:
        return None
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    return _written("\n".join(lines).encode()), "aliases of aliases"


def _same_key(path: Path, random_: random.Random) -> Made:
    if path.suffix not in YAML:
        return None
    line = random_.choice([line for line in path.read_bytes().splitlines() if line[:1].isalpha() and b":" in line])
    return _written(path.read_bytes() + b"\n" + line.partition(b":")[0] + b": 1\n"), "a key twice"


def _field(path: Path, random_: random.Random) -> Made:
    """One field, at any depth, holds something else."""
    if (value := _parsed(path)) is None:
        return None
    places = list(_places(value))
    if not places:
        return None
    where, other = random_.choice(places), random_.choice(OTHERS)
    _put(value, where, other)
    return _written(_text(path, value)), f"{'.'.join(map(str, where))} = {repr(other)[:60]}"


def _gone(path: Path, random_: random.Random) -> Made:
    """One field is missing."""
    if (value := _parsed(path)) is None or not (places := list(_places(value))):
        return None
    where = random_.choice(places)
    inner = value
    for part in where[:-1]:
        inner = inner[part]
    del inner[where[-1]]
    return _written(_text(path, value)), f"no {'.'.join(map(str, where))}"


KINDS: dict[str, Callable[[Path, random.Random], Made]] = {
    "absent": _absent, "empty": _empty, "a folder": _folder, "a pipe": _pipe, "a device": _device, "cut off": _cut,
    "zeros": _zeros, "NUL": _nul, "a flipped bit": _flip, "no UTF-8": _not_text, "noise": _noise, "a pointer": _pointer,
    "twice": _twice, "another type": _top, "deep": _deep, "aliases": _laughs, "a key twice": _same_key,
    "another field": _field, "a field gone": _gone,
}  # fmt: skip
OFTEN = ("another field",) * 4  # there are many fields


def _parsed(path: Path) -> Any:
    if path.suffix in JSON:
        return json.loads(path.read_text(encoding="utf-8"))
    if path.suffix in YAML:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    return None


def _text(path: Path, value: Any) -> bytes:
    if path.suffix in YAML:
        return yaml.safe_dump(value, allow_unicode=True).encode()
    return json.dumps(value, ensure_ascii=False).encode()


MOST_ENTRIES = 20  # of a list or object of many, such as a vocabulary, that can be drawn


def _places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for n, (key, inner) in enumerate(entries):
        if n == MOST_ENTRIES:
            return
        yield (*above, key)
        yield from _places(inner, (*above, key))


def _put(value: Any, where: Sequence[Any], other: Any) -> None:
    for part in where[:-1]:
        value = value[part]
    value[where[-1]] = other


# ---- drawing ----


def draw(
    folder: Path, *, seed: int, count: int, files: Sequence[str] | None = None, kinds: Sequence[str] | None = None
) -> list[Damage]:
    """So many damages of a folder's files.

    Args:
        folder: holds them; nothing in it is changed.
        seed: decides which are drawn.
        count: how many; fewer where there are not so many.
        files: paths in the folder that may be damaged; None: all.
        kinds: of KINDS; None: all.
    """
    random_ = random.Random(seed)
    there = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) if files is None else files
    pairs = [(file, kind) for file in there for kind in (*(kinds or KINDS), *(() if kinds else OFTEN))]
    random_.shuffle(pairs)
    found: list[Damage] = []
    for file, kind in pairs * (1 + count // max(1, len(pairs))):
        if len(found) == count:
            break
        if (made := KINDS[kind](folder / file, random_)) is not None:
            found.append(Damage(file, kind, made[1], made[0]))
    return found


def main() -> None:
    """List what is drawn."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=50)
    given = parser.parse_args()
    for damage in draw(given.folder, seed=given.seed, count=given.count):
        sys.stdout.write(f"{damage}\n")


if __name__ == "__main__":
    main()
