"""What a process that runs tests needs: fixtures (tiny models and a tokenizer made on the spot, the folder of real data
where there is one), and settings that hold for all of its tests."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cyclopts import App
from hypothesis import settings

from fitune.core import imports, processor, quiet

with imports.loading():
    import torch

    from fitune.commands import active_run
    from fitune.core.config import RunConfig
    from fitune.engine.drawing import Sampling
    from fitune.models import precision
    from support import flags, tiny
    from support.hub_server import server as server  # a fixture

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may need the network
os.environ["FITUNE_CACHE"] = tempfile.mkdtemp(prefix="fitune-cache-")  # nor what lies in the user's own cache
atexit.register(shutil.rmtree, os.environ["FITUNE_CACHE"], ignore_errors=True)
# `precision: auto` means float32 in the tests, on whatever machine they run
SLOW = {precision.machine(torch.device("cpu")): {"fp32": 100.0, "bf16": 1.0, "fp16": 1.0}}
RATES = Path(os.environ["FITUNE_CACHE"], precision.RATES)
RATES.write_text(json.dumps(SLOW))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
atexit.register(quiet.at_the_end)


settings.register_profile("quick", max_examples=60, deadline=None)
settings.register_profile("full", max_examples=10_000, deadline=None)
settings.load_profile(os.environ.get("FITUNE_TESTS", "quick"))


@pytest.fixture
def other_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A new cache that holds nothing but the rates of this machine, so that `precision: auto` stays what it is."""
    folder = tmp_path / "cache"
    folder.mkdir()
    shutil.copy(RATES, folder)
    monkeypatch.setenv("FITUNE_CACHE", str(folder))
    return folder


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What the tests import is imported as the command does it, and Python does not look through it again."""
    with imports.for_good():
        return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need what is not here skip with the reason."""
    no_gpu = pytest.mark.skip(reason="no CUDA GPU here")
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(no_gpu)


@pytest.fixture(autouse=True)
def _unit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that is marked `unit` starts no process and computes no gradient: it fails where it tries to. Those on a
    GPU that stand in a file of units may."""
    if request.node.get_closest_marker("unit") and not request.node.get_closest_marker("cuda"):
        monkeypatch.setattr(subprocess, "Popen", _refuse("starts a process"))
        monkeypatch.setattr(torch.autograd, "backward", _refuse("computes a gradient"))


def _refuse(deed: str) -> Callable[..., None]:
    def refuse(*arguments: object, **named: object) -> None:
        pytest.fail(f"this test is marked unit and {deed}")

    return refuse


@pytest.fixture(scope="session", autouse=True)
def _signals() -> None:
    """Signals have their defaults, also where the tests run under `nohup` or in the background of a script: a process
    that starts there ignores SIGHUP or SIGINT, and so would the runs in it, as they should."""
    for name, default in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) == signal.SIG_IGN:
            signal.signal(getattr(signal, name), default)


@pytest.fixture(scope="session", autouse=True)
def _disks() -> Iterator[None]:
    """No test cuts the power: files are written, and not waited for until they lie on the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _flags() -> Iterator[None]:
    """A command line that is read takes what the one before it has put together."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(App, "assemble_argument_collection", flags.once(App.assemble_argument_collection))
        yield


@pytest.fixture(scope="session", autouse=True)
def _idle() -> Iterator[None]:
    """No other process is at work, whatever the machine that the tests run on does meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processor, "others", lambda since: 0.0)
        yield


@pytest.fixture(scope="session", autouse=True)
def _answers() -> Iterator[None]:
    """What runs answer before and after is four tokens long where a test asks for no other number: a random model finds
    no end, and answers of 64 tokens were a third of a run."""
    usual = RunConfig.model_fields["sample_tokens"].default

    def short(max_new_tokens: int) -> Sampling:
        return Sampling(max_new_tokens=4 if max_new_tokens == usual else max_new_tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(active_run, "Sampling", short)
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data, models and tokenizers."""
    root = Path(os.environ.get("FITUNE_SHARED", Path(__file__).parents[2] / "shared"))
    if not root.is_dir():
        pytest.skip(f"no folder of real data at {root} (set FITUNE_SHARED)")
    return root


@pytest.fixture(scope="session")
def tokenizer() -> object:
    return tiny.make_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with KV heads < heads, and its tokenizer, in one folder."""
    return tiny.save("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    return tiny.write_rows(tmp_path / "rows.jsonl", tiny.DATA_ROWS)
