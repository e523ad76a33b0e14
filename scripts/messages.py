"""The messages that fitune's code raises, and whether docs/troubleshooting.md cites them as they are.

    python scripts/messages.py            # every message, with the kind of its error and where it stands
    python scripts/messages.py --check    # what a page cites and no code raises

In: the source code, and the first column of the pages' tables. Out: texts with … where a value stands. A message is a
text of a function that raises or reports: an error of core/errors.py, or a check's finding. Messages of other packages
are looked up in the installed module or library that the page names.
"""

from __future__ import annotations

import ast
import importlib.util
import mmap
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "fitune"
PAGES = (ROOT / "docs" / "troubleshooting.md", ROOT / "docs" / "troubleshooting.zh-CN.md")
HOLE = "…"
ROW = re.compile(r"^\| (`+)(.+?)\1 \|(.*)\|$", re.MULTILINE)
ELSEWHERE = re.compile(r"^ `(\w+(?:\.\w+)+)` \|")  # a module or library of another package, in the second column
LEAST = 12  # letters that a cited message has, so that it is no other one
MAKERS = re.compile(r"[A-Z]\w*Error|Finding|Interrupted|Refused")
MADE = re.compile(rf"\b(?:{MAKERS.pattern})\(")


@dataclass(frozen=True)
class Message:
    """A text that a person may read, and the errors that its function raises.

    kinds: the error or `Finding` around it; all of the function's where it is put into a variable first.
    """

    text: str
    kinds: frozenset[str]
    where: str


@dataclass(frozen=True)
class Cited:
    """A message as a page has it. home: the module or library of another package that has it; empty: it is fitune's."""

    text: str
    home: str


def _text(node: ast.expr) -> str | None:
    """A literal text with … for each value in it; None: no text."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else HOLE for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        sides = [_text(node.left), _text(node.right)]
        return None if sides == [None, None] else "".join(HOLE if side is None else side for side in sides)
    return None


def _maker(node: ast.AST) -> str | None:
    """The name of the error or finding that a call makes."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, (ast.Name, ast.Attribute)):
        return None
    name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
    return name if MAKERS.fullmatch(name) else None


def _texts(node: ast.AST) -> Iterator[str]:
    """Each literal below a node, the longest ones only: a sum of texts is one text."""
    if isinstance(node, ast.expr) and (text := _text(node)) is not None:
        yield text
        return
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return  # a docstring
    for child in ast.iter_child_nodes(node):
        yield from _texts(child)


@cache
def messages() -> list[Message]:
    """Every message of the package."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        if not MADE.search(source):
            continue
        for function in _functions(ast.parse(source)):
            calls = [(node, kind) for node in ast.walk(function) if (kind := _maker(node)) is not None]
            where = f"{path.relative_to(PACKAGE).as_posix()}:{function.lineno} {function.name}"
            inside = [Message(text, frozenset({kind}), where) for node, kind in calls for text in _texts(node)]
            seen = {one.text for one in inside}
            kinds = frozenset(kind for _, kind in calls)
            beside = [text for text in (_texts(function) if kinds else ()) if text not in seen]
            found += [*inside, *(Message(text, kinds, where) for text in beside)]
    return [one for one in found if len(_bare(one.text)) > 2]


def _functions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """The functions and methods of a module; those inside of functions belong to them."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield child
        elif isinstance(child, (ast.ClassDef, ast.If)):
            yield from _functions(child)


def _bare(text: str) -> str:
    return " ".join(text.replace(HOLE, "").split())


def cited(page: Path) -> list[Cited]:
    """The messages in the first column of a page's tables."""
    rows = ROW.findall(page.read_text(encoding="utf-8"))
    return [Cited(text, home[1] if (home := ELSEWHERE.match(rest)) else "") for _, text, rest in rows]


def raised(text: str) -> list[Message]:
    """The messages of fitune that a cited text is, or is a part of."""
    return [one for one in messages() if text in " ".join(one.text.split())]


def stands_in(text: str, home: str) -> bool | None:
    """Has another package's module or library this text? None: it is not installed (CUDA's, on a CPU)."""
    package, *rest = home.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent.joinpath(*rest)
    if path.with_suffix(".py").is_file():
        tree = ast.parse(path.with_suffix(".py").read_text(encoding="utf-8"))
        return any(text in " ".join(literal.split()) for literal in _texts(tree))
    if not path.with_suffix(".so").is_file():
        return None
    with path.with_suffix(".so").open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as whole:
        return whole.find(text.encode()) >= 0


def wrong(page: Path) -> list[str]:
    """What a page cites and nothing raises."""
    found = []
    for one in cited(page):
        if len(_bare(one.text)) < LEAST:
            found.append(f"{page.name}: too short to be found by: {one.text}")
        elif not raised(one.text) if not one.home else stands_in(one.text, one.home) is False:
            found.append(f"{page.name}: {one.home or 'no code of fitune'}: {one.text}")
    return found


def main() -> int:
    """See the module's text."""
    if "--check" in sys.argv:
        problems = [line for page in PAGES for line in wrong(page)]
        print("\n".join(problems) or f"{len(cited(PAGES[0]))} messages, all raised")
        return int(bool(problems))
    for one in messages():
        print(f"{one.where}: {', '.join(sorted(one.kinds))}: {' '.join(one.text.split())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
