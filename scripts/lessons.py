"""The lessons: each source in examples/lessons/ becomes a notebook in examples/, executed here.

    python scripts/lessons.py                 # execute all, and compare their figures with the notebooks that are there
    python scripts/lessons.py 00_data 07_nf4  # these
    python scripts/lessons.py --write         # and write the notebooks anew
    python scripts/lessons.py --links         # only their links and first cells: for the repository of pyproject.toml

A source is a Python file in jupytext's percent format: cells of Markdown (English and Chinese below each other) and of
code. Where a notebook runs in Colab its first cell of code installs fitune. Outputs keep what cells print and draw, not
what libraries complain about on standard error. Figures drift where a number in an output is more than DRIFT off, or a
word is another one.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCES, NOTEBOOKS = ROOT / "examples" / "lessons", ROOT / "examples"
DRIFT = 0.25  # of a figure that a training on another CPU gives; counts and plans are far nearer
NEAR_ZERO = 0.06  # losses and shares below this are compared as they stand
NUMBER = re.compile(r"(?<![A-Za-z0-9_])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
INSTALL = """# Colab has no fitune yet; anywhere else this cell does nothing.
import subprocess
import sys

if "google.colab" in sys.modules:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "git+https://github.com/{}"], check=True)"""
COLAB = re.compile(r"https://colab\.research\.google\.com/github/([\w.-]+/[\w.-]+)/blob/main/(examples/\w+\.ipynb)")
LOOSE = "merged into plain weights|plain weights: largest"  # rounding errors: only their size counts


def names() -> list[str]:
    """All lessons, in order."""
    return sorted(path.stem for path in SOURCES.glob("[0-9]*.py"))


def repository() -> str:
    """Where this repository lies on GitHub, as owner/name: the one place that says so."""
    whole = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return str(whole["tool"]["fitune"]["github"])


def linked(text: str) -> str:
    """A text with its links to Colab for this repository."""
    return COLAB.sub(lambda found: found[0].replace(f"/{found[1]}/", f"/{repository()}/", 1), text)


def relink() -> None:
    """Write the links of examples/README.md, and the first cell of each notebook, without executing anything."""
    import nbformat

    page = NOTEBOOKS / "README.md"
    page.write_text(linked(page.read_text(encoding="utf-8")), encoding="utf-8")
    for name in names():
        there = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
        there.cells[1].source = parsed(name).cells[1].source
        nbformat.write(there, NOTEBOOKS / f"{name}.ipynb")


def parsed(name: str) -> Any:
    """A lesson's source as a notebook without outputs."""
    import jupytext
    import nbformat.v4

    notebook = jupytext.read(SOURCES / f"{name}.py")
    notebook.cells.insert(1, nbformat.v4.new_code_cell(INSTALL.format(repository())))  # behind the title
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
        cell.metadata = {}
    return notebook


def executed(name: str) -> Any:
    """The lesson as a notebook, with what its cells print and draw.

    Raises:
        CellExecutionError: a cell fails.
    """
    import nbclient

    notebook = parsed(name)
    with tempfile.TemporaryDirectory() as folder:
        nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
            for one in cell.outputs:
                one.get("data", {}).pop("text/plain", None) if "text/html" in one.get("data", {}) else None
                one.pop("execution_count", None) if one.output_type != "execute_result" else None
    return notebook


def texts(notebook: Any) -> list[str]:
    """What its code cells print, a text for each."""
    made = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            parts = [one.get("text") or one.get("data", {}).get("text/plain", "") for one in cell.outputs]
            made.append("".join("".join(part) for part in parts))
    return made


def drift(there: str, now: str) -> list[str]:
    """Lines whose figures or words differ by more than a run on another machine explains."""
    found = []
    for old, new in zip_longest(there.splitlines(), now.splitlines(), fillvalue=""):
        if re.search(LOOSE, old) and re.search(LOOSE, new):
            continue
        if NUMBER.sub("0", old).split() != NUMBER.sub("0", new).split():
            found.append(f"{old!r} is now {new!r}")
            continue
        pairs = zip(NUMBER.findall(old), NUMBER.findall(new), strict=True)
        values = [(float(a.replace(",", "")), float(b.replace(",", ""))) for a, b in pairs]
        if any(abs(a - b) > max(DRIFT * abs(a), NEAR_ZERO) for a, b in values):
            found.append(f"{old!r} is now {new!r}")
    return found


def stale(name: str) -> list[str]:
    """Why a notebook is not that of its source; without executing anything."""
    import nbformat

    path = NOTEBOOKS / f"{name}.ipynb"
    if not path.is_file():
        return [f"{path.name}: not there"]
    there, source = nbformat.read(path, as_version=4), parsed(name)
    same = [(c.cell_type, c.source) for c in there.cells] == [(c.cell_type, c.source) for c in source.cells]
    return [] if same else [f"{path.name}: its cells are not those of examples/lessons/{name}.py"]


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module's text."""
    import nbformat

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lessons", nargs="*", choices=[[], *names()], help="default: all")
    parser.add_argument("--write", action="store_true", help="write the notebooks, whatever their figures were")
    parser.add_argument("--links", action="store_true", help="write links and first cells, and execute nothing")
    given = parser.parse_args(arguments)
    if given.links:
        relink()
        return 0
    wrong = []
    for name in given.lessons or names():
        began = time.perf_counter()
        made = executed(name)
        path = NOTEBOOKS / f"{name}.ipynb"
        if given.write:
            nbformat.write(made, path)
        else:
            problems = stale(name)
            if not problems:
                pairs = zip(texts(nbformat.read(path, as_version=4)), texts(made), strict=True)
                problems = [line for old, new in pairs for line in drift(old, new)]
            wrong += [f"{name}: {problem}" for problem in problems]
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
    print("\n".join(wrong))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
