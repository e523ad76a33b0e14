"""A run folder as one page: report.html, self-contained (no script, font or picture from elsewhere). Its curves are
drawn where no script runs, too.

In: the files of a run folder. Out: the page. It can be made again from the folder at any time.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files

import yaml
from markupsafe import Markup

from fitune.core.clock import WHAT, Phase, before_steps
from fitune.core.config import RunConfig
from fitune.core.files import write_atomic
from fitune.core.options import Options
from fitune.core.plan import Plan
from fitune.core.records import Rewards, StepRecord
from fitune.core.results import Answered, Result
from fitune.core.units import MIB
from fitune.engine.checkpoint import RunFolder
from fitune.views.charts import NARROW, WIDE, Series, line_chart, thinned
from fitune.views.differences import marked
from fitune.views.pages import render
from fitune.views.run_records import Measured, ModelParts, read
from fitune.views.terminal import LENGTHS, length_rows, parameters

WIDE_RANGE = 30  # of losses, largest to smallest
MOST_COLUMNS = 4_000  # of a curve that is zoomed in the page


FILES = {  # of a run folder, and what a reader finds in them
    "plan.html": "memory, phase by phase",
    "config.yaml": "all settings; fitune train --config takes them",
    "result.json": "the figures of this page",
    "steps.jsonl": "loss, learning rate and gradient norm of each step",
    "data.json": "rows, lengths and checks of the data, with checksums of its files",
    "template.json": "the prompt template and stop tokens",
    "answers.json": "held-out prompts, answered before and after",
    "checks.json": "checks made while it ran",
    "environment.json": "machine and versions",
    "adapter": "what was trained",
    "checkpoints": "the newest and the best checkpoints",
    "seal.json": "checksums of all these but the pages, and the run's identity",
}
GROUPS = {"adapter": "bottleneck", "p-tuning": "p_tuning"}  # methods whose settings have another name


def exact_matches(answers: Sequence[Answered], when: str) -> int:
    """How many answers are the expected text; white space at the ends does not count.

    Args:
        answers: rows of answers.json.
        when: "before" or "after".
    """
    return sum(getattr(row, when).strip() == row.expected.strip() for row in answers)


def _score(answers: Sequence[Answered]) -> str:
    """How many answers match exactly, as text; empty where none does."""
    before, after, count = exact_matches(answers, "before"), exact_matches(answers, "after"), max(1, len(answers))
    text = f"exact match of {len(answers)}: {before / count:.0%} before, {after / count:.0%} after"
    return text if before or after else ""


def _about(config: RunConfig) -> str:
    """What the method is, the objective and the quantizer, and their papers, from the settings' own text."""
    groups = [getattr(config, name, None) for name in (GROUPS.get(config.method, config.method), config.objective)]
    text = " ".join(inspect.getdoc(type(group)) or "" for group in groups if isinstance(group, Options))
    quant = type(config.quant).model_fields["name"].description if config.quant.name != "none" else ""
    return " ".join(" ".join((text or "", quant or "")).split())


def _numbers(result: Result) -> list[tuple[str, str]]:
    def loss(value: float | None) -> str:
        return "none" if value is None else f"{value:.4f}"

    share = result.trainable_parameters / result.total_parameters
    base, before = result.base_held_out_loss, result.held_out_loss_before
    of_base = [] if base == before else [("held-out loss of the base model", loss(base))]
    return [
        *of_base,
        ("held-out loss before", loss(before)),
        ("held-out loss after", loss(result.held_out_loss_after)),
        *_held_out_rewards(result),
        ("trainable parameters", f"{result.trainable_parameters:,} ({share:.2%})"),
        ("steps", f"{result.steps:,}"),
        ("real tokens/s", f"{result.real_tokens_per_second:,.0f}"),
        ("training time", f"{result.seconds:,.1f} s"),
    ]


def _held_out_rewards(result: Result) -> list[tuple[str, str]]:
    """Of preferences, what the held-out rows had before and have after."""
    before, after = result.held_out_rewards_before, result.held_out_rewards_after
    if before is None or after is None:
        return []
    shown = {"margin": ("reward margin", "{:+.4f}"), "accuracy": ("reward accuracy", "{:.1%}"),
             "kl": ("log-ratio to the reference", "{:+.3f}")}  # fmt: skip
    values = {name: (getattr(before, name), getattr(after, name)) for name in shown}
    return [
        (f"held-out {shown[name][0]}", f"{shown[name][1].format(first)} to {shown[name][1].format(then)}")
        for name, (first, then) in values.items()
        if first is not None and then is not None
    ]


def _parts(model: ModelParts) -> list[tuple[str, ...]]:
    """Frozen, trainable and all parameters by part of the model."""
    parts = [(name, part.trainable, part.total) for name, part in model.parts.items()]
    return [(name, *(f"{n:,}" for n in figures)) for name, *figures in parameters(parts)]


def _mib(size: float) -> str:
    """MiB with a decimal, and never 0 for something."""
    return "<0.1" if 0 < size < 0.05 * MIB else f"{size / MIB:,.1f}"


@dataclass(frozen=True)
class MemoryRow:
    """A quantity in MiB, predicted beside measured; measured is empty where nothing was."""

    what: str
    predicted: str
    measured: str


def _memory(plan: Plan, measured: Measured, process_mib: float) -> list[MemoryRow]:
    """Predicted beside measured, MiB, each row of one quantity: every component of the largest step, all its tensors,
    and what a process holds beside them."""
    steps = [moment for moment in plan.phases if moment.phase in ("forward", "loss", "backward")]
    parts = max(steps or plan.phases, key=lambda moment: moment.bytes).parts
    found = {**measured.parts, **measured.at_the_end}
    rows = [
        MemoryRow(name, _mib(parts.get(name, 0)), _mib(found.get(name, 0)) if found else "")
        for name in dict.fromkeys([*parts, *found])
    ]
    tensors = sum(found.values())
    total = MemoryRow("all tensors of that step", _mib(sum(parts.values())), _mib(tensors) if found else "")
    rest = _mib(process_mib * MIB - tensors) if found and plan.device != "cuda" else ""
    names = f"beside the tensors: {'; '.join(plan.outside)}"
    return [*rows, total, MemoryRow(names, _mib(sum(plan.outside.values())), rest)]


@dataclass(frozen=True)
class PhaseRow:
    """A phase, what belongs to it, and its seconds as text."""

    name: str
    what: str
    seconds: str
    cpu_seconds: str


def _seconds(phases: Sequence[Phase]) -> list[PhaseRow]:
    """A row for each phase, and their sum; no row for runs of versions that did not count."""
    rows = [(phase.name, WHAT.get(phase.name, ""), phase.seconds, phase.cpu_seconds) for phase in phases]
    rows += [("all", "", sum(row[2] for row in rows), sum(row[3] for row in rows))] if rows else []
    return [PhaseRow(name, what, f"{seconds:,.2f}", f"{cpu:,.2f}") for name, what, seconds, cpu in rows]


@dataclass(frozen=True)
class Curves:
    """Lines of one picture. drawn: for a screen and for a phone, where no script runs; log: the same on that scale."""

    title: str
    series: Sequence[Series]
    drawn: Sequence[str]
    log: Sequence[str] = ()

    def as_dict(self) -> dict[str, object]:
        """For the script that draws them again, with values under the pointer."""
        lines = [
            {"name": one.name, "colour": f"var({one.colour})", "marks": one.marks, "points": _rounded(one)}
            for one in self.series
        ]
        return {"title": self.title, "series": lines}


def _rounded(series: Series) -> list[tuple[float, float]]:
    """Points for the script: six digits, and of many no more than it shows when it is zoomed far in."""
    points = thinned([point for point in series.points if math.isfinite(point[1])], MOST_COLUMNS)
    return [(x, float(f"{y:.6g}")) for x, y in points]


def _charts(records: Sequence[StepRecord], before: float | None, unit: str) -> list[Curves]:
    """Loss, on both scales, what there is of preferences, and the learning rate."""
    held_out = [(float(r.step), r.held_out_loss) for r in records if r.held_out_loss is not None]
    held_out = held_out if before is None else [(0.0, before), *held_out]
    losses = [
        Series("training", [(r.step, r.loss) for r in records if r.applied], "--line1"),
        Series("held-out", held_out, "--line2", marks=True),
    ]
    rates = [Series("learning rate", [(r.step, r.lr) for r in records])]

    def drawn(series: Sequence[Series], name: str, height: int = 230, *, log: bool = False) -> list[str]:
        return [
            line_chart(series, x_label="step", y_label=name, width=width, height=height, log=log)
            for width in (WIDE, NARROW)
        ]

    return [
        Curves(f"Loss per {unit}", losses, drawn(losses, "loss"), drawn(losses, "loss", log=True)),
        *(Curves(title, some, drawn(some, "", 150)) for title, some in _of_preferences(records).items()),
        Curves("Learning rate", rates, drawn(rates, "learning rate", 110)),
    ]


def _script(charts: Sequence[Curves], *, log: bool) -> Markup:
    """The script of the page and the numbers that it draws; nothing in them can end it."""
    numbers = json.dumps({"log": log, "charts": [one.as_dict() for one in charts]}, separators=(",", ":"))
    code = files("fitune.views.pages").joinpath("chart.js").read_text(encoding="utf-8")
    return Markup(f"{code}\nconst CURVES = {numbers.replace('<', chr(92) + 'u003c')};")  # noqa: S704  # ours


def _of_preferences(records: Sequence[StepRecord]) -> dict[str, list[Series]]:
    """Lines of what a run made of its preferences, by the title of their chart; of another run none."""

    def line(name: str, of: Callable[[StepRecord], Rewards | None], colour: str, *, marks: bool = False) -> Series:
        points = [(float(r.step), getattr(rewards, name)) for r in records if (rewards := of(r)) is not None]
        return Series("", [(step, value) for step, value in points if value is not None], colour, marks=marks)

    if not any(record.rewards for record in records):
        return {}
    charts: dict[str, list[Series]] = {}
    for name, title in (("margin", "Reward margin of chosen over rejected"), ("accuracy", "Reward accuracy")):
        training = replace(line(name, lambda r: r.rewards, "--line1"), name="training")
        charts[title] = [
            training, replace(line(name, lambda r: r.held_out_rewards, "--line2", marks=True), name="held-out"),
        ]  # fmt: skip
    charts["Log-probability of the answers"] = [
        replace(line("chosen_logp", lambda r: r.rewards, "--line1"), name="chosen"),
        replace(line("rejected_logp", lambda r: r.rewards, "--line2"), name="rejected"),
    ]
    return charts


def _wide(losses: Sequence[float]) -> bool:
    """Do they differ by so much that a linear scale shows most of them as zero? Then the logarithmic one is first."""
    return bool(losses) and min(losses) > 0 and max(losses) / min(losses) > WIDE_RANGE


def write(run: RunFolder) -> None:
    """Write report.html from what lies in the run folder.

    Raises:
        RunFolderError: a file of the run is missing, or is not what fitune writes.
    """
    found, config = read(run), run.read_config()
    result = found.result
    charts = _charts(found.steps, result.held_out_loss_before, "row" if config.wanted != "answers" else "target token")
    log_first = _wide([record.loss for record in found.steps if record.applied])
    page = render(
        "report",
        title=f"fitune: {config.method} on {config.model.replace(chr(92), '/').rpartition('/')[2]}",
        subtitle=result.run,
        about=_about(config),
        numbers=_numbers(result),
        charts=charts,
        script=_script(charts, log=log_first),
        style=Markup(files("fitune.views.pages").joinpath("chart.css").read_text(encoding="utf-8")),  # noqa: S704  # ours
        log_first=log_first,
        answers=[(answer, *marked(answer.before, answer.after)) for answer in found.answers],
        score=_score(found.answers),
        memory=_memory(found.plan, found.measured, result.peak_memory_mib),
        cuda=found.plan.device == "cuda",
        seconds=_seconds(result.phases),
        before=f"{before_steps(result.phases):,.1f}",
        parts=_parts(found.model),
        kept=found.model.kept,
        lengths=(LENGTHS, length_rows(found.data.report.length_choices)),
        result=result,
        findings=sorted(found.findings, key=lambda finding: finding.level != "warn"),
        files=[(name, what) for name, what in FILES.items() if (run.path / name).exists()],
        settings=yaml.safe_dump(config.model_dump(mode="json"), allow_unicode=True, sort_keys=False),
        environment=yaml.safe_dump(run.read("environment"), allow_unicode=True, sort_keys=False),
    )
    write_atomic(run.report, page)
