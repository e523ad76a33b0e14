"""A plugin of pytest for scripts/gpu_checks.py: each outcome in a line, and why a test failed, as soon as it is known.

What pytest prints of failures stands at its end, which a run that is stopped never comes to.

    python -m pytest -p gpu_report -m cuda tests
"""

from __future__ import annotations

import json

import pytest

MARK = "OUTCOME "  # begins a line of JSON: test, outcome, seconds
LAST = 3000  # characters of a failure's traceback


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Print what came of a test: of its call, or of a phase around it that did not pass."""
    if report.when == "call" or not report.passed:
        row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
        print(f"\n{MARK}{json.dumps(row)}", flush=True)
    if report.failed:
        print(report.longreprtext[-LAST:], flush=True)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Print why a file of tests cannot be read."""
    if report.failed:
        print(f"\n{MARK}{json.dumps({'test': report.nodeid, 'outcome': 'failed', 'seconds': 0})}", flush=True)
        print(str(report.longrepr)[-LAST:], flush=True)
