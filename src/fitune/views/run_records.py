"""The JSON files of a run folder as records, parsed once, for the report and the model card.

In: a run folder. Out: records; a file that was edited is refused with the field that is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fitune.core.parse import parse
from fitune.core.plan import Plan
from fitune.core.records import DataReport, Finding, Kept, StepRecord
from fitune.core.results import Answered, Result
from fitune.engine.checkpoint import RunFolder


@dataclass(frozen=True)
class PartCount:
    """Parameters of a part of the model."""

    trainable: int
    total: int


@dataclass(frozen=True)
class ModelParts:
    """What plan.json says beside the plan: parameters by part of the model, and what lies in which dtype."""

    parts: dict[str, PartCount] = field(default_factory=dict)
    kept: list[Kept] = field(default_factory=list)


@dataclass(frozen=True)
class Measured:
    """Bytes by category that the rehearsal measured at its peak; at_the_end: what the optimizer held in the end."""

    parts: dict[str, int] = field(default_factory=dict)
    at_the_end: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class DataFile:
    """What data.json says: what became of the rows, and what the checks found. Without a report it is empty."""

    report: DataReport = field(default_factory=DataReport)
    findings: list[Finding] = field(default_factory=list)


@dataclass(frozen=True)
class RunRecords:
    """All that the report shows of a run."""

    plan: Plan
    model: ModelParts
    data: DataFile
    result: Result
    steps: list[StepRecord]
    measured: Measured
    findings: list[Finding]
    answers: list[Answered]


def read(run: RunFolder) -> RunRecords:
    """The records of a finished run.

    Raises:
        RunFolderError: a file is missing, or is not what fitune writes.
    """
    data = data_of(run)
    checks = parse(list[Finding], run.read("checks"), _file(run, "checks")) if run.has("checks") else []
    measured = run.read("measured") if run.has("measured") else {}
    return RunRecords(
        plan=Plan.from_dict(run.read("plan"), _file(run, "plan")),
        model=parse(ModelParts, run.read("plan"), _file(run, "plan")),
        data=data,
        result=result_of(run),
        steps=run.read_steps(),
        measured=parse(Measured, measured, _file(run, "measured")),
        findings=[*data.findings, *checks],
        answers=answers_of(run),
    )


def result_of(run: RunFolder) -> Result:
    """What the run reached, without its history."""
    return Result.from_dict(run.read("result"), _file(run, "result"))


def data_of(run: RunFolder) -> DataFile:
    """What became of its data."""
    return parse(DataFile, run.read("data"), _file(run, "data"))


def answers_of(run: RunFolder) -> list[Answered]:
    """Held-out prompts with their answers; none where none were asked."""
    return parse(list[Answered], run.read("answers"), _file(run, "answers")) if run.has("answers") else []


def versions_of(run: RunFolder) -> Mapping[str, str]:
    """The versions of the packages that it ran with, by name; without those that were not installed: fitune itself may
    be run from its sources."""
    there = run.read("environment").get("packages", {}) if run.has("environment") else {}
    found = parse(dict[str, str | None], there, _file(run, "environment"))
    return {name: version for name, version in found.items() if version is not None}


def _file(run: RunFolder, name: str) -> str:
    return str(run.path / f"{name}.json")
