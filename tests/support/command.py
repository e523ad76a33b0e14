"""The command line, run inside the process of the tests."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import pytest

from fitune.cli import main as cli


def run(
    arguments: Sequence[object], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, str, str]:
    """The command inside this process: exit code, standard output, standard error."""
    monkeypatch.setattr(sys, "argv", ["fitune", *map(str, arguments)])
    code = 0
    try:
        cli.main()
    except SystemExit as error:
        code = int(error.code or 0)
    out, err = capsys.readouterr()
    return code, out, err
