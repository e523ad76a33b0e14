"""Every check: when it looks, what it can do, and what it is about. The table of docs/checks.md.

    python scripts/checks_table.py            # prints the table
    python scripts/checks_table.py --write    # puts it into both pages

In: the source code. Out: a line of Markdown for each rule. A rule is a function that makes a `Finding`; its name and
its levels are those that it gives there, its description is the first paragraph of its docstring, and when it looks
follows from the function that runs it. Only MOMENTS is written by hand, and a rule that none of them runs is an error;
and the descriptions in Chinese, `checks_zh.json`, by the English ones: whoever changes one translates it there.
"""

from __future__ import annotations

import ast
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "fitune"
PAGES = (ROOT / "docs" / "checks.md", ROOT / "docs" / "checks.zh-CN.md")
CHINESE = Path(__file__).with_name("checks_zh.json")
BEGIN, END = "<!-- scripts/checks_table.py -->", "<!-- end -->"
LEVELS = ("refuse", "warn", "fixed")
# who runs a rule (module, or module:function; or the rule itself), and when that is; the more exact one counts
MOMENTS = {
    "checks.datachecks": "data",
    "engine.optim:check": "settings",
    "commands.prepare": "model",
    "commands.frozen": "model",
    "commands.train:_rehearsed": "start",
    "commands.train_start": "start",
    "commands.train": "start",
    "checks.guards:fp16_master": "start",
    "commands.train_loop:run": "end",
    "commands.train_loop:_loop": "step",
    "commands.train_loop:_check_rows": "resume",
    "commands.train_loop:_watched": "step",
    "commands.train_loop:_restore": "resume",
    "commands.train_loop:_back_to_best": "end",
    "commands.resuming": "resume",
    "commands.resuming:best_reloaded": "end",
    "commands.train_end": "end",
    "commands.evaluate": "eval",
    "commands.merge": "merge",
    "commands.doctor": "doctor",
    "engine.integrity:run_seal": "each verb",
}
ORDER = ("settings", "data", "model", "start", "step", "resume", "end", "eval", "merge", "doctor", "each verb")


@dataclass
class Function:
    """A function of the package: where it stands, what it makes, and which names it uses.

    rules: the levels of each rule that it makes a finding of. uses: `name`, or `module.name`, as they stand in it.
    """

    module: str
    name: str
    doc: str
    rules: dict[str, set[str]] = field(default_factory=dict)
    uses: set[str] = field(default_factory=set)

    @property
    def is_private(self) -> bool:
        """Is it a helper of another function of its file?"""
        return self.name.startswith("_")

    def is_used_by(self, other: Function) -> bool:
        """Does the other one name this one, in its own file, through its module, or as a method of `active`?"""
        owner, _, name = self.name.rpartition(".")
        if other is self:
            return False
        if owner:  # a method: active.check() is ActiveRun's
            return any(
                use.endswith(f".{name}") and owner.lower().startswith(use[: -len(name) - 1]) for use in other.uses
            )
        here = other.module == self.module and name in other.uses
        return here or f"{self.module.rpartition('.')[2]}.{name}" in other.uses


@cache
def functions() -> list[Function]:
    """All functions of the package; a method is `Class.method`."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported = {
            alias.asname or alias.name: f"{(node.module or '').rpartition('.')[2]}.{alias.name}"
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        for top in tree.body:
            if isinstance(top, ast.ClassDef):
                found += [_function(module, f"{top.name}.{m.name}", m, imported) for m in _defined(top.body)]
            elif not isinstance(top, (ast.FunctionDef, ast.AsyncFunctionDef)):  # a table of rules is a user, too
                found.append(_function(module, "", top, imported))
        found += [_function(module, node.name, node, imported) for node in _defined(tree.body)]
    return found


@cache
def _users() -> dict[str, list[Function]]:
    """The functions by the last part of each name that they use."""
    found: dict[str, list[Function]] = defaultdict(list)
    for function in functions():
        for name in {use.rpartition(".")[2] for use in function.uses}:
            found[name].append(function)
    return found


def users(function: Function) -> list[Function]:
    """The functions that use this one."""
    return [one for one in _users().get(function.name.rpartition(".")[2], ()) if function.is_used_by(one)]


def _defined(body: list[ast.stmt]) -> list[ast.FunctionDef]:
    return [node for node in body if isinstance(node, ast.FunctionDef)]


def _function(module: str, name: str, node: ast.stmt, imported: dict[str, str]) -> Function:
    doc = (ast.get_docstring(node) or "") if isinstance(node, ast.FunctionDef) else ""
    made = Function(module, name, " ".join(doc.partition("\n\n")[0].split()))
    parts = [*ast.walk(node)]
    texts = {
        target.id: part.value.value
        for part in parts
        if isinstance(part, ast.Assign) and isinstance(part.value, ast.Constant) and isinstance(part.value.value, str)
        for target in part.targets
        if isinstance(target, ast.Name)
    }
    for part in parts:
        if isinstance(part, ast.Attribute):
            made.uses.add(f"{_last(part.value)}.{part.attr}")
        elif isinstance(part, ast.Name):
            made.uses |= {part.id, imported.get(part.id, part.id)}
        if isinstance(part, ast.Call) and isinstance(part.func, ast.Name) and part.func.id == "Finding":
            rule, level = part.args[:2]
            named = rule.value if isinstance(rule, ast.Constant) else texts[ast.unparse(rule)]
            levels = {one.value for one in ast.walk(level) if isinstance(one, ast.Constant)}
            made.rules.setdefault(str(named), set()).update(str(one) for one in levels)
    return made


def _last(value: ast.expr) -> str:
    """The last name of what stands before a dot."""
    if isinstance(value, ast.Name):
        return value.id
    return value.attr if isinstance(value, ast.Attribute) else ast.unparse(value).rpartition(".")[2]


@dataclass(frozen=True)
class Rule:
    """A line of the table."""

    name: str
    moments: tuple[str, ...]
    levels: tuple[str, ...]
    text: str


def rules() -> list[Rule]:
    """Every rule of the package.

    Raises:
        LookupError: a rule that no function of MOMENTS runs, or one without a docstring.
    """
    found: dict[tuple[str, str], Function] = {}
    levels: dict[str, set[str]] = {}
    for maker in functions():
        for rule, some in maker.rules.items():
            levels.setdefault(rule, set()).update(some)
            found |= {(rule, one.module + one.name): one for one in _public(maker)}
    made = []
    for (name, _), function in found.items():
        if not function.doc:
            raise LookupError(f"{name}: {function.module}:{function.name} has no docstring")
        moments = _moments(function)
        if not moments:
            raise LookupError(f"{name}: no function of MOMENTS runs {function.module}:{function.name}")
        order = tuple(sorted(moments, key=ORDER.index))
        made.append(Rule(name, order, tuple(one for one in LEVELS if one in levels[name]), function.doc))
    return sorted(made, key=lambda rule: (ORDER.index(rule.moments[0]), rule.name))


def _public(function: Function) -> list[Function]:
    """The functions that people read: the function itself, or those of its file that use it as a helper."""
    if not function.is_private:
        return [function]
    here = [user for user in users(function) if user.module == function.module]
    return [public for user in here for public in _public(user)] or [function]


def _moments(function: Function, seen: frozenset[str] = frozenset()) -> set[str]:
    """When a function runs: by those that use it, up to the first that MOMENTS names."""
    itself = f"{function.module}:{function.name}"
    if itself in MOMENTS:
        return {MOMENTS[itself]}
    found: set[str] = set()
    for user in [user for user in users(function) if user.name not in seen]:
        where = f"{user.module}:{user.name.rpartition('.')[2]}"
        moment = MOMENTS.get(where) or MOMENTS.get(user.module)
        found |= {moment} if moment else _moments(user, seen | {user.name})
    return found


def lines(translated: dict[str, str] | None = None) -> Iterator[str]:
    """The table; its descriptions in another language where `translated` has them by the English ones.

    Raises:
        LookupError: a description has no translation, or a translation no description.
    """
    found = rules()
    if translated is not None and (wrong := {rule.text for rule in found} ^ set(translated)):
        raise LookupError(f"{CHINESE.name}: translate exactly what the code has:\n" + "\n".join(sorted(wrong)))
    yield (
        "| check | when | can | what |"
        if translated is None
        else "| 检查（check） | 何时（when） | 能做（can） | 说明 |"
    )
    yield "|---|---|---|---|"
    for rule in found:
        text = rule.text if translated is None else translated[rule.text]
        yield f"| `{rule.name}` | {', '.join(rule.moments)} | {', '.join(rule.levels) or 'report'} | {text} |"


def replaced(page: Path) -> str:
    """A page with the table as it is now."""
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    translated = json.loads(CHINESE.read_text(encoding="utf-8")) if ".zh-CN" in page.name else None
    return before + BEGIN + "\n" + "\n".join(lines(translated)) + "\n" + END + rest.split(END)[1]


if __name__ == "__main__":
    if "--write" in sys.argv:
        for page in PAGES:
            page.write_text(replaced(page), encoding="utf-8")
    else:
        print("\n".join(lines()))
