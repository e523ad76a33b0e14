"""Options, and what processes that run tests load (support/fixtures.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import cpu_seconds


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--pictures", metavar="FOLDER", help="the page's pictures for the documentation go into FOLDER")
    parser.addoption("--cpu-seconds", metavar="FILE", help="write the CPU seconds of each test and file to FILE")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("cpu_seconds"):
        config.pluginmanager.register(cpu_seconds.Seconds(Path(config.getoption("cpu_seconds"))))
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        # the process that hands tests to others (pytest -n) runs none: it waits seconds less without torch
        config.pluginmanager.import_plugin("support.fixtures")
