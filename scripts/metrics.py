"""The size and the order of fitune's code in figures: `python scripts/metrics.py [--json]`.

Files and their lines, functions and their lengths, parameters, `Any` and `type: ignore`, docstrings, and the imports
between rooms (folders of the package; a module that stands in no folder is a room of its own). A room's floor is one
above the highest room that it imports.
"""

from __future__ import annotations

import ast
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "fitune"
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Metrics:
    """Counts over the package; `longest` and `widest` name the worst, with their figures."""

    files: int = 0
    lines: int = 0
    functions: int = 0
    median_function: float = 0.0
    functions_over_60: list[str] = field(default_factory=list)
    functions_over_7_parameters: list[str] = field(default_factory=list)
    files_over_450: list[str] = field(default_factory=list)
    any: int = 0
    type_ignore: int = 0
    public_without_docstring: list[str] = field(default_factory=list)
    rooms: int = 0
    floors: int = 0
    arrows: int = 0
    modules_of_largest_room: str = ""


def functions(tree: ast.Module) -> Iterator[tuple[str, Function]]:
    """Every function with the names around it."""
    todo: list[tuple[str, ast.AST]] = [("", tree)]
    while todo:
        outer, node = todo.pop()
        for child in ast.iter_child_nodes(node):
            named = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            name = f"{outer}.{child.name}".lstrip(".") if named else outer  # type: ignore[attr-defined]  # named ones
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield name, child
            todo.append((name, child))


def parameters(function: Function) -> int:
    """How many there are, without self and cls."""
    given = function.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, [given.vararg, given.kwarg])]
    return sum(argument.arg not in ("self", "cls") for argument in every)


def imported(tree: ast.Module) -> set[str]:
    """Modules of the package that a module imports, as dotted names under it."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fitune":
            inside = (node.module or "").partition(".")[2]
            found |= {inside} if inside else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[2] for alias in node.names if alias.name.startswith("fitune.")}
    return found


def room(module: str) -> str:
    """The folder of a module, or the module itself where it stands beside the folders."""
    return module.split(".")[0]


def floors(arrows: Mapping[str, set[str]]) -> dict[str, int]:
    """Of each room one more than the highest that it imports; rooms in a circle get no floor.

    Raises:
        ValueError: rooms import each other in a circle.
    """
    found: dict[str, int] = {}
    while len(found) < len(arrows):
        ready = [name for name, below in arrows.items() if name not in found and below <= found.keys()]
        if not ready:
            raise ValueError(f"rooms import each other in a circle: {sorted(arrows.keys() - found.keys())}")
        found |= {name: 1 + max((found[other] for other in arrows[name]), default=0) for name in ready}
    return found


def measure(package: Path = PACKAGE) -> Metrics:
    """All counts of a package."""
    made, lengths = Metrics(), []
    arrows: dict[str, set[str]] = {}
    sizes: Counter[str] = Counter()
    for path in sorted(package.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        tree, name = ast.parse(text), ".".join(path.relative_to(package).with_suffix("").parts)
        lines = len(text.splitlines())
        made.files, made.lines = made.files + 1, made.lines + lines
        made.files_over_450 += [f"{name} {lines}"] * (lines > 450)
        made.any += sum(isinstance(node, ast.Name) and node.id == "Any" for node in ast.walk(tree))
        made.type_ignore += text.count("type: ignore")
        for inside, function in functions(tree):
            length = (function.end_lineno or function.lineno) - function.lineno + 1
            lengths.append(length)
            where, count = f"{name}:{inside}", parameters(function)
            made.functions_over_60 += [f"{where} {length}"] * (length > 60)
            made.functions_over_7_parameters += [f"{where} {count}"] * (count > 7)
            public = not any(part.startswith("_") for part in inside.split("."))
            made.public_without_docstring += [where] * (public and ast.get_docstring(function) is None)
        mine = room(name)
        sizes[mine] += 1
        arrows.setdefault(mine, set()).update({room(other) for other in imported(tree)} - {mine, "__init__"})
    there = {name: {other for other in below if other in arrows} for name, below in arrows.items()}
    made.functions, made.median_function = len(lengths), float(median(lengths))
    made.rooms, made.floors = len(there), max(floors(there).values())
    made.arrows = sum(map(len, there.values()))
    made.modules_of_largest_room = "{} {}".format(*sizes.most_common(1)[0])
    return made


def main(arguments: list[str]) -> int:
    """Print them."""
    found = asdict(measure())
    if "--json" in arguments:
        print(json.dumps(found, indent=1))
        return 0
    for name, value in found.items():
        print(f"{name.replace('_', ' '):32} {len(value) if isinstance(value, list) else value}")
        if isinstance(value, list):
            print("".join(f"    {each}\n" for each in value), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
