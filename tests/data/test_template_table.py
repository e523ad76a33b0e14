"""Trained = served: every kind of template in every situation, and the page that says so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fitune.data.encode import Encoder
from fitune.data.templates import TABLE
from support import served
from support.served import Cell
from support.served_kinds import KINDS
from support.served_page import Refusals, cells, cells_of, lines, sign
from support.served_rows import THEMES, row_of

DOCS = Path(__file__).parents[2] / "docs"
BEGIN, END = "<!-- scripts/templates_table.py -->\n", "\n<!-- end -->"
pytestmark = pytest.mark.unit

SITUATIONS = [(theme, one) for theme, situations in THEMES.items() for one in situations]


@pytest.mark.parametrize(("theme", "situation"), SITUATIONS)
def test_what_is_trained_is_what_is_served(theme: str, situation: str) -> None:
    """By every kind of template; or the row is refused, by a message that names the row, and the template or field."""
    found = cells_of(theme, situation)
    assert not {name: cell.why for name, cell in found.items() if cell.how == "differs"}
    for name, cell in found.items():
        if cell.how == "refused":
            assert cell.why.startswith("rows.jsonl:7:"), name
            assert "template" in cell.why.splitlines()[0] or "messages[" in cell.why.splitlines()[0], name
            assert "fix:" in cell.why, name


@pytest.mark.parametrize("language", ["", ".zh-CN"])
def test_the_page_says_what_is_found(language: str) -> None:
    text = (DOCS / f"templates{language}.md").read_text(encoding="utf-8")
    table = text.split(BEGIN)[1].split(END)[0]
    assert table == "\n".join(lines(cells(), language)), "python scripts/templates_table.py --write"


# ---- planted faults: the judge finds each ----

PLAIN = row_of("turns", "several turns")


def judged_with(monkeypatch: pytest.MonkeyPatch, change: Any, name: str = "Qwen2.5", row: Any = PLAIN) -> Cell:
    """A cell, with every sample changed."""
    real = Encoder.samples
    monkeypatch.setattr(Encoder, "samples", lambda self, one: [change(sample) for sample in real(self, one)])
    return served.judged(name, row)


def _shifted(sample: Any) -> Any:
    return replace(sample, mask=np.roll(sample.mask, 1))


def _no_stop(sample: Any) -> Any:
    last = int(np.flatnonzero(sample.mask)[-1])
    return replace(sample, mask=np.concatenate([sample.mask[:last], [False], sample.mask[last + 1 :]]))


def _another_id(sample: Any) -> Any:
    ids = sample.ids.copy()
    ids[3] += 1
    return replace(sample, ids=ids)


def _first_token_twice(sample: Any) -> Any:
    return replace(sample, ids=np.append(sample.ids[:1], sample.ids), mask=np.append(False, sample.mask))


KINDS_OF_SERVERS = {
    "Qwen2.5": "same",
    "`--template llama2`": "same",
    "`--template bloom`": "pieces",
    "`--template chatglm`": "each",
    "`--template chatglm2`": "each",
    "`--template chatglm3`": "same",
}


@pytest.mark.parametrize("name", KINDS_OF_SERVERS)
@pytest.mark.parametrize("fault", [_shifted, _no_stop, _another_id, _first_token_twice])
def test_a_sample_that_is_wrong_is_found(fault: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert served.judged(name, PLAIN).how == KINDS_OF_SERVERS[name]
    assert judged_with(monkeypatch, fault, name).how == "differs"


ROUNDS = {"first_round": 3, "gap": "\n\n\n", "before": ()}


@pytest.mark.parametrize("field", ROUNDS)
def test_rounds_that_are_not_the_published_ones_are_found(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "`--template chatglm2`"
    encoder = served.encoder_of(name, "2026-01-05")
    wrong = Encoder(encoder.tokenizer, replace(TABLE["chatglm2"], **{field: ROUNDS[field]}))  # type: ignore[type-var]  # a dataclass
    assert served.judged(name, PLAIN).how == "each"
    monkeypatch.setattr(served, "encoder_of", lambda name, date: wrong)
    assert served.judged(name, PLAIN).how == "differs"


def test_every_named_template_has_its_row() -> None:
    assert {kind.named for kind in KINDS.values()} - {""} == set(TABLE)


def test_a_template_that_is_not_the_servers_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = served.encoder_of("Qwen2.5", "2026-01-05")
    own = str(encoder.tokenizer.chat_template)
    monkeypatch.setattr(served, "encoder_of", lambda name, date: encoder)
    assert served.judged("Qwen2.5", PLAIN).how == "same"
    encoder.tokenizer.chat_template = own.replace("You are Qwen.", "You are Qwen!")
    assert served.judged("Qwen2.5", PLAIN).how == "differs"
    encoder.tokenizer.chat_template = own


def test_a_cell_that_differs_stands_in_the_page_as_it_is() -> None:
    assert sign(Cell("differs", "id 3"), Refusals()) == "differs: id 3"
