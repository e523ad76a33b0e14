"""Colours and drawings: each stands in one place, and letters can be read on what they stand on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fitune
from fitune.commands import inspect
from fitune.commands.demo import bundled
from fitune.views import cells, looks

pytestmark = pytest.mark.unit
SOURCES = Path(__file__).parents[2] / "src" / "fitune"


def test_a_colour_is_named_in_one_place() -> None:
    """No page, script or style sheet gives a variable of looks.py a value of its own."""
    defined = re.compile("|".join(rf"{name}\s*:" for name in looks.LIGHT))
    pages = [path for kind in ("css", "js", "html", "jinja") for path in SOURCES.rglob(f"*.{kind}")]
    assert len(pages) > 15
    assert {path.name: defined.findall(path.read_text(encoding="utf-8")) for path in pages} == {
        path.name: [] for path in pages
    }
    assert set(looks.LIGHT) == set(looks.DARK)
    used = {name for path in pages for name in re.findall(r"var\((--\w+)\)", path.read_text(encoding="utf-8"))}
    assert used <= set(looks.LIGHT)


def brightness(colour: str) -> float:
    """Relative luminance (WCAG 2)."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * one for one in colour[1:])
    parts = [int(digits[n : n + 2], 16) / 255 for n in (0, 2, 4)]
    linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("colours", [looks.LIGHT, looks.DARK], ids=["light", "dark"])
@pytest.mark.parametrize("name", ["--fg", "--soft", "--good", "--bad", "--warn", "--line1"])
def test_letters_can_be_read(colours: dict[str, str], name: str) -> None:
    for ground in ("--bg", "--card"):
        lower, upper = sorted((brightness(colours[name]), brightness(colours[ground])))
        assert (upper + 0.05) / (lower + 0.05) >= 4.5, ground  # WCAG's AA


def test_the_page_of_inspect_has_the_drawings_of_notebooks() -> None:
    row = {"instruction": "<i>1 & 1</i>", "output": "2"}
    seen = fitune.inspect([row], model=bundled() / "model", samples=1)
    mask = fitune.show.mask([row], model=bundled() / "model")
    page = inspect.page(seen)
    strip = cells.token_strip(mask.tokens[0])
    assert strip in page
    assert strip in mask._repr_html_()
    assert cells.token_text(mask.tokens[0]) in page
    assert "<i>1" not in page
    assert looks.drawings() in page
    assert looks.drawings() in mask._repr_html_()
