"""The pages of the docs site, laid out as in this repository, and the list of them.

    python scripts/site.py        # build/site-source, and build/mkdocs.yml with the navigation

In: README, docs/, examples/, results/. Out: a folder for mkdocs (`make docs` builds it, strictly: a dead link ends it).
Links to code, which is no page, become its name. The reference is made from the docstrings of all public functions.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

import fitune

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "build" / "site-source"
BESIDE = ("CHANGELOG.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md")
PAGES = ("README*.md", *BESIDE, "LICENSE", "docs/*", "examples/*.md", "examples/*.ipynb", "results/**/*")
LINK = re.compile(r"\[([^\]]*)\]\((?!https?://|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")
TITLES = re.compile(r"^# (.+)$", re.MULTILINE)


def copied() -> list[Path]:
    """All that the site has, below the repository."""
    found = [path for pattern in PAGES for path in sorted(ROOT.glob(pattern)) if path.is_file()]
    return [path.relative_to(ROOT) for path in found]


def without_dead_links(text: str, page: Path, there: set[Path]) -> str:
    """The page with links to what the site does not have as plain text."""

    def kept(found: re.Match[str]) -> str:
        target = Path(re.sub(r"/$", "", found[2]))
        place = Path(*[part for part in (page.parent / target).parts if part != "."])
        while ".." in place.parts:
            at = place.parts.index("..")
            place = Path(*place.parts[: at - 1], *place.parts[at + 1 :])
        if place in there:
            return found[0]
        return found[1] if not (ROOT / place).is_dir() or place / "README.md" not in there else (
            f"[{found[1]}]({found[2].rstrip('/')}/README.md)"
        )  # fmt: skip

    return LINK.sub(kept, text)


def reference() -> str:
    """A page with every public function and record."""
    parts = ["# Reference\n\nAll that `import fitune` gives, from the docstrings.\n"]
    homes = {"show": fitune.show, "quant": fitune.quant}
    names = [name for name in fitune.__all__ if not name.startswith("_") and name not in homes]
    for name in sorted(names, key=lambda one: (one[0].isupper(), one)):  # functions first, then records
        one: Any = getattr(fitune, name)
        one = getattr(one, "__wrapped__", one)
        parts.append(f"::: {one.__module__}.{one.__qualname__}\n")
    for home, module in homes.items():
        parts.append(f"\n## fitune.{home}\n")
        parts += [f"::: fitune.{home}.{name}\n" for name in module.__all__]
    return "\n".join(parts)


def navigation(pages: list[Path]) -> list[dict[str, Any]]:
    """English pages, Chinese pages, lessons, and what stands beside."""

    def title(page: Path) -> str:
        found = TITLES.search((ROOT / page).read_text(encoding="utf-8"))
        return found[1] if found else page.stem

    docs = [page for page in pages if page.parent == Path("docs") and page.suffix == ".md"]
    chinese = [page for page in docs if page.name.endswith(".zh-CN.md")]
    lessons = [page for page in pages if page.suffix == ".ipynb"]
    records = [str(page) for page in pages if page.parts[0] == "results" and page.suffix == ".md"]
    return [
        {"fitune": "index.md"},
        {"中文": "README.zh-CN.md"},
        {"Guide": [{title(page): str(page)} for page in docs if page not in chinese]},
        {"指南": [{title(page): str(page)} for page in chinese]},
        {"Lessons 课程": ["examples/README.md", *({page.stem: str(page)} for page in lessons)]},
        {"Reference": "reference.md"},
        {"Project": [*(name for name in BESIDE if Path(name) in pages), *records]},
    ]


def main() -> int:
    """See the module's text."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    pages = copied()
    there = set(pages)
    for page in pages:
        target = SOURCE / page
        target.parent.mkdir(parents=True, exist_ok=True)
        if page.suffix == ".md":
            text = without_dead_links((ROOT / page).read_text(encoding="utf-8"), page, there)
            at_home = text.replace("](README.md", "](index.md")  # the site begins at index.md
            target.write_text(at_home if page.parent == Path() else text, encoding="utf-8")
        else:
            shutil.copyfile(ROOT / page, target)
    (SOURCE / "README.md").rename(SOURCE / "index.md")
    (SOURCE / "reference.md").write_text(reference(), encoding="utf-8")
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    nav = yaml.safe_dump({"nav": navigation(pages)}, allow_unicode=True, sort_keys=False)
    for here, below in (("build/site-source", "site-source"), ("build/site\n", "site\n"), ("[src]", "[../src]")):
        settings = settings.replace(here, below)
    (ROOT / "build" / "mkdocs.yml").write_text(f"{settings}{nav}", encoding="utf-8")
    print(f"{SOURCE}: {len(pages)} files")
    return 0


if __name__ == "__main__":
    sys.exit(main())
