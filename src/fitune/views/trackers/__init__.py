"""Trackers that runs are shown in, a file each; none of their packages is loaded before a run wants it.

In: a tracker's name. Out: what makes it. The three functions of each are those of `core/tracking.py:Tracker`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module, util

from fitune.core.tracking import Tracker
from fitune.views.trackers.silence import Silent


def made(names: Iterable[str]) -> dict[str, Callable[[], Tracker]]:
    """What makes each of these trackers."""
    return {name: _maker(name) for name in names}


def _maker(name: str) -> Callable[[], Tracker]:
    def make() -> Tracker:
        if util.find_spec(name) is None:  # each package has the tracker's name
            raise ModuleNotFoundError(f"the package is not installed: pip install {name}")
        return Silent(import_module(f"fitune.views.trackers.{name}_tracker").make())

    return make
