"""Planted regressions and clean runs are judged as they should be: the record, and some of them once more."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("verdicts", ROOT / "scripts" / "verdicts.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["verdicts"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_record_is_of_these_cases_and_all_are_as_they_should_be(script: ModuleType) -> None:
    record = json.loads(script.RESULT.read_text(encoding="utf-8"))
    assert [(one["name"], one["seed"]) for one in record["cases"]] == [
        (case.name, case.seed) for case in script.cases()
    ]
    assert (record["planted"], record["found"], record["clean"], record["false_alarms"]) == (20, 20, 20, 0)
    assert all(one["right"] for one in record["cases"])


@pytest.mark.full
@pytest.mark.parametrize("name", ["wrong facts", "one answer", "clean"])
def test_it_comes_out_again(script: ModuleType, name: str, tmp_path: Path) -> None:
    some = [case for case in script.cases() if case.name == name][:2]
    assert all(one.right for one in script.tried(some, tmp_path))
