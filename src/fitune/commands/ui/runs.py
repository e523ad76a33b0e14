"""Tasks three and four of the page: runs. They are begun, paused, stopped and resumed, watched, and compared.

In: run folders, and the locks of the processes that work in them. Out: what their files hold. Nothing is kept here:
whoever opens the page again, or starts another server, sees the same.

Pausing lets the step in progress end and saves it; stopping ends the process at once, and the run goes on from its last
checkpoint. Both free the memory, and `fitune train --resume` goes on from there to the same bits.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import psutil
from pydantic import Field

from fitune.checks import early
from fitune.commands.serve.errors import Refused
from fitune.commands.ui.paths import Roots
from fitune.commands.ui.planned import train_arguments, train_command
from fitune.commands.ui.processes import Processes
from fitune.commands.ui.settings import Form, Wanted, command
from fitune.core import locks
from fitune.core.errors import FituneError
from fitune.engine.checkpoint import RunFolder
from fitune.views import run_records

PIECE = 1 << 20  # bytes of steps.jsonl in one answer


class Begun(Wanted):
    """A run that is to begin. name: of its folder; none: one is found."""

    name: str = Field(default="", max_length=80, pattern=r"^[\w][\w.-]*$|^$")


class Act(Form):
    """What is to become of a run."""

    run: str = Field(max_length=400)
    action: Literal["pause", "stop", "resume"]


def begin(wanted: Begun, roots: Roots, processes: Processes) -> dict[str, object]:
    """Start a run in a process of its own.

    Raises:
        FituneError: all that is wrong with it, as far as it can be seen before torch is loaded.
    """
    name = free_name(roots, processes, wanted.name or default_name(wanted), given=bool(wanted.name))
    evaluated = {"eval_data": wanted.eval_data} if wanted.eval_data else {}
    early.checked(
        {**wanted.settings, "model": wanted.model, "data": wanted.data, **evaluated, "output": str(roots.runs / name)}
    )
    arguments = train_arguments(wanted, roots.shown(roots.runs / name))
    processes.start(name, arguments)
    return {"run": name, "command": command(*arguments)}


def preview(wanted: Begun, roots: Roots, processes: Processes) -> str:
    """The command that would start it."""
    name = wanted.name or free_name(roots, processes, default_name(wanted), given=False)
    return train_command(wanted, roots.shown(roots.runs / name))


def default_name(wanted: Wanted) -> str:
    """As `fitune train` calls its runs: by model and method."""
    model = re.sub(r"[^\w.-]", "_", Path(wanted.model.rstrip("/\\")).name).lstrip("._-")
    return f"{model[:50] or 'run'}-{re.sub(r'[^A-Za-z0-9-]', '-', str(wanted.settings.get('method', 'lora')))}"


def free_name(roots: Roots, processes: Processes, name: str, *, given: bool) -> str:
    """A name that no run has.

    Raises:
        Refused: the one that was given is taken.
    """

    def is_taken(one: str) -> bool:
        return os.path.lexists(roots.runs / one) or processes.works(one)

    if given:
        if is_taken(name):
            raise Refused(400, f"{name}: is there already; expected: a name that no run has", param="name")
        return name
    number = 1
    while is_taken(f"{name}-{number}"):
        number += 1
    return f"{name}-{number}"


def act(asked: Act, roots: Roots, processes: Processes) -> dict[str, object]:
    """Pause, stop or resume.

    Raises:
        Refused: there is no such run, or nothing to do.
        InUseError: another process works in its folder.
    """
    if asked.action != "resume" and processes.works(asked.run) and locks.holder(roots.runs / asked.run) is None:
        processes.end(asked.run)  # it only loads, and has done nothing yet
        return {"run": asked.run, "command": ""}
    folder = roots.run(asked.run)
    if asked.action == "resume":
        early.resumed(folder)
        arguments = ["train", "--resume", "--output", roots.shown(folder)]
        processes.start(asked.run, arguments)
        return {"run": asked.run, "command": command(*arguments)}
    process = locks.process(folder)
    if process is None:
        raise Refused(400, f"{asked.run}: no process of this machine works on it", param="run")
    _end(process, at_once=asked.action == "stop")
    return {"run": asked.run, "command": stop_command(process, at_once=asked.action == "stop")}


def _end(process: int, *, at_once: bool) -> None:
    """A first signal lets the step in progress end and be saved, a second one ends the run at once."""
    for _ in range(1 + at_once):
        with suppress(OSError):  # it has ended already
            os.kill(process, signal.SIGTERM)


def stop_command(process: int, *, at_once: bool = False) -> str:
    """What one types for the same."""
    return f"kill {process} {process}" if at_once else f"kill {process}"


# ---- what is shown ----


def listed(roots: Roots, processes: Processes) -> list[dict[str, object]]:
    """A row for each run, those that only begin first."""
    there = list(roots.run_names())
    early_on = [name for name in processes.names() if name not in there and not name.startswith(EXPORT)]
    return [*(starting(name, processes) for name in early_on), *(_row(name, roots, processes) for name in there)]


EXPORT = "export:"  # before the names of processes that are no runs


def starting(name: str, processes: Processes) -> dict[str, object]:
    """A run whose folder is not there yet, or never came."""
    return {"name": name, "state": "starting" if processes.works(name) else "failed"}


def _row(name: str, roots: Roots, processes: Processes) -> dict[str, object]:
    run = RunFolder(roots.runs / name)
    row: dict[str, object] = {"name": name, "path": roots.shown(run.path)}
    row["state"] = state_of(run.path, begins=processes.works(name))
    result = run.path / "result.json"
    return row | _facts(run.path, result.stat().st_mtime_ns if result.is_file() else None)


@lru_cache(4096)
def _facts(folder: Path, finished: int | None) -> dict[str, object]:
    """What the table shows of a run; read once, until it is finished anew (by the time of its result)."""
    run, row = RunFolder(folder), dict[str, object]()
    try:
        config = run.read_config()
        row |= {"model": Path(config.model).name, "method": config.method, "quant": config.quant.name}
        row |= {"precision": config.precision, "batch_size": config.batch_size, "lr": config.lr}
        if run.has("result"):
            result = run_records.result_of(run)
            row |= {
                "steps": result.steps, "before": result.held_out_loss_before, "after": result.held_out_loss_after,
                "last_loss": result.last_loss, "speed": result.real_tokens_per_second, "seconds": result.seconds,
                "peak_mib": result.peak_memory_mib, "expected_mib": result.expected_memory_mib,
            }  # fmt: skip
    except FituneError as error:
        row |= {"state": "broken", "problem": str(error)}
    return row


def state_of(folder: Path, *, begins: bool = False) -> str:
    """running, finished, or stopped: it can go on. begins: a process is there that will work in the folder."""
    if locks.holder(folder) is not None:
        return "running"
    if begins and not (folder / "result.json").is_file():
        return "starting"
    return "finished" if (folder / "result.json").is_file() else "stopped"


def shown(name: str, roots: Roots, processes: Processes) -> dict[str, object]:
    """A run as a whole.

    Raises:
        Refused: there is none.
    """
    if name in processes.started and not (roots.runs / name / "config.yaml").is_file():
        return {**starting(name, processes), "log": processes.tail(name), "settings": {}, "commands": {}}
    folder = roots.run(name)
    run, path = RunFolder(folder), roots.shown(folder)
    process, config = locks.process(folder), run.read_config()
    plan = run.read("plan") if run.has("plan") else {}
    return {
        **_row(name, roots, processes),
        "log": processes.tail(name),
        "settings": flat(config.model_dump(mode="json")),
        "total": config.max_steps,
        "epochs": config.epochs,
        "held_out_before": _held_out_before(run),
        "planned": {key: plan.get(key) for key in ("needed", "budget", "device")},
        "memory": _resident(process) if plan.get("device") == "cpu" else None,  # of a GPU this process sees nothing
        "findings": [asdict(one) for one in _findings(run)],
        "answers": [one.as_dict() for one in run_records.answers_of(run)],
        "report": run.report.is_file(),
        "commands": {
            "resume": command("train", "--resume", "--output", path),
            "pause": "" if process is None else stop_command(process),
            "chat": command("chat", path, "--compare"),
        },
    }


def _held_out_before(run: RunFolder) -> object:
    return run.read("before").get("held_out_loss") if run.has("before") else None


def _findings(run: RunFolder) -> list[Any]:
    return [one for one in run_records.data_of(run).findings if one.level != "ok"] if run.has("data") else []


def _resident(process: int | None) -> int | None:
    """Bytes of main memory that a process holds."""
    with suppress(psutil.Error):
        return None if process is None else int(psutil.Process(process).memory_info().rss)
    return None


def flat(settings: Mapping[str, Any], above: str = "") -> dict[str, object]:
    """Settings of groups under names such as lora.rank."""
    found: dict[str, object] = {}
    for name, value in settings.items():
        found |= flat(value, f"{above}{name}.") if isinstance(value, Mapping) and value else {f"{above}{name}": value}
    return found


def steps(name: str, roots: Roots, start: int) -> dict[str, object]:
    """The steps that were logged behind a place in the file.

    Args:
        name: of the run.
        roots: the folders of the page.
        start: bytes that were read before.

    Raises:
        Refused: there is no such run.
    """
    path = RunFolder(roots.run(name)).steps
    size = path.stat().st_size if path.is_file() else 0
    start = start if 0 <= start <= size else 0  # a run that went on from a checkpoint has a shorter log
    content = b""
    if size > start:
        with path.open("rb") as file:
            file.seek(start)
            content = file.read(PIECE)
    whole = content[: content.rfind(b"\n") + 1]
    records = []
    for line in whole.splitlines():
        with suppress(ValueError):
            records.append(json.loads(line))
    return {
        "from": start,
        "next": start + len(whole),
        "more": start + len(whole) < size and bool(whole),
        "steps": records,
    }
