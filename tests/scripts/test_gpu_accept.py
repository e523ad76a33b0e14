"""The acceptance on a GPU: its parent keeps going, with its results, whatever a section does; its sections run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from support.gpu_scripts import SCRIPTS, load

SECTION = """
import json, sys, time
name = sys.argv[1]
def say(check, **figures):
    print('RESULT ' + json.dumps({'section': name, 'check': check, 'passed': True, **figures}), flush=True)
say('begun')
print('last words', flush=True)
if name == 'garbles':
    print('RESULT {"section": "gar')
    say('after', text='\u4f60\u597d')
if name.startswith('hangs'):
    import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)
if name == 'breaks':
    import os; os.abort()
sys.exit(3 if name == 'fails' else 0)
"""


@pytest.fixture
def accept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The parent, with sections that do what their names say."""
    module = load("gpu_accept")
    fake = tmp_path / "checks.py"
    fake.write_text(SECTION, encoding="utf-8")
    monkeypatch.setattr(module, "CHECKS", fake)
    monkeypatch.setattr(module, "LEAST", 0.5)
    monkeypatch.setattr(module, "GRACE", 0.3)
    return module


def sections(accept: ModuleType, *names: str) -> list[Any]:
    return [accept.Section(name, 1 if name == "hangs" else 30) for name in names]


def written(out: Path) -> dict[tuple[str, str], dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "gpu.jsonl").read_text(encoding="utf-8").splitlines()]
    return {(row["section"], row["check"]): row for row in rows}


def test_a_section_that_fails_hangs_or_breaks_stops_no_other(accept: ModuleType, tmp_path: Path) -> None:
    results = accept.Results(tmp_path)
    names = ("hangs", "fails", "breaks", "garbles", "good")
    accept.run_all([[one] for one in sections(accept, *names)], results, 120, accept.How(False, False, tmp_path))
    assert not results.end(1.0)
    rows = written(tmp_path)
    assert all(rows[name, "begun"]["passed"] for name in names)
    ended = {name: rows[name, "ended"] for name in names}
    assert ended["hangs"]["why"].startswith("not done after")
    assert ended["fails"]["why"] == "exit code 3"
    assert "last words" in ended["fails"]["last"]
    assert ended["breaks"]["why"] == f"exit code {-signal.SIGABRT}"
    assert not rows["garbles", "a broken line"]["passed"]
    assert rows["garbles", "after"]["text"] == "你好"
    assert ended["good"]["passed"]
    last = list(rows.values())[-1]
    assert last["check"] == "summary"
    assert sorted(last["failed"]) == ["breaks: ended", "fails: ended", "garbles: a broken line", "hangs: ended"]
    text = (tmp_path / "summary.txt").read_text(encoding="utf-8")
    assert len(text.splitlines()) == len(rows)
    assert text.splitlines()[-1].startswith("all        summary")
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".py") == [
        "gpu.jsonl", "sections.log", "summary.txt",
    ]  # fmt: skip


def test_what_one_section_leaves_over_is_there_for_the_next(
    accept: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[float] = []
    monkeypatch.setattr(accept, "run", lambda names, results, seconds, how: given.append(seconds))
    results, how = accept.Results(tmp_path), accept.How(False, False, tmp_path)
    accept.run_all(accept.STAGES, results, 480.0, how)
    assert sum(accept.most(one) for one in accept.STAGES) == 480
    assert given[0] == pytest.approx(accept.SECTIONS[0].seconds, abs=0.5)
    assert given[-1] == pytest.approx(480, abs=0.5)  # nothing took any time
    accept.run_all(accept.STAGES, results, 0.4, how)
    assert {row["why"] for row in results.rows} == {"no time left"}


def test_a_folder_that_takes_no_more_stops_nothing(
    accept: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """/dev/full refuses every write as a full disk does."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    for name in ("gpu.jsonl", "sections.log", "summary.txt"):
        (tmp_path / name).symlink_to("/dev/full")
    results = accept.Results(tmp_path)
    accept.run_all([sections(accept, "fails", "good")], results, 120, accept.How(False, False, tmp_path))
    assert not results.end(1.0)
    out = capsys.readouterr().out
    assert "No space left" in out
    assert "good       ended                                   passed" in out
    assert out.rstrip().splitlines()[-1].startswith("all        summary")


def test_a_log_without_end_does_not_take_the_room_of_the_results(
    accept: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accept, "LOG_MOST", 10_000)
    results = accept.Results(tmp_path)
    for _ in range(100):
        results.log("x" * 999 + "\n")
    results.add("here", "check", True)
    assert 9_000 < (tmp_path / "sections.log").stat().st_size < 12_000
    assert (tmp_path / "sections.log").read_text(encoding="utf-8").endswith("(no more is kept)\n")
    assert len(written(tmp_path)) == 1


@pytest.mark.parametrize("stages", ["[[m.Section('hangs', 50)], [m.Section('good', 50)]]",
                                    "[[m.Section('hangs', 50), m.Section('hangs_too', 50)]]"])  # fmt: skip
def test_asked_to_stop_it_ends_its_sections_and_leaves_a_summary(
    accept: ModuleType, tmp_path: Path, stages: str
) -> None:
    code = (
        "import importlib.util, sys, pathlib\n"
        f"spec = importlib.util.spec_from_file_location('gpu_accept', {str(SCRIPTS / 'gpu_accept.py')!r})\n"
        "m = importlib.util.module_from_spec(spec)\nsys.modules['gpu_accept'] = m\nspec.loader.exec_module(m)\n"
        f"m.CHECKS, m.GRACE = pathlib.Path({str(tmp_path / 'checks.py')!r}), 0.3\n"
        f"m.STAGES, m.CORES = {stages}, 1\n"
        f"sys.argv = ['gpu_accept', '--out', {str(tmp_path)!r}]\nsys.exit(m.main())\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    results = tmp_path / "gpu.jsonl"
    last = "hangs_too" if "hangs_too" in stages else "hangs"
    while not (results.exists() and last in results.read_text(encoding="utf-8")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(40) == 1  # the sections would take 50 seconds
    rows = written(tmp_path)
    assert not rows["all", "interrupted"]["passed"]
    assert ("good", "begun") not in rows
    assert list(rows)[-1] == ("all", "summary")
    assert "interrupted" in (tmp_path / "summary.txt").read_text(encoding="utf-8")


def test_the_parent_imports_no_torch() -> None:
    code = f"import runpy, sys; runpy.run_path({str(SCRIPTS / 'gpu_accept.py')!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_packages_that_are_not_here_are_unpacked(accept: ModuleType, tmp_path: Path) -> None:
    minor = sys.version_info.minor
    names = {
        "pytest-9.9-py3-none-any.whl": "pytest/__init__.py",  # here already, in whatever version
        f"not_here-1.0-cp3{minor}-cp3{minor}-manylinux1_x86_64.whl": "not_here/__init__.py",
        "other_one-1.0-cp39-abi3-manylinux1_x86_64.whl": "other_one.py",
    }
    for name, inside in names.items():
        with zipfile.ZipFile(tmp_path / name, "w") as made:
            made.writestr(inside, "")
    with zipfile.ZipFile(tmp_path / "fitune-0.1.0-py3-none-any.whl", "w") as made:
        asked = "Requires-Dist: numpy>=999.1\nRequires-Dist: pytest>=8\nRequires-Dist: torch\n"
        made.writestr("fitune-0.1.0.dist-info/METADATA", asked)
    with zipfile.ZipFile(tmp_path / "numpy-999.2-py3-none-any.whl", "w") as made:
        made.writestr("numpy.py", "")
    results = accept.Results(tmp_path)
    into = accept.unpack(tmp_path, tmp_path / "packages", results)
    there = {path.name for path in into.iterdir()} - {"fitune-0.1.0.dist-info"}
    assert there == {"not_here", "numpy.py", "other_one.py"}
    assert results.rows[-1]["passed"]
    assert "pytest" not in results.rows[-1]["unpacked"]
    path = accept.How(False, False, tmp_path, into).environment()["PYTHONPATH"].split(os.pathsep)
    assert path[:2] == [str(accept.ROOT / "src"), str(into)]  # a wheel of fitune among them may be of another commit
    (tmp_path / f"third-1.0-cp3{minor + 1}-cp3{minor + 1}-manylinux1_x86_64.whl").write_bytes(
        (tmp_path / "other_one-1.0-cp39-abi3-manylinux1_x86_64.whl").read_bytes()
    )
    accept.unpack(tmp_path, tmp_path / "packages", results)
    assert "for another Python: third" in results.rows[-1]["why"]
    assert accept.unpack(tmp_path / "nowhere", tmp_path / "packages", results) is None


def test_what_was_measured_is_judged_by_what_was_planned() -> None:
    load("gpu_checks")
    figures = load("gpu_figures")
    predicted = {"allocated": 1000, "reserved": 1100, "fits": True, "needed": 95}
    measured = {"max_allocated": 1010, "max_reserved": 1200, "seconds": 1.0}
    row = {"case": {"cap": None}, "predicted": predicted, "measured": measured, "died": None}
    assert figures.judged(row)[0]
    assert not figures.judged({**row, "measured": {**measured, "max_allocated": 1100}})[0]
    assert not figures.judged({**row, "died": "out of memory"})[0]
    assert figures.judged({**row, "died": "out of memory", "predicted": {**predicted, "fits": False}})[0]
    assert figures.judged({"case": {}, "failed": "no answer in 600 s"}) == (False, {"why": "no answer in 600 s"})
    assert not figures.judged({**row, "predicted": None})[0]
    assert figures.judged({"case": {}, "predicted": predicted, "left_out": "too big"})[1] == {"why": "too big"}
    capped = {**row, "case": {"cap": 100}, "measured": {**measured, "max_allocated": 1100}}
    assert figures.judged(capped) == (True, {"said_to_fit": True, "seconds": 1.0, "plan_of_limit": 0.95,
                                             "allocated_off": "+10.00%", "reserved_off": "+9.09%"})  # fmt: skip


def test_configurations_are_those_of_a_card_that_is_not_larger() -> None:
    load("gpu_checks")
    figures = load("gpu_figures")
    sizes = {"24": "24", "80": "80", "141": "141"}
    for gib, size in ((8, "24"), (22.1, "24"), (44.4, "24"), (79.1, "80"), (139.8, "141"), (178, "141")):
        assert figures.chosen_for(sizes, int(gib * 2**30)) == size


def test_what_pytest_reports_is_counted_also_where_it_is_stopped(tmp_path: Path) -> None:
    """With the plugin, in a real process: a test that passes, one that fails, one that is skipped, and a file that
    cannot be read; then all but the last of what was printed."""
    checks = load("gpu_checks")
    (tmp_path / "test_a.py").write_text(
        "import pytest\ndef test_one(): pass\ndef test_two(): assert 'planted' == ''\n"
        "@pytest.mark.skip\ndef test_three(): pass\n"
    )
    (tmp_path / "test_b.py").write_text("import nowhere_to_be_found\n")
    how = ["-p", "gpu_report", "-p", "no:cacheprovider", "-q", "--no-summary", "--continue-on-collection-errors"]
    command = [sys.executable, "-m", "pytest", *how, "-c", os.devnull, "--rootdir", ".", "test_a.py", "test_b.py"]
    out = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=checks.environment()).stdout
    assert "assert 'planted' == ''" in out
    found = checks.outcomes(out, collected=False)
    assert (found["ran"], found["skipped"]) == (3, 1)
    assert sorted(found["failed"]) == ["test_a.py::test_two", "test_b.py"]
    assert set(found["longest"]) <= {"test_a.py::test_one", "test_a.py::test_two", "test_a.py::test_three", "test_b.py"}
    stopped = out[: out.index("test_two")] + "\nOUTCOME"
    assert checks.outcomes(stopped, collected=False)["failed"] == ["test_b.py"]
    assert checks.outcomes("tests/test_a.py::test_one\n\n1/2 tests collected\n", collected=True)["ran"] == 1


@pytest.mark.full
def test_every_section_runs_on_a_cpu(tmp_path: Path) -> None:
    """The command of the day it counts, with tiny models; in one process, since imports take most of the time."""
    dry_run(tmp_path, "--together")


@pytest.mark.full
def test_every_section_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    dry_run(tmp_path)


def dry_run(out: Path, *flags: str) -> None:
    command = [sys.executable, str(SCRIPTS / "gpu_accept.py"), "--dry-run", "--out", str(out), *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stdout[-3000:] + (out / "sections.log").read_text(encoding="utf-8")[-3000:]
    rows = written(out)
    assert {section for section, _ in rows} == {"all", *(one.name for one in load("gpu_accept").SECTIONS)}
    assert all(row["passed"] for row in rows.values()), rows
    assert list(rows)[-1] == ("all", "summary")
    assert len(list(out.iterdir())) <= 8


# ---- what is carried to a bare machine ----

OF_IMAGES = {
    "torch", "transformers", "accelerate", "numpy", "packaging", "pyyaml", "regex", "tqdm", "safetensors",
    "huggingface-hub", "pyarrow", "typing-extensions", "click", "markupsafe", "tokenizers",
}  # fmt: skip


def test_whatever_fitune_and_its_tests_need_is_carried_or_in_images() -> None:
    """Through what is installed here: a new dependency, or a dependency's new one, is noticed."""
    carried = {name.replace("_", "-") for name in load("gpu_prepare").MISSING}
    project = tomllib.loads((SCRIPTS.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    tools = ("pytest", "pytest-timeout", "hypothesis")

    def named(needed: str) -> str:
        found = re.match(r"[\w.-]+", needed)
        assert found is not None
        return found[0].lower().replace("_", "-")

    todo = [named(one) for one in (*project["dependencies"], *tools)]
    seen: set[str] = set()
    while todo:
        name = todo.pop()
        if name in seen or name in OF_IMAGES:
            continue
        seen.add(name)
        for asked in metadata.requires(name) or []:
            needed, _, marker = asked.partition(";")
            if "extra" not in marker and "win32" not in marker.lower() and "python_version <" not in marker:
                todo.append(named(needed))
    assert seen - carried == set()


def test_of_bitsandbytes_two_libraries_are_kept(tmp_path: Path) -> None:
    prepare = load("gpu_prepare")
    path = tmp_path / "bitsandbytes-1-py3-none-manylinux_2_24_x86_64.whl"
    names = ["libbitsandbytes_cuda121.so", "libbitsandbytes_cuda130.so", "libbitsandbytes_cpu.so", "nn.py"]
    with zipfile.ZipFile(path, "w") as made:
        for name in names:
            made.writestr(f"bitsandbytes/{name}", name)
    prepare.repack(path)
    with zipfile.ZipFile(path) as packed:
        assert packed.namelist() == [f"bitsandbytes/{name}" for name in names[1:]]
        assert packed.read("bitsandbytes/nn.py") == b"nn.py"
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
    assert prepare.flat(path)
    with zipfile.ZipFile(path, "a") as packed:
        packed.writestr("bitsandbytes-1.data/purelib/more.py", "")
    assert not prepare.flat(path)


def test_a_wheel_that_cannot_be_had_is_named_and_so_is_too_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare = load("gpu_prepare")
    asked: list[list[str]] = []

    def pip(name: str, command: list[str]) -> str | None:
        asked.append(command)
        if name.startswith("rich"):
            return f"{name}: no"
        (tmp_path / ".whl" / f"{name.split('==')[0]}.whl").write_bytes(zipfile_bytes())
        return None

    def zipfile_bytes() -> bytes:
        with zipfile.ZipFile(tmp_path / "made.zip", "w") as made:
            made.writestr("x.py", "x" * 2**20)
        return (tmp_path / "made.zip").read_bytes()

    monkeypatch.setattr(prepare, "failed", pip)
    monkeypatch.setattr(prepare, "MISSING", ("rich", "attrs", "no-such-package"))
    monkeypatch.setattr(prepare, "MOST_MIB", 12)
    problems = prepare.wheels(tmp_path / ".whl", "3.13")
    assert [problem.split(":")[0].split(" take")[0] for problem in problems] == [
        f"rich=={metadata.version('rich')}", "wheels and tree",
    ]  # fmt: skip
    assert asked[1][asked[1].index("--python-version") :][:2] == ["--python-version", "3.13"]
    assert "2 wheels" in capsys.readouterr().out


def test_figures_of_the_documents_are_those_of_the_results() -> None:
    """Tokens a second, shares and milliseconds of docs/gpu.md, in both languages."""
    root = SCRIPTS.parent
    rows: list[dict[str, Any]] = []
    for path in sorted((root / "results" / "gpu").glob("*.jsonl")):
        rows += [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rates = {f"{row['tokens_per_second']:,}" for row in rows if row["section"] == "throughput" and "ms" in row
             and "launches" not in row}  # fmt: skip
    shares = {f"{row['share_of_peak']:.1%}".replace("%", " %") for row in rows if "share_of_peak" in row}
    took = {f"{row['ms']:.0f}" for row in rows if row["section"] == "throughput" and "ms" in row}
    for name in ("gpu.md", "gpu.zh-CN.md"):
        text = (root / "docs" / name).read_text(encoding="utf-8")
        part = text[text.index("H100") :]
        lines = [
            line for line in part.splitlines() if line.startswith("| ") and ("tokens/s" in line or "token/秒" in line)
        ]
        found = [number for line in lines for number in re.findall(r"\d+,\d{3}", line.split("|")[2])]
        assert len(found) == 14
        assert set(found) <= rates
        assert set(re.findall(r"\b[345]\d\.\d %", part)) <= shares
        assert set(re.findall(r"(\d+) (?:ms|毫秒)", part)) <= took
