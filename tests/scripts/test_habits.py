"""The project's habits hold: what `make unit` promises, what the workflow calls, the files that documents name."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / ".github").rglob("*.md")])
FOLDERS = ("src", "tests", "scripts", "benchmarks", "docs", "results")


@pytest.mark.unit
def test_a_unit_test_cannot_start_a_process_or_compute_a_gradient() -> None:
    with pytest.raises(pytest.fail.Exception, match="starts a process"):
        subprocess.run([sys.executable, "--version"], check=False)
    with pytest.raises(pytest.fail.Exception, match="computes a gradient"):
        torch.ones(1, requires_grad=True).sum().backward()


def test_another_test_may() -> None:
    torch.ones(1, requires_grad=True).sum().backward()


def test_the_workflow_calls_targets_that_are_there() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8"))
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    called = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    called += [hook["entry"] for repository in hooks["repos"] for hook in repository["hooks"]]
    assert all(command.startswith("make ") for command in called)
    assert {command.removeprefix("make ") for command in called} <= targets
    assert set(re.findall(r"^# make ([a-z-]+)", makefile, re.MULTILINE)) == targets - {"install", "clean", "bytecode"}
    tried = workflow["jobs"]["test"]["strategy"]["matrix"]
    assert tried["os"] == ["ubuntu-latest", "macos-latest", "windows-latest"]
    assert tried["python"] == ["3.11", "3.12", "3.13"]


def missing(text: str) -> list[str]:
    """Files of this repository that a document names, and that are not there."""
    spans = re.findall(r"`([\w./-]+)`", text)
    paths = [name for name in spans if name.split("/")[0] in FOLDERS and "/" in name and "." in name]
    modules = [name for name in spans if name.endswith(".py") and name not in paths]
    known = {path.as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    return [name for name in paths if not (ROOT / name).exists()] + [
        name for name in modules if not any(path.endswith(f"/{name}") for path in known)
    ]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_file_that_a_document_names_is_there(path: Path) -> None:
    assert missing(path.read_text(encoding="utf-8")) == []


def test_a_file_that_is_gone_is_seen() -> None:
    text = "`src/fitune/gone.py`, `gone.py`, `results/gone.json`, `core/errors.py`, `src/fitune/api.py`, `result.json`"
    assert missing(text) == ["src/fitune/gone.py", "results/gone.json", "gone.py"]


def unknown(text: str) -> list[str]:
    """Names such as `batches.flat` that a document gives, and that no module of that name has."""
    modules: dict[str, list[str]] = {}
    for path in sorted((ROOT / "src" / "fitune").rglob("*.py")):
        modules.setdefault(path.stem, []).append(path.read_text(encoding="utf-8"))
    found = []
    for module, names in re.findall(r"`([a-z_]+)\.([A-Za-z_.]+)`", text):
        if module not in modules or names in ("py", "json", "jsonl", "html", "yaml"):
            continue
        defined = [re.compile(rf"^\s*(?:def |class )?{name}\b", re.MULTILINE) for name in names.split(".")]
        if not any(all(name.search(source) for name in defined) for source in modules[module]):
            found.append(f"{module}.{names}")
    return found


def test_every_function_that_the_architecture_names_is_there() -> None:
    assert unknown((ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")) == []
    assert unknown("`batches.flat`, `batches.gone`, `step_runner.StepRunner.leap`, `optim.TABLE`, `config.json`") == [
        "batches.gone",
        "step_runner.StepRunner.leap",
    ]


def unexplained(text: str) -> list[str]:
    """Lines that silence the type checker without a code in brackets and, behind it, the reason."""
    explained = re.compile(r"# type: ignore\[[a-z, -]+\]  # (noqa: [A-Z0-9, ]+  # )?(?!noqa)[^\s#]")
    return [line.strip() for line in text.splitlines() if "# type: ignore" in line and not explained.search(line)]


@pytest.mark.unit
def test_whoever_silences_the_type_checker_says_why() -> None:
    there = {str(path): unexplained(path.read_text(encoding="utf-8")) for path in (ROOT / "src").rglob("*.py")}
    assert {name: lines for name, lines in there.items() if lines} == {}


@pytest.mark.unit
def test_a_silenced_type_checker_without_a_reason_is_seen() -> None:
    with_reason = "a = b  # type: ignore[misc]  # b has no types"
    without_reason = [
        "a = b  # type: ignore[misc]",
        "a = b  # type: ignore",
        "a = b  # type: ignore[misc]  # noqa: E501",
    ]
    assert unexplained("\n".join([with_reason, *without_reason])) == without_reason


CITED = re.compile(r"(?<![\w/.-])(?:tests|scripts|benchmarks|docs|results|src)/[\w./-]+\.(?:py|md|json|sh|txt)\b")


def uncited(text: str) -> list[str]:
    """Files of this repository that a source text cites, and that are not there."""
    return sorted({name for name in CITED.findall(text) if not (ROOT / name).exists()})


@pytest.mark.parametrize("folder", ["src", "scripts", "benchmarks"])
def test_every_file_that_the_code_cites_is_there(folder: str) -> None:
    found = {path.name: uncited(path.read_text(encoding="utf-8")) for path in (ROOT / folder).rglob("*.py")}
    assert {name: names for name, names in found.items() if names} == {}
    assert uncited("see tests/test_moved.py and (docs/gone.md).") == ["docs/gone.md", "tests/test_moved.py"]


COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp)
OTHER_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def stored(nodes: Iterable[ast.AST]) -> set[str]:
    """Names that the nodes, or what stands in them, bind by assignment."""
    return {one.id for node in nodes for one in ast.walk(node) if isinstance(one, ast.Name) and is_stored(one)}


def is_stored(name: ast.Name) -> bool:
    return isinstance(name.ctx, ast.Store)


def scope(node: ast.AST, bound: frozenset[str] = frozenset()) -> Iterator[tuple[ast.AST, frozenset[str]]]:
    """The nodes of a scope, each with the names that comprehensions and lambdas around it bind.

    Functions and classes inside it are scopes of their own. The first iterable of a comprehension is read outside it.
    """
    for child in ast.iter_child_nodes(node):
        inside = bound
        if isinstance(node, (*COMPREHENSIONS, ast.GeneratorExp)):
            inside = bound | stored(part.target for part in node.generators)
            if child is node.generators[0]:
                first = node.generators[0].iter
                yield from [(first, bound), *scope(first, bound)]
                child = ast.comprehension(child.target, ast.Constant(None), child.ifs, 0)
        elif isinstance(node, ast.Lambda):
            inside = bound | {one.arg for one in ast.walk(node.args) if isinstance(one, ast.arg)}
        yield child, inside
        if not isinstance(child, OTHER_SCOPES):
            yield from scope(child, inside)


def shadowing(source: str) -> list[str]:
    """`function: name` where a comprehension binds the name of a module-level function, class, import or constant that
    the same function reads outside the comprehension: CPython 3.12 puts both into one scope, and such a function can
    end in an UnboundLocalError."""
    tree = ast.parse(source)
    top = [node for part in tree.body if not isinstance(part, OTHER_SCOPES) for node, bound in scope(part) if not bound]
    top += tree.body
    module = {node.name for node in tree.body if isinstance(node, OTHER_SCOPES)}
    module |= {(alias.asname or alias.name).split(".")[0] for node in top for alias in getattr(node, "names", [])
               if isinstance(alias, ast.alias)}  # fmt: skip
    module |= {node.id for node in top if isinstance(node, ast.Name) and is_stored(node)}
    found = []
    for function in [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]:
        parts = [part for node in ast.walk(function) if isinstance(node, COMPREHENSIONS) for part in node.generators]
        if not stored(part.target for part in parts) & module:
            continue
        there = list(scope(function))
        own = {node.name for node, _ in there if isinstance(node, OTHER_SCOPES)}
        own |= {node.id for node, bound in there if isinstance(node, ast.Name) and is_stored(node) and not bound}
        own |= {one.arg for one in ast.walk(function.args) if isinstance(one, ast.arg)}
        reads = {node.id for node, bound in there if isinstance(node, ast.Name) and not is_stored(node)
                 and node.id not in bound}  # fmt: skip
        binds = stored(part.target for node, _ in there if isinstance(node, COMPREHENSIONS) for part in node.generators)
        found += [f"{function.name}: {name}" for name in sorted(binds & reads & module - own)]
    return found


@pytest.mark.parametrize("folder", ["src", "scripts", "benchmarks", "tests"])
def test_no_comprehension_hides_a_name_that_its_function_reads(folder: str) -> None:
    found = {path.name: shadowing(path.read_text(encoding="utf-8")) for path in (ROOT / folder).rglob("*.py")}
    assert {name: faults for name, faults in found.items() if faults} == {}


@pytest.mark.unit
def test_a_comprehension_that_hides_a_name_is_seen() -> None:
    top = "import json as spec\n"
    function = "def f(known, outs):\n    a = [spec for spec in known]\n    "
    assert shadowing(top + function + "return [spec(one) for one in outs]") == ["f: spec"]
    assert shadowing(top + function + "return {spec: 1}, a") == ["f: spec"]
    assert shadowing(top + function + "return (lambda one: spec)") == ["f: spec"]
    assert shadowing(top + function + "return (lambda spec: spec)(spec)") == ["f: spec"]
    assert shadowing(top + "def f(a):\n    return [spec for spec in spec(a)]") == ["f: spec"]
    assert shadowing(top + "class A:\n    def f(self, a):\n        return {spec for spec in a} or spec") == ["f: spec"]
    assert shadowing("spec = 1\n" + function + "return spec") == ["f: spec"]
    assert shadowing(top + function + "return {spec for spec in outs}") == []
    assert shadowing(top + function + "return (lambda spec: spec)") == []
    assert shadowing(top + function + "return (spec(one) for spec, one in a)") == []
    assert shadowing(top + function + "spec = 1\n    return spec") == []  # the function's own name all through
    assert shadowing("a = [spec for spec in ()]\n" + function + "return spec") == []


def without_encoding(source: str) -> list[int]:
    """The lines that read or write text in the encoding of the machine, which on Windows is not UTF-8."""
    found = []
    for node in [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        modes = [one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str)]
        text = {
            "read_text": not node.args,
            "write_text": len(node.args) < 2,
            "open": any(set(mode) <= set("rwxat+") for mode in modes),
        }
        if text.get(name) and not any(keyword.arg == "encoding" for keyword in node.keywords):
            found.append(node.lineno)
    return found


@pytest.mark.unit
def test_text_is_read_and_written_as_utf_8() -> None:
    found = {path.name: without_encoding(path.read_text(encoding="utf-8")) for path in (ROOT / "src").rglob("*.py")}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.unit
def test_text_in_the_encoding_of_the_machine_is_seen() -> None:
    assert without_encoding("a.read_text()\na.write_text(b)\nopen(a, 'w')\na.open('r')\nwith open(a, 'a'): pass") == [
        1, 2, 3, 4, 5,
    ]  # fmt: skip
    fine = "a.read_text('utf-8')\na.write_text(b, encoding=c)\nopen(a, 'wb')\na.open('w', encoding=c)\nos.open(a, b)"
    assert without_encoding(fine) == []
