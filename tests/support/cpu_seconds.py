"""`pytest --cpu-seconds FILE`: the CPU seconds of every test, with those of the processes that it started.

Wall seconds depend on what else a machine does; these do so less, and their sum over the number of cores is what a
run of all tests takes at least. A fixture's seconds are those of the first test that asks for it.
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import pytest

NAME = "cpu_seconds"


def used() -> float:
    """CPU seconds of this process, and of its children that ended and were waited for (none of them on Windows)."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


class Seconds:
    """In a worker: notes the seconds of each test, and of all. In the process that reports: adds them up."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tests: dict[str, float] = {}
        self.workers = 0.0

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None]:
        yield from self._noted(item)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None]:
        yield from self._noted(item)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None]:
        yield from self._noted(item)

    def _noted(self, item: pytest.Item) -> Generator[None]:
        before = used()
        try:
            yield
        finally:
            item.user_properties.append((NAME, used() - before))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown":
            noted = [value for name, value in report.user_properties if name == NAME]
            self.tests[report.nodeid] = sum(value for value in noted if isinstance(value, float))

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.workers += getattr(node, "workeroutput", {}).get(NAME, 0.0)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        output = getattr(session.config, "workeroutput", None)
        if output is not None:
            output[NAME] = used()
            return
        files: dict[str, float] = defaultdict(float)
        for test, seconds in self.tests.items():
            files[test.partition("::")[0]] += seconds
        whole, inside = self.workers or used(), sum(self.tests.values())
        record = {
            "all": round(whole, 1),
            "in tests": round(inside, 1),
            "files": _most(files),
            "tests": _most(self.tests),
        }
        self.path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        record = json.loads(self.path.read_text(encoding="utf-8"))
        terminalreporter.section("CPU seconds, with children")
        for name, seconds in [*record["files"].items()][:40]:
            terminalreporter.write_line(f"{seconds:8.1f}  {name}")
        terminalreporter.write_line(f"{record['in tests']:8.1f}  in tests, of {record['all']} of all workers")


def _most(seconds: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in sorted(seconds.items(), key=lambda one: -one[1])}
