"""Where the time of a run goes: its seconds by phase.

In: the name of a phase, each time that one ends. Out: of each phase its seconds by the clock, and the CPU seconds of
all threads of the process. Every moment belongs to the phase that ends next, so the phases add up to the whole.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from fitune.core import processor

START = "start"
REQUEST = "request"
DATA = "data"
PLAN = "plan"
MODEL = "model"
CHECKS = "checks"
REFERENCE = "reference"
REHEARSAL = "rehearsal"
BEFORE = "before"
STEPS = "steps"
EVALUATION = "evaluation"
CHECKPOINTS = "checkpoints"
END = "end"
WHAT = {  # in the order of a run
    START: "Python and its libraries",
    REQUEST: "settings and the model's folder, checked",
    DATA: "rows read, encoded and checked",
    PLAN: "memory, traced",
    MODEL: "weights loaded, the method put on them",
    CHECKS: "checks of the model",
    REFERENCE: "log-probabilities by the reference model",
    REHEARSAL: "the largest step, tried",
    BEFORE: "held-out loss and answers before the first step",
    STEPS: "optimizer steps",
    EVALUATION: "held-out losses during the run",
    CHECKPOINTS: "checkpoints written",
    END: "the result saved, loaded again, and answers",
}
PREPARING = (START, REQUEST, DATA, PLAN, MODEL, CHECKS, REFERENCE, REHEARSAL, BEFORE)  # come before the first step


@dataclass(frozen=True)
class Phase:
    """What a phase took. seconds: by the clock. cpu_seconds: of all threads of the process."""

    name: str
    seconds: float
    cpu_seconds: float


class Clock:
    """Counts the seconds of each phase, from now on.

    Args:
        whole: from the beginning of the process on, which is this run's alone.
    """

    def __init__(self, *, whole: bool = False) -> None:
        self._at, self._cpu = (processor.BEGAN, 0.0) if whole else (time.perf_counter(), time.process_time())
        self._spent: dict[str, tuple[float, float]] = {}

    def ends(self, name: str) -> None:
        """Until now it was this phase. A phase may come several times."""
        at, cpu = time.perf_counter(), time.process_time()
        seconds, cpu_seconds = self._spent.get(name, (0.0, 0.0))
        self._spent[name] = (seconds + at - self._at, cpu_seconds + cpu - self._cpu)
        self._at, self._cpu = at, cpu

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Those that there were, in the order of a run."""
        return tuple(Phase(name, *self._spent[name]) for name in WHAT if name in self._spent)


def before_steps(phases: Sequence[Phase]) -> float:
    """Seconds before the first step of a process."""
    return sum(phase.seconds for phase in phases if phase.name in PREPARING)


def before_text(phases: Sequence[Phase]) -> str:
    """The same in a line, with what they went to."""
    parts = ", ".join(f"{phase.name} {phase.seconds:,.1f}" for phase in phases if phase.name in PREPARING)
    return f"{before_steps(phases):,.1f} s before the first step: {parts}"
