"""The records of an advice: what is suggested, what each memory saver would give, and the reasons.

In: exact plans and figures, which commands/advise.py finds. Out: records that views show; `as_dict` is what `--json`
prints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from fitune.core.as_flags import flags
from fitune.core.plan import Plan
from fitune.memory.search import Candidate


def named(values: dict[str, Any]) -> dict[str, object]:
    """A way's figures for JSON, its quality by the name of what it is: a result of the bundled 2M model, not yours."""
    return {"result_of_bundled_2m_model" if name == "quality" else name: value for name, value in values.items()}


@dataclass(frozen=True)
class Suggestion:
    """A way that fits, planned exactly.

    settings: all of them, what was given among them; changed: of them those that are new, or other than given.
    micro_batch, accumulation: rows, and how many of them for each optimizer step: together as many rows as were asked
    for; they are in the settings. plan: of exactly these settings. largest_batch: the most rows of a micro-batch that
    fit with the same settings; needed_at_largest: bytes with it. quality: share of the questions of a test that the
    bundled model of 2 million parameters answered rightly after tuning so (search.measured).
    """

    name: str
    settings: dict[str, Any]
    changed: dict[str, object]
    micro_batch: int
    accumulation: int
    plan: Plan
    largest_batch: int
    needed_at_largest: int
    max_length: int
    quality: float
    seconds: float | None
    enough: int | None

    @property
    def flags(self) -> str:
        """What to type beside what was given."""
        return flags(self.changed)

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        values = named(asdict(replace(self, plan=None)))  # type: ignore[arg-type]  # a plan says itself what it is in JSON
        return {**values, "plan": self.plan.as_dict(), "flags": self.flags}


@dataclass(frozen=True)
class Saver:
    """What one change to the settings would give: bytes by exact plans; time: of an epoch, times as much, by counted
    operations and the share of its rate that a device reaches; cut: share of the rows that would lose tokens. cost: as
    text."""

    flag: str
    settings: dict[str, Any]
    saves: int
    time: float
    cut: float
    cost: str
    plan: Plan

    @property
    def worth(self) -> float:
        """Bytes saved for what they cost: more time, cut rows, and something for any change."""
        return self.saves / (0.05 + max(0.0, self.time - 1) + 10 * self.cut)

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        values = {name: value for name, value in vars(self).items() if name != "plan"}
        return {**values, "needed": self.plan.needed, "worth": self.worth}


@dataclass(frozen=True)
class Advice:
    """One piece of advice: what it is about, its text, and the figures in that text."""

    about: str
    text: str
    figures: Mapping[str, object]

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Advised:
    """All of it. combinations: how many were looked at; misses: the nearest ways where nothing fits."""

    model: str
    command: str  # that trains so
    where: str
    here: bool  # is that this machine?
    budget: int
    combinations: int
    suggestions: list[Suggestion]
    candidates: list[Candidate]
    savers: list[Saver]
    advice: list[Advice]
    notes: list[str]

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "model": self.model,
            "command": self.command,
            "where": self.where,
            "here": self.here,
            "budget": self.budget,
            "combinations": self.combinations,
            "suggestions": [one.as_dict() for one in self.suggestions],
            "candidates": [named(asdict(one)) for one in self.candidates],
            "savers": [one.as_dict() for one in self.savers],
            "advice": [one.as_dict() for one in self.advice],
            "notes": self.notes,
        }
