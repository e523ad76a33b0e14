"""`pytest --cpu-seconds FILE`: the CPU seconds of every test, with those of the processes that it started.

Wall seconds depend on what else a machine does; these do so less, and their sum over the number of cores is what a
run of all tests takes at least. A fixture's seconds are those of the first test that asks for it.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Generator
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
        self.tests: Counter[str] = Counter()
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
            self.tests[report.nodeid] = sum(value for name, value in report.user_properties if name == NAME)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.workers += getattr(node, "workeroutput", {}).get(NAME, 0.0)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        output = getattr(session.config, "workeroutput", None)
        if output is not None:
            output[NAME] = used()
            return
        files: Counter[str] = Counter()
        for test, seconds in self.tests.items():
            files[test.partition("::")[0]] += seconds
        tables = {
            name: {key: round(value, 2) for key, value in found.most_common()}
            for name, found in (("files", files), ("tests", self.tests))
        }
        whole = self.workers or used()
        record = {"all": round(whole, 1), "in tests": round(self.tests.total(), 1), **tables}
        self.path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        record = json.loads(self.path.read_text(encoding="utf-8"))
        terminalreporter.section("CPU seconds, with children")
        for name, seconds in [*record["files"].items()][:40]:
            terminalreporter.write_line(f"{seconds:8.1f}  {name}")
        terminalreporter.write_line(f"{record['in tests']:8.1f}  in tests, of {record['all']} of all workers")
