"""Texts and names of others in a terminal, and standard streams that fail."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table
from rich.text import Text

from fitune.cli import main as cli
from fitune.core.errors import FituneError
from fitune.core.files import as_json, expand, write_atomic
from fitune.views import screen
from support import tiny

ESCAPES = "\x1b[2J\x1b]0;title\x07 \x9b31m \x08\r\x7f"
NAMES = ["数据 文件 [bold]red :bug:", "[red a\nb '$(x)` \x1b[31m"]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """The command line, in this process."""
    sys.argv = ["fitune", *map(str, arguments)]
    code: object = 0
    try:
        cli.main()
    except SystemExit as done:
        code = done.code
    out = capsys.readouterr()
    return int(str(code or 0)), out.out, out.err


@pytest.fixture(autouse=True)
def _words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [])


def raw(text: str) -> list[str]:
    """The control characters of a text but line breaks and tabs."""
    return [c for c in text if c not in "\n\t" and (ord(c) < 32 or 127 <= ord(c) < 160)]


def test_a_text_cannot_command_a_terminal() -> None:
    assert screen.visible("two\tlines\n北京 ü") == "two\tlines\n北京 ü"
    assert screen.visible(ESCAPES) == "␛[2J␛]0;title␇ \ufffd31m ␈␍␡"
    assert len(screen.visible(ESCAPES)) == len(ESCAPES)


@pytest.mark.parametrize("terminal", [False, True])
def test_whatever_is_printed(terminal: bool) -> None:
    file = io.StringIO()
    console = screen.Screen(file=file, width=60, force_terminal=terminal, color_system=None)
    table = Table(title=ESCAPES, caption=ESCAPES, box=None)
    table.add_column(ESCAPES)
    table.add_row(Text(ESCAPES, style="red"))
    table.add_row(ESCAPES)
    for one in (table, Text.assemble((ESCAPES, "bold"), ESCAPES), ESCAPES):
        console.print(one, soft_wrap=True)
    console.write_line(f"[bold]not bold[/] :bug: {ESCAPES}")
    assert not raw(file.getvalue())
    assert "[bold]not bold[/] :bug: ␛[2J" in file.getvalue()
    lines = [line for line in file.getvalue().splitlines() if "31m" in line]
    assert len(lines) == 8
    assert all("␡" in line for line in lines)  # to their ends: widths are measured of what is shown


def test_rich_itself_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """Colours and a bar's movements are no text."""
    file = io.StringIO()
    console = screen.Screen(file=file, width=60, force_terminal=True, color_system="truecolor")
    console.print("[red]x[/]")
    console.show_cursor(False)
    assert file.getvalue() == "\x1b[31mx\x1b[0m\n\x1b[?25l"


class Full(io.RawIOBase):
    def __init__(self, room: int) -> None:
        self.room = room

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if self.room < len(data):
            raise OSError(28, "No space left on device")
        self.room -= len(data)
        return len(data)


def stream(room: int) -> io.TextIOWrapper:
    return screen._lenient(Full(room), at_once=True)


def test_a_full_standard_output_ends_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model_folder: Path
) -> None:
    rows = tiny.write_rows(tmp_path / "rows.jsonl", 4)
    for flags, code, message in ((["--json"], 2, "error: standard output: the result could not"), ([], 0, "is lost")):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream(5))
            found, _, err = run(capsys, "inspect", rows, "--model", model_folder, *flags)
        assert found == code
        assert message in err
        assert "No space left on device" in err
        assert err.count("standard output") == 1


REDIRECTED = [("> /dev/full", 0, "No space left"), (">&-", 0, ""), ("2>&- >&- <&-", 0, ""), ("| head -c 1", 0, "")]


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux")
@pytest.mark.parametrize(("where", "code", "message"), REDIRECTED)
@pytest.mark.parametrize("verb", ["train", "chat", "--help"])
def test_real_streams_that_fail(
    where: str, code: int, message: str, verb: str, tmp_path: Path, model_folder: Path
) -> None:
    rows, run_ = tiny.write_rows(tmp_path / "rows.jsonl", 8), tmp_path / "run"
    words = {
        "train": f"train --model {model_folder} --data {rows} --output {run_} --max-steps 2 --sample-prompts 0",
        "inspect": f"inspect {rows} --model {model_folder}",
        "chat": f"chat {model_folder} --max-tokens 2",
    }.get(verb, verb)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1" if verb == "chat" else ""}
    script = f"set -o pipefail; echo hello | {sys.executable} -m fitune {words} {where}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
    assert verb != "train" or (run_ / "report.html").is_file()


@pytest.mark.skipif(os.name == "nt", reason="such names are POSIX")
@pytest.mark.parametrize("name", NAMES)
def test_names_as_they_are(name: str, tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / name
    folder.mkdir()
    rows = tiny.write_rows(folder / f"{name}.jsonl", 4)
    with rows.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"messages": [{"role": "user", "content": f"{ESCAPES} [bold]"}]}) + "\n")
        file.write(json.dumps({"prompt": f"{ESCAPES} [bold]", "completion": f"{ESCAPES} [/] <script>"}) + "\n")
    page = folder / "page [bold].html"
    found, out, err = run(
        capsys, "inspect", rows, "--model", model_folder, "--html", page, "--skip-bad", "--samples", 9
    )
    assert found == 0, err
    assert screen.visible(f"page {page}\n") in out
    assert "␛[2J␛]0;title␇" in out
    assert not raw(out + err)
    text = page.read_text(encoding="utf-8")
    assert "<script>" not in text
    missing = folder / f"{name}.csv"
    found, _, err = run(capsys, "train", "--model", folder, "--data", missing, "--output", folder)
    assert found == 2
    assert err.count("error: ") == 1
    assert not raw(err)


def test_a_name_that_is_no_text(tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = os.fsdecode(b"a\xff")
    for words in (["inspect", name, "--model", model_folder], ["train", "--model", name, "--data", name]):
        found, _, err = run(capsys, *words)
        assert found == 2
        assert "a\\udcff: is no text in UTF-8" in err
    assert json.loads(as_json({"name": name})) == {"name": name}
    write_atomic(tmp_path / "page", name)
    assert (tmp_path / "page").read_text() == "a\\udcff"


def test_a_user_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a user whom the system does not know either, as in many a container."""
    from fitune.core.errors import RunFolderError
    from fitune.data.cache import default_folder

    def unknown(*_: object) -> str:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", unknown)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as it answers for such a user
    for variable in ("FITUNE_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(variable, raising=False)
    assert expand("~/data") == Path("~/data")
    with pytest.raises(RunFolderError, match="no home folder for a cache"):
        default_folder()


def test_an_output_that_somebody_put_there_may_fail_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python callers replace sys.stdout; one that cannot be flushed is reported, not a traceback."""

    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(sys, "stdout", Full())
    assert screen.lost() == "standard output: File too large; what was printed after that is lost"
    with pytest.raises(FituneError, match="could not be written"):
        screen.check_written()
