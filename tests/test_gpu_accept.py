"""The acceptance on a GPU: its parent keeps going, with its results, whatever a section does; its sections run."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def accept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The parent, with sections that do what they are told to."""
    module = load("gpu_accept")
    fake = tmp_path / "checks.py"
    fake.write_text(
        "import json, sys, time\n"
        "name, out = sys.argv[1], sys.argv[3]\n"
        "line = {'section': name, 'check': 'begun', 'passed': True}\n"
        "open(f'{out}/gpu.jsonl', 'a').write(json.dumps(line) + '\\n')\n"
        "print('last words')\n"
        "sys.stdout.flush()\n"
        "time.sleep(60 if name == 'hangs' else 0)\n"
        "sys.exit(3 if name == 'fails' else 0)\n"
    )
    monkeypatch.setattr(module, "CHECKS", fake)
    return module


def test_a_section_that_fails_or_hangs_stops_no_other(accept, tmp_path: Path) -> None:
    sections = [accept.Section(name, seconds) for name, seconds in (("hangs", 1), ("fails", 20), ("well", 20))]
    accept.run_all(sections, tmp_path, 100, dry=False)
    rows = {(row["section"], row["check"]): row for row in accept.read(tmp_path)}
    assert [rows[name, "begun"]["passed"] for name in ("hangs", "fails", "well")] == [True] * 3
    assert rows["hangs", "ended"]["why"] == "too late"
    assert rows["fails", "ended"]["why"] == "exit code 3"
    assert "last words" in rows["fails", "ended"]["last"]
    assert rows["well", "ended"]["passed"]
    text = accept.table(rows.values())
    assert text.count("FAILED") == 2
    assert len(text.splitlines()) == len(rows)


def test_what_there_is_no_time_for_is_said(accept, tmp_path: Path) -> None:
    accept.run_all([accept.Section("well", 20)], tmp_path, accept.LEAST / 2, dry=False)
    assert accept.read(tmp_path)[-1]["why"] == "no time left"


def test_told_to_stop_it_ends_its_sections_and_leaves_a_summary(accept, tmp_path: Path) -> None:
    code = (
        "import importlib.util, sys, pathlib\n"
        f"spec = importlib.util.spec_from_file_location('gpu_accept', {str(SCRIPTS / 'gpu_accept.py')!r})\n"
        "m = importlib.util.module_from_spec(spec)\nsys.modules['gpu_accept'] = m\nspec.loader.exec_module(m)\n"
        f"m.CHECKS = pathlib.Path({str(tmp_path / 'checks.py')!r})\n"
        "m.SECTIONS = (m.Section('hangs', 50),)\n"
        f"sys.argv = ['gpu_accept', '--out', {str(tmp_path)!r}]\nsys.exit(m.main())\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    results = tmp_path / "gpu.jsonl"
    while not (results.exists() and "hangs" in results.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 1
    assert "interrupted" in (tmp_path / "summary.txt").read_text()


def test_the_parent_imports_no_torch() -> None:
    code = f"import runpy, sys; runpy.run_path({str(SCRIPTS / 'gpu_accept.py')!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_what_was_measured_is_judged_by_what_was_said() -> None:
    checks = load("gpu_checks")
    said = {"allocated": 1000, "reserved": 1100, "fits": True}
    measured = {"max_allocated": 1010, "max_reserved": 1200, "seconds": 1.0}
    row = {"predicted": said, "measured": measured, "died": None}
    assert checks.judged(row, "")[0]
    assert not checks.judged({**row, "measured": {**measured, "max_allocated": 1100}}, "")[0]
    assert not checks.judged({**row, "died": "out of memory"}, "")[0]
    assert checks.judged({**row, "died": "out of memory", "predicted": {**said, "fits": False}}, "")[0]
    assert not checks.judged(None, "no answer")[0]
    assert checks.judged({"predicted": said, "left_out": "too big"}, "")[1] == {"why": "too big"}


@pytest.mark.parametrize("section", ["throughput"])
def test_a_section_runs_on_a_cpu(section: str, tmp_path: Path) -> None:
    """The others are runs of whole programs: `make test-full` has them."""
    dry_run(section, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("section", ["machine", "kernels", "resume", "runs", "memory", "capped"])
def test_a_section_of_whole_programs_runs_on_a_cpu(section: str, tmp_path: Path) -> None:
    dry_run(section, tmp_path)


def dry_run(section: str, out: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "gpu_checks.py"), section, "--out", str(out), "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-1500:]
    rows = [json.loads(line) for line in (out / "gpu.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows
    assert all(row["passed"] for row in rows), rows
