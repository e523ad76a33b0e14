"""What importing leaves out, and that nothing else changes by it."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from fitune.core import imports

LOADED = "print(*(name in sys.modules for name in ('torch._inductor.compile_fx', 'bitsandbytes', 'peft')))"


def run(code: str, **given: str) -> str:
    plain = {name: value for name, value in os.environ.items() if name != imports.COMPILER}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**plain, **given}, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_the_compiler_is_not_loaded_and_works_afterwards() -> None:
    """The door of the Python functions: bitsandbytes is there without torch's compiler, which still compiles."""
    code = f"import sys, fitune\nfitune.load_model\nimport fitune.api, peft\n{LOADED}\nimport gc, os, torch\n"
    code += "print(gc.isenabled(), gc.get_freeze_count(), os.environ.get('TORCHDYNAMO_DISABLE'))\n"
    code += (
        "twice = torch.compile(lambda x: x + x, backend='eager', fullgraph=True)\nprint(float(twice(torch.ones(()))))\n"
    )
    code += "print(torch._dynamo.utils.counters['stats']['unique_graphs'])"
    assert run(code).split("\n")[:4] == ["False True True", "True 0 None", "2.0", "1"]


def fail() -> None:
    with imports.loading():
        assert not gc.isenabled()
        assert os.environ[imports.COMPILER] == "1"
        raise ZeroDivisionError


@pytest.mark.parametrize("given", ["", "0"])
def test_everything_is_set_as_it_was(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv(imports.COMPILER, given)
    with pytest.raises(ZeroDivisionError):
        fail()
    assert gc.isenabled()
    assert os.environ[imports.COMPILER] == given
    gc.disable()
    try:
        with imports.loading():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_only_what_is_there_the_first_time_stays() -> None:
    code = "import gc\nfrom fitune.core.imports import for_good\n"
    code += "with for_good(): import json\nfirst = gc.get_freeze_count()\nmore = [[] for _ in range(999)]\n"
    code += "with for_good(): import fitune.core.config\nprint(first > 999, gc.get_freeze_count() <= first)"
    assert run(code) == "True True\n"


LEAVING = """
import atexit, gc, sys
from pathlib import Path
import fitune.cli.main
from fitune import __main__ as command
from fitune.core import imports
atexit.register(Path(sys.argv[1]).write_text, "was called")  # before ours is
def main():
    with imports.for_good():
        import triton._C.libtriton
    print("printed", end="")
    {what}
fitune.cli.main.main = main
command.start_anew = lambda: None
command.main()
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="no Triton here")
@pytest.mark.parametrize(
    ("what", "code", "error"),
    [
        ("pass", 0, ""),
        ("raise SystemExit(3)", 3, ""),
        ("raise SystemExit('stopped')", 1, "stopped\n"),
        ("import threading; threading.Timer(0.2, lambda: print('!', end='')).start()", 0, ""),
        ("atexit.register(lambda: print('too late', file=sys.stderr))", 0, "too late\n"),
    ],
)
def test_the_end_of_the_command_is_quiet(tmp_path: Path, what: str, code: int, error: str) -> None:
    """What is left of Triton is not reported. Exit code, what was printed, and whoever is called at the end stay."""
    script = tmp_path / "script.py"
    script.write_text(LEAVING.format(what=what), encoding="utf-8")
    called = tmp_path / "called"
    done = subprocess.run([sys.executable, script, called], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, error)
    assert done.stdout == "printed" + "!" * ("threading" in what)
    assert called.read_text() == "was called"


@pytest.mark.skipif(find_spec("triton") is None, reason="no Triton here")
def test_without_that_triton_reports(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    planted = "command.quiet.at_the_end = lambda: None\ncommand.main()"
    script.write_text(LEAVING.replace("command.main()", planted).format(what="pass"), encoding="utf-8")
    done = subprocess.run([sys.executable, script, tmp_path / "called"], capture_output=True, text=True, check=True)
    assert "leaked" in done.stderr
