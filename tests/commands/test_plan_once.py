"""What a plan does once: the data is read once and no question is traced twice, also where it misses."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fitune
from fitune.commands import plan as planning
from fitune.commands.savers import what_helps
from fitune.core.config import RunConfig
from fitune.data import pipeline as dataset
from fitune.data import rows
from fitune.memory import plan as plans
from support import tiny

Count = Callable[..., Counter[str]]


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Count:
    """Counts the calls of a function, by what `key` says of each."""

    def counting(module: Any, name: str, key: Callable[..., str] = lambda *args, **kwargs: "all") -> Counter[str]:
        real, found = getattr(module, name), Counter[str]()

        def called(*args: Any, **kwargs: Any) -> Any:
            found[key(*args, **kwargs)] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, called)
        return found

    return counting


def settings_of(work: plans.Work, *rest: Any) -> str:
    batches = [[len(batch.ids) for batch in step] for step in work.steps]
    return f"{work.config.model_dump_json()} {batches}"


def test_a_miss_reads_its_data_and_traces_each_question_once(tmp_path: Path, count: Count) -> None:
    model = str(tiny.save("llama", tmp_path / "model"))
    data = str(tiny.write_rows(tmp_path / "rows.jsonl", 12))
    read, loaded = count(dataset, "read"), count(rows, "load")
    traced = count(plans, "traced", settings_of)
    found = planning.answer(model, data=data, gpu="726MiB", method="lora", batch_size=4)
    assert found.plan.fits is False
    helps = what_helps(found)
    assert len(traced) > 5  # savers are tried
    assert read["all"] == loaded["all"] == 1
    assert max(traced.values()) == 1, traced.most_common(2)
    assert helps.missing == -(found.plan.spare or 0)


# ---- settings as a whole ----


def test_python_plans_a_config_and_a_yaml_file(tmp_path: Path) -> None:
    model = str(tiny.save("llama", tmp_path / "model"))
    data = str(tiny.write_rows(tmp_path / "rows.jsonl", 12))
    settings: dict[str, Any] = {
        "model": model,
        "data": [data],
        "method": "full",
        "batch_size": 2,
        "output": str(tmp_path / "run"),
    }
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(settings))  # JSON is YAML
    whole = fitune.plan(RunConfig(**settings), gpu="24GB")
    assert whole.method == "full"
    assert fitune.plan(file, gpu="24GB") == fitune.plan(str(file), gpu="24GB") == whole
    assert fitune.plan(model, data=data, gpu="24GB", method="full", batch_size=2) == whole
    assert fitune.plan(file, gpu="24GB", method="lora").method == "lora"  # beside it, it wins


@pytest.mark.parametrize("verb", [fitune.plan, fitune.train])
def test_what_is_no_config_is_refused(verb: Callable[..., Any]) -> None:
    with pytest.raises(fitune.FituneError) as caught:
        verb({"model": "llama-3.2-1b"})
    text = str(caught.value)
    for part in ("received: dict", "expected: a RunConfig, or the path of a YAML file", "fix:"):
        assert part in text
