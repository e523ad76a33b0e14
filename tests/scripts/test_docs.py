"""What the documents say is true: commands, module names, exported names."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shlex
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

import fitune
from fitune.cli import main as cli

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def script(name: str) -> ModuleType:
    """A script of `scripts/`, loaded as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def commands(text: str) -> list[str]:
    """Every `fitune ...` command in code blocks and code spans."""
    found = re.findall(r"^(fitune .*?)(?:\s+#.*)?$", text, re.MULTILINE) + re.findall(r"`(fitune [^`]*)`", text)
    return [command for command in found if "..." not in command]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_in_the_documents_parses(path: Path) -> None:
    for command in commands(path.read_text(encoding="utf-8")):
        tokens = shlex.split(command)[1:]
        if len(tokens) == 1:  # a verb that is spoken of
            assert tokens[0] in ("--help", *cli.app), command
            continue
        if tokens[-1] == "--help":
            continue
        cli.app.parse_args(tokens, exit_on_error=False)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_in_the_documents_leads_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (path.parent / target).exists(), target


def test_both_readmes_have_the_same_commands_and_sections() -> None:
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md"))
    assert commands(english) == commands(chinese)
    assert english.count("\n## ") == chinese.count("\n## ")


def test_the_architecture_names_every_module() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    package = ROOT / "src" / "fitune"
    for path in package.iterdir():
        if path.suffix == ".py" and path.name != "__main__.py":
            assert f"`{path.name}`" in text, path.name
        if path.is_dir() and (path / "__init__.py").exists():
            assert f"`{path.name}/`" in text, path.name


def test_what_the_package_promises_is_there() -> None:
    for name in fitune.__all__:
        assert getattr(fitune, name) is not None
    assert callable(fitune.train)
    importlib.import_module("fitune.commands.train")
    importlib.import_module("fitune.commands.evaluate")
    importlib.import_module("fitune.commands.merge")
    assert callable(fitune.train)  # a verb stays a function whatever is imported


def test_the_loop_stays_small() -> None:
    """The steps of a run, from the first to the last, are one function that fits on a screen or two."""
    import inspect

    from fitune.commands.train_loop import Training

    assert len(inspect.getsource(Training._loop).splitlines()) <= 60


@pytest.mark.parametrize(
    ("page", "results"), [("methods", "methods.json"), ("memory", "savers.json"), ("precision", "precision.json")]
)
def test_tables_in_the_documents_are_those_of_the_results(page: str, results: str) -> None:
    module = script("results_table")
    for language in ("", ".zh-CN"):
        text = (ROOT / "docs" / f"{page}{language}.md").read_text(encoding="utf-8")
        assert "\n".join(module.lines(ROOT / "results" / {"memory": "savers.json"}.get(page, f"{page}.json"))) in text


def test_the_table_of_models_and_methods_is_what_the_methods_say() -> None:
    module = script("support_table")
    table = "\n".join(module.lines())
    for name in ("README.md", "README.zh-CN.md"):
        assert table in (ROOT / name).read_text(encoding="utf-8")
    assert module.NOT_YET in table  # a shape that a method refuses is found


def test_the_table_of_checks_is_what_the_code_says(monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("checks_table")
    for page in module.PAGES:
        text = page.read_text(encoding="utf-8")
        assert module.replaced(page) == text, f"{page.name}: python scripts/checks_table.py --write"
    table = module.PAGES[1].read_text(encoding="utf-8").partition(module.BEGIN)[2].partition(module.END)[0]
    assert not [line for line in table.splitlines()[3:] if not re.search("[\u4e00-\u9fff]", line.split("|")[4])]
    some = json.loads(module.CHINESE.read_text(encoding="utf-8"))
    some["A check that is gone."] = some.pop("No row starts with two BOS tokens.")
    with pytest.raises(LookupError, match=r"A check that is gone\.\nNo row starts with two BOS tokens\."):
        list(module.lines(some))
    names = {rule.name for rule in module.rules()}
    assert {"packing-leak", "run-seal", "machine-load", "adapter-scale", "merge-drift"} <= names
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src" / "fitune").rglob("*.py"))
    assert set(re.findall(r'\bFinding\(\s*"([a-z0-9-]+)"', source)) <= names
    monkeypatch.delitem(module.MOMENTS, "commands.merge")
    with pytest.raises(LookupError, match="no function of MOMENTS runs"):
        module.rules()


def test_the_install_lines_are_those_of_the_constraints() -> None:
    pinned = (ROOT / "src" / "fitune" / "constraints.txt").read_text(encoding="utf-8")
    for name in ("README.md", "README.zh-CN.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        versions = re.findall(r"^pip install (torch==\S+)", text, re.MULTILINE)
        assert len(versions) == 2
        assert all(f"\n{version}\n" in pinned for version in versions)
        assert "--constraint src/fitune/constraints.txt" in text
    module = script("install_sizes")
    for page, head in zip(module.PAGES, module.HEADS, strict=True):
        text = page.read_text(encoding="utf-8")
        assert module.replaced(page, head) == text
        assert {f"\n{version}\n" in pinned for version in re.findall(r"`pip install (torch==[\d.]+)", text)} == {True}
    assert module.sizes((ROOT / "README.md").as_uri()) == ((size := (ROOT / "README.md").stat().st_size), 2 * size)


def test_the_size_of_a_wheel_is_read_without_unpacking_it(tmp_path: Path) -> None:
    module = script("install_sizes")
    wheel = tmp_path / "a b.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("a/__init__.py", "x = 1\n" * 1000)
    assert module.sizes(wheel.as_uri()) == (wheel.stat().st_size, 6000)
    assert wheel.stat().st_size < 1000
