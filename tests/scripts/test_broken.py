"""A hundred kinds of broken data (scripts/broken_inputs.py): one clear message each, never a traceback, and no row is
lost without being counted."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fitune.commands.inspect import inspect
from fitune.core.config import build
from fitune.core.errors import FituneError
from support import tiny
from support.command import run

SCRIPT = Path(__file__).parents[2] / "scripts" / "broken_inputs.py"
spec = importlib.util.spec_from_file_location("broken_inputs", SCRIPT)
assert spec is not None
assert spec.loader is not None
broken = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = broken
spec.loader.exec_module(broken)


def test_there_are_more_than_a_hundred_of_them() -> None:
    assert len({case.name for case in broken.CASES}) == len(broken.CASES) > 130


SLOW = ("ten-megabytes.jsonl",)
CASES = [pytest.param(one, marks=[pytest.mark.full] if one.name in SLOW else []) for one in broken.CASES]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_broken_data_costs_one_message_or_a_counted_skip(
    case: Any, tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / case.name
    case.make(path)
    if case.good is None or case.bad:
        output = tmp_path / "run"
        arguments = ["train", "--model", model_folder, "--data", path, "--output", output]
        code, _, err = run(arguments, capsys, monkeypatch)
        assert code == 2
        assert err.count("error: ") == 1
        assert err.startswith("error: ")
        assert case.says in err
        assert case.name in err
        assert "Traceback" not in err
        assert len(err) < 20_000
        assert not output.exists()
    asked = build({"data": [str(path)], "model": str(model_folder)})
    if case.good is None:
        with pytest.raises(FituneError, match=re.escape(case.name)):
            inspect(asked)
        return
    rows = inspect(asked).rows
    assert (rows["read"], rows["bad"]) == (case.good + case.bad, case.bad)
    assert rows["kept"] + rows["dropped"] == case.good


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() != 0, reason="only root can become somebody else")
def test_a_file_without_permission(tmp_path: Path) -> None:
    path = tiny.write_rows(tmp_path / "rows.jsonl", 3)
    path.chmod(0o600)
    for folder in (tmp_path, *tmp_path.parents):
        if folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o011)
    code = (
        "import os, sys\nfrom pathlib import Path\n"
        "from fitune.data.readers import read\nfrom fitune.core.errors import DataError\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "try:\n    list(read(Path(sys.argv[1])))\nexcept DataError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == f"{path}: cannot be read (Permission denied)", done.stderr
