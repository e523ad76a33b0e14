"""docs/troubleshooting.md: every message that it cites is one that code raises, and both languages have the same."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from fitune.core import errors
from support.gpu_scripts import load

messages: Any = load("messages")
ENGLISH, CHINESE = messages.PAGES
ROOT = Path(__file__).parents[2]


def test_every_message_is_raised_and_both_pages_have_it() -> None:
    here = [one for one in messages.cited(ENGLISH) if not one.home]
    assert len(here) >= 60
    wrong = [
        one.text for one in here if not messages.raised(one.text) or len(messages._bare(one.text)) < messages.LEAST
    ]
    assert wrong == []
    assert messages.cited(ENGLISH) == messages.cited(CHINESE)


def test_every_kind_of_error_has_a_message_there() -> None:
    def kinds(kind: type[BaseException]) -> set[str]:
        return {kind.__name__}.union(*(kinds(below) for below in kind.__subclasses__()))

    there = {
        kind for one in messages.cited(ENGLISH) if not one.home for m in messages.raised(one.text) for kind in m.kinds
    }
    listed = {name for name in kinds(errors.FituneError) if hasattr(errors, name)} - {"FituneError", "Problems"}
    assert listed | {"Finding", "FieldError", "InUseError"} <= there
    assert "… problems" in ENGLISH.read_text(encoding="utf-8")


def test_a_message_that_nothing_raises_is_found(tmp_path: Path) -> None:
    """Planted: a message that is gone, one of another package that is gone, and one too short to be found by."""
    page = tmp_path / "page.md"
    page.write_text(
        "| `the model is not finite before training: …` | why | what |\n"
        "| `the model is not finite after training: …` | why | what |\n"
        "| `: …  a` | why | what |\n"
        "| ``has a `tick` in it that no file has`` | `torch.amp.grad_scaler` | why | here |\n"
        "| `Attempting to unscale FP16 gradients.` | `torch.amp.grad_scaler` | why | here |\n",
        encoding="utf-8",
    )
    assert messages.wrong(page) == [
        "page.md: no code of fitune: the model is not finite after training: …",
        "page.md: too short to be found by: : …  a",
        "page.md: torch.amp.grad_scaler: has a `tick` in it that no file has",
    ]


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="torch's libraries have other names there")
def test_messages_of_other_packages_stand_in_their_files() -> None:
    other = [one for one in messages.cited(ENGLISH) if one.home]
    found = [messages.stands_in(one.text, one.home) for one in other]
    assert False not in found
    assert found.count(True) >= len(other) - 1  # CUDA's library is not in a build for CPUs


def test_every_setting_that_the_pages_name_is_one() -> None:
    known = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src" / "fitune" / "cli").glob("*.py"))
    fields = (ROOT / "src" / "fitune" / "core" / "config.py").read_text(encoding="utf-8")
    options = (ROOT / "src" / "fitune" / "core" / "options.py").read_text(encoding="utf-8")
    for page in messages.PAGES:
        for flag in set(re.findall(r"`--([a-z][a-z.-]*)", page.read_text(encoding="utf-8"))):
            name = flag.rpartition(".")[2].replace("-", "_")
            assert re.search(rf"\b{name}\b *[:=]", known + fields + options), flag
