"""The docs site: what it has, and that nothing in it leads nowhere."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fitune
from support.gpu_scripts import load

ROOT = Path(__file__).parents[2]
site: Any = load("site")


def test_links_to_what_is_no_page_become_text() -> None:
    there = {Path("docs/a.md"), Path("README.md"), Path("results/gpu/README.md")}
    text = "[a](a.md#x) [code](../src/fitune/api.py) [top](../README.md) [far](https://x.org) [rows](../results/gpu/)"
    assert site.without_dead_links(text, Path("docs/b.md"), there) == (
        "[a](a.md#x) code [top](../README.md) [far](https://x.org) [rows](../results/gpu/README.md)"
    )


def test_every_page_and_every_public_name_is_in_it() -> None:
    pages = site.copied()
    shown = str(site.navigation(pages))
    for page in (ROOT / "docs").glob("*.md"):
        assert f"docs/{page.name}" in shown
    for path in (ROOT / "examples").glob("*.ipynb"):
        assert f"examples/{path.name}" in shown
    whole = site.reference()
    for name in fitune.__all__:
        one = getattr(fitune, name)
        if callable(one):
            assert f".{name}\n" in whole, name


@pytest.mark.full
@pytest.mark.skipif(
    importlib.util.find_spec("mkdocs_jupyter") is None, reason="mkdocs is not installed: make docs does it"
)
def test_it_builds_without_a_dead_link(tmp_path: Path) -> None:
    shutil.copytree(ROOT, tmp_path / "here", ignore=shutil.ignore_patterns(".git", ".venv", "build", ".*cache"))
    for command in (
        [sys.executable, "scripts/site.py"],
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-f", "build/mkdocs.yml"],
    ):
        done = subprocess.run(command, cwd=tmp_path / "here", capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
