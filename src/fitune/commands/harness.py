"""fitune eval --tasks: a run, and its base, on tasks of lm-eval.

In: a run or a model, names of tasks, perhaps a folder of task files. Out: the tasks' own metrics. lm-eval makes the
requests and judges the answers; `harness_model.py` is the model that it asks.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from fitune.checks import leak
from fitune.checks.findings import raise_refused
from fitune.commands.evaluate import is_tuned
from fitune.core.errors import ConfigError
from fitune.core.events import Silent, Watcher
from fitune.core.imports import module
from fitune.core.records import Layout, Sample
from fitune.core.results import TaskScore, TaskScores
from fitune.engine.loading import load
from fitune.models.load import Tuned

SAME = 1e-4  # what log-probabilities of a prompt that stands once for several answers may differ by, relative
SHOWN = 20  # names of tasks in a message


@dataclass(frozen=True)
class Tasks:
    """What is asked. folder: of task files, beside lm-eval's own. limit: rows of each task. shots: examples before each
    question; None: as the task says."""

    names: Sequence[str]
    folder: Path | None = None
    limit: int | None = None
    shots: int | None = None


def on_tasks(
    run_or_model: str | Path,
    tasks: Tasks,
    *,
    loading: Mapping[str, str | None] | None = None,
    watch: Watcher | None = None,
) -> TaskScores:
    """Measure a run, beside its base, or a model.

    Args:
        run_or_model: a run folder, a model folder or a hub id.
        tasks: which.
        loading: model, device, precision, quant, template: as for `load`.
        watch: progress is reported to it.

    Raises:
        FituneError: lm-eval is not installed, there is no such task, or the model cannot be used.
    """
    watch = watch or Silent()
    if find_spec("lm_eval") is None:
        raise ConfigError("--tasks: the package lm-eval is not installed", fix="pip install 'fitune[eval]'")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = module("lm_eval.tasks").TaskManager(include_path=None if tasks.folder is None else str(tasks.folder))
    _check(tasks, manager)
    tuned = load(run_or_model, **(loading or {}))  # type: ignore[arg-type]  # the names are load's own
    layout = _layout(tuned)
    mine = _measured(tuned, layout, tasks, manager, watch, base=False)
    base = _measured(tuned, layout, tasks, manager, watch, base=True) if is_tuned(tuned) else {}
    scores = [TaskScore(*name, base.get(name, (None, None))[0], *values) for name, values in mine.items()]
    return TaskScores(str(run_or_model), scores)


def _check(tasks: Tasks, manager: Any) -> None:
    """Raises ConfigError for names that are none."""
    unknown = [name for name in tasks.names if not manager.match_tasks([name])]
    if unknown:
        own = sorted(manager.all_tasks) if tasks.folder is not None else []
        raise ConfigError(
            "--tasks: no such task",
            received=", ".join(unknown),
            expected=f"names of lm-eval's tasks, or of a folder of task files{f': {own[:SHOWN]}' if own else ''}",
            fix="`lm-eval ls tasks` lists them; --task-files DIR adds a folder",
        )


def _layout(tuned: Tuned) -> Layout:
    """How documents go through the model: in a flat batch, where they do not see each other there."""
    size = len(tuned.tokenizer)
    ids = [np.arange(n, n + 24, dtype=np.int32) * 7 % size for n in (5, 50)]
    layout, found = leak.packing_leak(tuned.model, [Sample(one, np.ones(len(one), np.bool_)) for one in ids])
    raise_refused([found])
    return layout


def _measured(
    tuned: Tuned, layout: Layout, tasks: Tasks, manager: Any, watch: Watcher, *, base: bool
) -> dict[tuple[str, str], tuple[float, float | None]]:
    """(task, metric) to its value and its standard error."""
    model = module("fitune.commands.harness_model").FlatLM(tuned, layout, watch, base=base)
    model.share = layout == "flat" and _may_share(model)
    how = {"num_fewshot": tasks.shots, "limit": tasks.limit, "bootstrap_iters": 1000, "log_samples": False}
    found = module("lm_eval").simple_evaluate(model=model, tasks=list(tasks.names), task_manager=manager, **how)
    scores: dict[tuple[str, str], tuple[float, float | None]] = {}
    for task, values in found["results"].items():
        for key, value in values.items():
            name, _, kind = key.partition(",")
            if isinstance(value, float) and not name.endswith("_stderr"):
                error = values.get(f"{name}_stderr,{kind}")
                scores[task, name] = value, error if isinstance(error, float) else None
    return scores


def _may_share(model: Any) -> bool:
    """May a prompt stand once for several answers? Tried on the model: some carry more than attention does."""
    size = len(model.tokenizer)
    prompt = [n * 11 % size for n in range(3, 35)]
    asked = [(("", ""), prompt, [n * 13 % size for n in range(start, start + 3)]) for start in (2, 40, 90)]
    results = []
    for model.share in (False, True):
        try:
            results.append([one for one, _ in model._loglikelihood_tokens(asked)])
        except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError):
            return False
    return all(abs(a - b) <= SAME * max(1.0, abs(a)) for a, b in zip(*results, strict=True))
