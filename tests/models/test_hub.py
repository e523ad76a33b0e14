"""Models from hubs: a small server on loopback that breaks, lies, refuses and dawdles, and folders that want code."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fitune.core.errors import ModelError
from fitune.models import hub
from fitune.models.configs import read_config
from fitune.models.hub import files
from fitune.models.locate import locate
from support import tiny
from support.command import run
from support.hub_server import SHA, Server, fetch


@pytest.mark.parametrize("name", ["org/name", "ms:org/name"])
def test_a_model_is_fetched_once_and_only_what_it_needs(name: str, server: Server, tmp_path: Path) -> None:
    code, result, error = fetch(server, tmp_path, name)
    assert code == 0, error
    folder = Path(result["folder"])
    there = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= there
    assert not there & {"pytorch_model.bin", "modeling_evil.py"}
    assert (folder / "model.safetensors").read_bytes() == (server.folder / "model.safetensors").read_bytes()
    assert result["revision"] == (SHA if name == "org/name" else "master")
    assert hub.revision_of(folder) == result["revision"]
    before = server.served["model.safetensors"]
    assert fetch(server, tmp_path, name)[0] == 0
    assert server.served["model.safetensors"] == before  # nothing twice
    code, offline, error = fetch(server, tmp_path, name, HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
    assert code == 0, error
    assert offline["folder"] == result["folder"]


@pytest.mark.parametrize("name", ["org/name", "ms:org/name"])
def test_a_transfer_that_breaks_is_gone_on_with(name: str, server: Server, tmp_path: Path) -> None:
    # the hub's client writes ten MB at a time: what is to be gone on with must be longer
    (server.folder / "model.safetensors").write_bytes(os.urandom(30 << 20))
    server.faults["breaks"] = 2
    for _ in range(4):
        code, result, _ = fetch(server, tmp_path, name)
        if code == 0:
            break
    assert code == 0
    ranges = [asked for _, path, asked in server.asked if asked and asked != "bytes=0-" and asked != "bytes=0-0"]
    assert ranges, "it began anew each time"
    fetched = Path(result["folder"]) / "model.safetensors"
    assert fetched.read_bytes() == (server.folder / "model.safetensors").read_bytes()


def test_a_damaged_or_a_long_file_never_takes_its_place(server: Server, tmp_path: Path) -> None:
    for fault, message in (("damaged", "the downloaded file is damaged"), ("long", "the download failed")):
        server.faults = {fault: True}
        code, _, error = fetch(server, tmp_path / fault, "ms:org/name")
        assert code == 2
        assert message in error
        assert "Traceback" not in error
        assert not list((tmp_path / fault).rglob("model.safetensors"))
    code, _, error = fetch(server, tmp_path / "hf", "org/name")  # by the hub's own client, of another size than it says
    assert code == 2
    assert "Traceback" not in error
    server.faults = {}
    assert fetch(server, tmp_path / "damaged", "ms:org/name")[0] == 0


def test_what_a_hub_refuses_is_one_message(server: Server, tmp_path: Path) -> None:
    refused = {
        "org/nothing": "no such model on the hub",
        "org/gated": "access to it must be granted",
        "ms:org/nothing": "no such model, or no such revision",
        "ms:org/gated": "access to it is restricted",
        "no-id-at-all": "not a hub id",
    }
    for name, message in refused.items():
        code, _, error = fetch(server, tmp_path, name)
        assert code == 2, name
        assert error.count("error: ") == 1, name
        assert message in error
        assert "Traceback" not in error


def test_a_slow_server_is_waited_for(server: Server, tmp_path: Path) -> None:
    server.faults["slow"] = 0.5
    assert fetch(server, tmp_path, "ms:org/name")[0] == 0


def test_a_server_that_is_not_there(tmp_path: Path, server: Server) -> None:
    for name in ("org/name", "ms:org/name"):
        gone = {"HF_ENDPOINT": "http://127.0.0.1:9", "MODELSCOPE_ENDPOINT": "http://127.0.0.1:9"}
        code, _, error = fetch(server, tmp_path, name, **gone)
        assert code == 2
        assert "Traceback" not in error
        code, _, error = fetch(server, tmp_path, name, HF_HUB_OFFLINE="1")
        assert code == 2
        assert "not in the cache, and HF_HUB_OFFLINE is set" in error


def test_the_disk_is_checked_first(tmp_path: Path) -> None:
    files.check_room(tmp_path / "not" / "there", 1000, "org/name")
    with pytest.raises(ModelError, match=r"org/name: does not fit on the disk[\s\S]*1 MiB free[\s\S]*expected: 9 MiB"):
        files.check_room(tmp_path, 9 * 2**20, "org/name", free=2**20)


def test_names_of_hubs() -> None:
    assert hub.parse("Qwen/Qwen2.5-0.5B") == ("hf", "Qwen/Qwen2.5-0.5B", None)
    assert hub.parse("ms:Qwen/Qwen2.5-0.5B@v1.0") == ("ms", "Qwen/Qwen2.5-0.5B", "v1.0")
    assert hub.parse("org/name@refs/pr/1") == ("hf", "org/name", "refs/pr/1")
    for name in ("./a/b", "../b", "~/a", "/a/b", "a\\b", "a", "a/b/c", "org/"):
        assert hub.parse(name) is None
    with pytest.raises(ModelError, match=r"did you mean 'llama-3\.2-1b'"):
        locate("llama-3.2-1bb")


@pytest.mark.full  # test_planning has the same of `fitune plan`
def test_methods_of_a_hubs_model_fetch_its_config_alone(server: Server, tmp_path: Path) -> None:
    env = {
        **os.environ, "HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1", "COLUMNS": "200",
    }  # fmt: skip
    command = [sys.executable, "-m", "fitune", "methods", "--model", "org/name", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" not in server.served
    assert server.served["config.json"] == 1


def test_the_revision_is_kept_in_the_run(server: Server, data_file: Path, tmp_path: Path) -> None:
    from fitune.commands.train import train
    from fitune.core.config import build
    from fitune.engine.checkpoint import RunFolder

    folder = tmp_path / "models--org--name" / "snapshots" / SHA
    folder.mkdir(parents=True)
    for path in server.files():
        (folder / path.name).write_bytes(path.read_bytes())
    run = tmp_path / "run"
    train(
        build({"model": str(folder), "data": [str(data_file)], "max_steps": 1, "output": str(run), "sample_prompts": 0})
    )
    assert RunFolder(run).read("plan")["model_revision"] == SHA


# ---- folders that want code ----


@pytest.mark.skipif(sys.platform == "win32", reason="the terminal is one of POSIX")
def test_a_model_that_wants_code_is_refused_though_a_terminal_says_yes(
    tmp_path: Path, data_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a terminal that answers y to every question, nothing of the folder is executed."""
    folder = tiny.save("llama", tmp_path / "model")
    trace = tmp_path / "trace"
    evil = f"open({str(trace)!r}, 'w').write('ran')\n"
    (folder / "modeling_evil.py").write_text(evil)
    (folder / "tokenization_evil.py").write_text(evil)
    config = json.loads((folder / "config.json").read_text())
    wants = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "modeling_evil.Model")
    for kind in ("baichuan", "llama"):
        changed = {**config, "model_type": kind, "auto_map": wants}
        (folder / "config.json").write_text(json.dumps(changed))
        words = json.loads((folder / "tokenizer_config.json").read_text())
        words["auto_map"] = {"AutoTokenizer": ["tokenization_evil.Words", None]}
        (folder / "tokenizer_config.json").write_text(json.dumps(words))
        given = ["--model", str(folder), "--data", str(data_file), "--max-steps", "1", "--sample-prompts", "0"]
        command = ["train", *given, "--output", str(tmp_path / f"run-{kind}")]
        if kind == "llama":  # native: its code is not needed, and not looked at
            monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
            code, _, error = run(command, capsys, monkeypatch)
            assert code == 0, error
            assert not trace.exists()
            continue
        code, shown = at_a_terminal([sys.executable, "-m", "fitune", *command])
        assert not trace.exists()
        assert "Traceback" not in shown
        assert code == 2
        assert "it works only with Python code from its folder, which fitune never runs" in " ".join(shown.split())
        assert "nearest is 'llama'" in shown


def at_a_terminal(command: list[str]) -> tuple[int, str]:
    """Run a command at a terminal on which somebody types y and Enter all the time."""
    import pty  # POSIX has it, Windows has not

    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    os.close(theirs)
    stop = threading.Event()

    def type_yes() -> None:
        while not stop.is_set():
            os.write(ours, b"y\n")
            stop.wait(0.2)

    typing = threading.Thread(target=type_yes, daemon=True)
    typing.start()
    shown, _ = process.communicate(timeout=300)
    stop.set()
    typing.join()
    os.close(ours)
    return process.returncode, shown


def test_an_unknown_kind_names_the_nearest_native_one(tmp_path: Path) -> None:
    for kind, near in (("baichuan", "llama"), ("qwen", "qwen2"), ("mistrall", "mistral"), ("gemma2x", "gemma2")):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(ModelError, match=f"nearest is '{near}'"):
            read_config(tmp_path)
