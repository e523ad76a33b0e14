"""The tables of methods and families in the documents name what the code has: no more, no less, with its defaults."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fitune.core.config import RunConfig
from fitune.models import families, methods
from fitune.models.families import towers

DOCS = Path(__file__).parents[2] / "docs"
LANGUAGES = pytest.mark.parametrize("language", ["", ".zh-CN"])


def table(page: str, language: str) -> list[list[str]]:
    """Cells of the first table of a page, without its head."""
    text = (DOCS / f"{page}{language}.md").read_text(encoding="utf-8")
    first = re.split(r"\n(?=\|)", text, maxsplit=1)[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in first.splitlines()[2:]]


def wrong_methods(rows: list[list[str]]) -> list[str]:
    """What a table of methods has otherwise than the code."""
    names = [row[0] for row in rows]
    wrong = sorted({*names} ^ {*methods.TABLE, "peft:TYPE"})
    empty = RunConfig.model_construct()
    for row in rows:
        for group, field, value in re.findall(r"`(\w+)\.(\w+)(?:=\w+)?`(?: (\d+))?", row[2]):
            options = RunConfig.model_fields[group].get_default(call_default_factory=True) if group else empty
            if not hasattr(options, field) or (value and getattr(options, field) != int(value)):
                wrong.append(f"{group}.{field} {value}")
    return wrong


def names_in(text: str) -> set[str]:
    """Names of a list such as `llava (next, video), gemma3`: in brackets stand endings."""
    found: set[str] = set()
    for name, endings in re.findall(r"([a-z][\w.]*)(?:\s?[(（]([^)）]*)[)）])?", text):
        found |= {name, *(f"{name}_{end}" for end in re.findall(r"\w+", endings))}
    return found


@LANGUAGES
def test_the_table_of_methods_is_the_codes(language: str) -> None:
    rows = table("methods", language)
    assert wrong_methods(rows) == []
    assert wrong_methods(rows[1:]) == [rows[0][0]]  # a method that is missing is found
    planted = [*rows[:-1], [rows[-1][0], "", "`freeze.blocks` 7, `lora.nothing`", ""]]
    assert wrong_methods(planted) == ["freeze.blocks 7", "lora.nothing "]


@LANGUAGES
def test_the_table_of_families_names_every_one(language: str) -> None:
    rows = table("models", language)
    plain = {name for row in rows for name in names_in(row[0])}
    assert {name.removesuffix("_text") for name in families.TABLE} <= plain
    others = {"video_llava": "llava_video", "vipllava": "llava_vip"}  # as the table shortens them
    assert {others.get(name, name) for name in towers.TABLE} <= plain
