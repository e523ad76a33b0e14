"""What the search ranks by is what the benchmarks measured, packed into the package and not typed again."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from fitune.memory import search

SCRIPT = Path(__file__).parents[2] / "scripts" / "pack_results.py"


def test_the_packed_results_are_those_of_the_benchmarks() -> None:
    spec = importlib.util.spec_from_file_location("pack_results", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert json.loads(script.PACKED.read_text(encoding="utf-8")) == script.packed()


@pytest.mark.parametrize("name", search.WAYS)
def test_every_way_has_a_result(name: str) -> None:
    assert 0.5 < search.measured()["accuracy"][search.WAYS[name][1]] <= 1
