"""Runs as the page's server shows and moves them, chat, and what is downloaded; without a browser."""

from __future__ import annotations

import io
import json
import os
import shutil
import threading
import time
import zipfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from fitune.commands import ui
from fitune.commands.ui import runs
from fitune.commands.ui.processes import Processes
from fitune.commands.ui.talk import Question, Talk, Turn
from fitune.engine.turns import Turns
from support import page as pages
from support import page_runs
from support.page import Asked, Site, post

POSIX = pytest.mark.skipif(os.name == "nt", reason="links and paths of POSIX")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    work = page_runs.workplace(tmp_path_factory.mktemp("work"))
    with pages.inside(work), ui.running(ui.roots_of()) as address:
        yield Site(address, work)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """What would be started, in place of the processes."""
    found: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(Processes, "start", lambda self, name, arguments: found.append((name, list(arguments))))
    return found


def test_the_table_has_every_run(site: Site) -> None:
    found = {one["name"]: one for one in site.json("api/runs")["runs"]}
    assert {name: one["state"] for name, one in found.items()} == {"first": "finished", "second": "finished"}
    assert found["first"]["steps"] == page_runs.STEPS
    assert found["first"]["lr"] == page_runs.RATE


def test_a_run_with_its_steps_piece_by_piece(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = site.json("api/steps?run=first&from=0")
    assert [one["step"] for one in whole["steps"]] == list(range(1, page_runs.STEPS + 1))
    assert not whole["more"]
    monkeypatch.setattr(runs, "PIECE", 400)
    pieces, at = [], 0
    while True:
        found = site.json(f"api/steps?run=first&from={at}")
        pieces += found["steps"]
        at = found["next"]
        if not found["more"]:
            break
    assert pieces == whole["steps"]
    assert site.json("api/steps?run=first&from=99999999")["from"] == 0  # a log that became shorter is read anew
    seen = site.json("api/run?run=first")
    assert seen["settings"]["lora.rank"] == 8
    assert seen["commands"]["chat"] == "fitune chat runs/first --compare"
    assert seen["held_out_before"] > 0


def test_a_run_begins_by_the_command_that_is_shown(site: Site, started: list[tuple[str, list[str]]]) -> None:
    wanted = {"model": "model", "data": ["rows.jsonl"], "settings": {"max_steps": 2, "lr": 0.001}}
    found = site.json("api/begin", wanted)
    assert found == {
        "run": "model-lora-1",
        "command": "fitune train --model model --data rows.jsonl --max-steps 2 --lr 0.001 --output runs/model-lora-1",
    }
    assert started == [("model-lora-1", found["command"].split()[1:])]
    assert site.json("api/begin", {**wanted, "name": "mine"})["run"] == "mine"


def test_the_command_is_shown_before_it_runs(site: Site) -> None:
    wanted = {"model": "model", "data": ["rows.jsonl"], "eval_data": ["rows.jsonl"], "settings": {"lora": {"rank": 4}}}
    found = site.json("api/command", {**wanted, "more": "lora.alpha=32 epochs=1", "name": "mine"})["command"]
    assert found == (
        "fitune train --model model --data rows.jsonl --eval-data rows.jsonl --lora.rank 4 --lora.alpha 32 --epochs 1 "
        "--output runs/mine"
    )


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"name": "first"}, "is there already"),
        ({"name": "../first"}, "name"),
        ({"data": []}, "data"),
        ({"settings": {"batch_size": 0, "lr": -1}}, "batch_size: wrong value"),
        ({"settings": {"method": "lora", "force": True, "output": "x"}}, "no setting of this page"),
        ({"more": "output=x"}, "no setting of this page"),
        ({"more": "warmup"}, "key=value"),
        ({"more": "'"}, "further settings"),
    ],
)
def test_a_run_that_cannot_be_does_not_begin(
    site: Site, started: list[tuple[str, list[str]]], change: dict[str, object], problem: str
) -> None:
    status, body = site.answer(post("api/begin", {"model": "model", "data": ["rows.jsonl"], **change}))
    assert status == 400
    assert problem in json.loads(body)["error"]["message"]
    assert started == []


def test_a_run_under_way_is_seen_paused_stopped_and_resumed(
    site: Site, started: list[tuple[str, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    signals: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda process, number: signals.append((process, number)))
    with page_runs.under_way(site.work) as step:
        step(1, 3.0)
        seen = site.json("api/run?run=live")
        assert (seen["state"], seen["memory"] > 0) == ("running", True)
        assert seen["commands"]["pause"] == f"kill {os.getpid()}"
        at = site.json("api/steps?run=live&from=0")["next"]
        step(2, 2.0)
        assert [one["loss"] for one in site.json(f"api/steps?run=live&from={at}")["steps"]] == [2.0]
        site.json("api/act", {"run": "live", "action": "pause"})
        assert len(signals) == 1
        site.json("api/act", {"run": "live", "action": "stop"})
        assert [process for process, _ in signals] == 3 * [os.getpid()]  # a second signal ends it at once
        status, body = site.answer(post("api/act", {"run": "live", "action": "resume"}))
        assert (status, b"another process works" in body) == (400, True)
    assert site.json("api/run?run=live")["state"] == "stopped"
    assert site.answer(post("api/act", {"run": "live", "action": "pause"}))[0] == 400
    assert site.json("api/act", {"run": "live", "action": "resume"})["command"] == (
        "fitune train --resume --output runs/live"
    )
    assert started == [("live", ["train", "--resume", "--output", "runs/live"])]


def test_a_process_of_its_own_and_its_log(site: Site, tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('taken from the working folder')")
    processes = Processes(tmp_path / "logs", tmp_path)
    processes.start("one", ["reseal", "nowhere"])
    process = processes.started["one"]
    if os.name != "nt":
        assert os.getpgid(process.pid) != os.getpgid(0)  # what ends the page's server does not end it
    assert process.wait(120) == 2
    assert "nowhere" in processes.tail("one")
    assert processes.code("one") == 2
    assert not processes.works("one")
    assert runs.starting("one", processes) == {"name": "one", "state": "failed"}


def pieces(site: Site, **asked: Any) -> list[dict[str, str]]:
    """An answer as it comes."""
    status, body = site.answer(post("api/chat", {"messages": [{"role": "user", "content": "one plus two"}], **asked}))
    assert status == 200, body
    return [json.loads(line) for line in body.decode().splitlines()]


def test_base_and_tuned_answer_in_pieces(site: Site) -> None:
    tuned, base = (pieces(site, run="first", base=base, max_new_tokens=8) for base in (False, True))
    for found in (tuned, base):
        assert len(found) > 2
        assert "".join(one["text"] for one in found[:-1]).strip() == found[-1]["answer"].strip()
    assert tuned[-1] != base[-1]
    assert site.json("api/drop", {}) == {}


def test_base_and_tuned_answer_at_once_and_as_they_would_alone(site: Site, tmp_path: Path) -> None:
    """Their tokens come in turns, and no answer changes by the other one beside it; then another run's model comes."""
    talk, seen = Talk(Turns()), list[str]()
    answers: dict[str, str] = {}

    def ask(name: str, folder: Path) -> None:
        turn = Turn(role="user", content="one plus two")
        asked = Question(run="first", messages=[turn], base=name == "base", max_new_tokens=12)
        answers[name] = talk.answer(asked, folder, lambda piece: seen.append(name))

    first = site.work / "runs" / "first"
    asked = {"base": first, "tuned": first, "other": shutil.copytree(first, tmp_path / "other")}
    threads = [threading.Thread(target=ask, args=one) for one in asked.items()]
    with talk.turns:
        for number, thread in enumerate(threads, 1):
            thread.start()
            while len(talk.turns._queue) <= number:
                time.sleep(0.001)
    for thread in threads:
        thread.join(120)
    both = [name for name in seen if name != "other"]
    assert sum(a != b for a, b in pairwise(both)) >= 6  # one after the other: once
    assert seen.index("other") > max(n for n, name in enumerate(seen) if name != "other")
    assert talk.running == 0
    together = dict(answers)
    for one in asked.items():
        ask(*one)
    assert together == answers
    assert answers["base"] != answers["tuned"] == answers["other"]


def test_a_chat_that_cannot_be_says_why(site: Site) -> None:
    assert site.answer(post("api/chat", {"run": "nowhere", "messages": [{"role": "user", "content": "x"}]}))[0] == 404
    wrong = [{"role": "robot", "content": "x"}]
    assert site.answer(post("api/chat", {"run": "first", "messages": wrong}))[0] == 400
    long = [{"role": "user", "content": "one plus two " * 9000}]
    _, body = site.answer(post("api/chat", {"run": "first", "messages": long}))
    assert "error" in json.loads(body.decode().splitlines()[-1])


@pytest.mark.parametrize(
    ("asked", "command"),
    [
        ({"to": "merge"}, "fitune merge runs/first --output runs/exports/first-merge-1"),
        (
            {"to": "gguf", "type": "q8_0"},
            "fitune export runs/first --to gguf --type q8_0 --output runs/exports/first-gguf-1.gguf",
        ),
        ({"to": "vllm"}, "fitune export runs/first --to vllm --output runs/exports/first-vllm-1"),
    ],
)
def test_an_export_by_the_command_that_is_shown(
    site: Site, started: list[tuple[str, list[str]]], asked: dict[str, str], command: str
) -> None:
    found = site.json("api/export", {"run": "first", **asked})
    assert found["command"] == command
    assert started == [(f"export:{found['name']}", command.split()[1:])]


def test_an_adapter_and_a_file_are_downloaded(site: Site) -> None:
    status, body = site.answer(Asked("GET", f"api/download?path={quote('runs/first/adapter')}"))
    assert status == 200
    with zipfile.ZipFile(io.BytesIO(body)) as found:
        assert found.testzip() is None
        name = "adapter/adapter_model.safetensors"
        assert found.read(name) == (site.work / "runs" / "first" / name).read_bytes()
    exports = site.work / "runs" / "exports"
    exports.mkdir(exist_ok=True)
    (exports / "a.gguf").write_bytes(b"GGUF" * 1000)
    assert site.answer(Asked("GET", "api/download?path=runs/exports/a.gguf"))[1] == b"GGUF" * 1000
    assert [one["name"] for one in site.json("api/exports")["exports"]] == ["a.gguf"]


@POSIX
@pytest.mark.parametrize(
    "path",
    ["runs", "runs/first", "runs/first/config.yaml", "runs/exports", "rows.jsonl", "model", "runs/exports/link",
     "/etc/passwd", "runs/exports/../../rows.jsonl", "runs/first/checkpoints"],
)  # fmt: skip
def test_nothing_else_is_downloaded(site: Site, path: str) -> None:
    exports = site.work / "runs" / "exports"
    exports.mkdir(exist_ok=True)
    if not (exports / "link").is_symlink():
        (exports / "link").symlink_to("/etc/passwd")
    assert site.answer(Asked("GET", f"api/download?path={quote(path)}"))[0] in (400, 403, 404)
    (exports / "link").unlink()


@POSIX
def test_a_link_to_a_run_elsewhere_is_none(site: Site, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text((site.work / "runs" / "first" / "config.yaml").read_text())
    link = site.work / "runs" / "linked"
    link.symlink_to(tmp_path)
    try:
        assert "linked" not in {one["name"] for one in site.json("api/runs")["runs"]}
        assert site.answer(Asked("GET", "api/run?run=linked"))[0] == 403
    finally:
        link.unlink()


@POSIX
def test_a_link_in_an_adapter_does_not_come_along(site: Site) -> None:
    link = site.work / "runs" / "second" / "adapter" / "link.json"
    link.symlink_to(site.work / "rows.jsonl")
    try:
        _, body = site.answer(Asked("GET", "api/download?path=runs/second/adapter"))
        assert not [name for name in zipfile.ZipFile(io.BytesIO(body)).namelist() if "link" in name]
    finally:
        link.unlink()


def test_a_report_can_call_nobody(site: Site) -> None:
    from http.client import HTTPConnection
    from urllib.parse import urlsplit

    parts = urlsplit(site.address)
    connection = HTTPConnection(str(parts.hostname), parts.port)
    connection.request("GET", f"{parts.path}api/report?run=first")
    answered = connection.getresponse()
    policy = answered.getheader("content-security-policy") or ""
    assert policy.startswith("sandbox allow-scripts; default-src 'none'")
    assert "connect-src" not in policy
    assert b"held-out loss" in answered.read()


@pytest.mark.full
def test_a_run_from_begin_to_end_in_its_own_process(site: Site) -> None:
    """Begun, paused, resumed, finished, exported: by real processes."""
    settings = {"max_steps": 400, "batch_size": 2, "eval_every": 50, "epochs": 400.0}
    name = site.json("api/begin", {"model": "model", "data": ["rows.jsonl"], "settings": settings, "name": "long"})[
        "run"
    ]

    def until(state: str) -> dict[str, Any]:
        for _ in range(600):
            found: dict[str, Any] = site.json(f"api/run?run={name}")
            if found["state"] == state:
                return found
            assert found["state"] in ("starting", "running", "stopped"), found
            time.sleep(0.2)
        raise AssertionError(found)

    until("running")
    while not site.json(f"api/steps?run={name}&from=0")["steps"]:
        time.sleep(0.1)
    site.json("api/act", {"run": name, "action": "pause"})
    until("stopped")
    done = len(site.json(f"api/steps?run={name}&from=0")["steps"])
    assert 0 < done < 400
    site.json("api/act", {"run": name, "action": "resume"})
    assert until("finished")["steps"] == 400
    made = site.json("api/export", {"run": name, "to": "merge"})["name"]
    for _ in range(600):
        found = {one["name"]: one for one in site.json("api/exports")["exports"]}
        if found[made]["state"] != "running":
            break
        time.sleep(0.2)
    assert found[made]["state"] == "finished", found[made]["log"]
    assert (site.work / "runs" / "exports" / made / "model.safetensors").is_file()
