"""`fitune plan`, as it is typed: one plan, or what fits, or a plan beside what is measured.

In: what was typed. Out: tables in the terminal, a page, one JSON object. Nothing here loads torch before it is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Optional

from cyclopts import Parameter

from fitune.checks import early
from fitune.cli.flags import Given, Json, SetOption, check_page, console_for, optional, print_json, typed
from fitune.core import config as settings
from fitune.core import imports
from fitune.core.errors import ConfigError
from fitune.core.plan import Plan
from fitune.core.units import MIB
from fitune.views.screen import Screen

PlanFlags = optional(settings.RunConfig, "PlanFlags", without=("model", "data", "output", "force"))


@dataclass(frozen=True)
class Target:
    """What a plan is for, beside the model."""

    data: Annotated[
        list[str] | None,
        Parameter(consume_multiple=True, negative="", help="Data files, folders or ids, as for train."),
    ] = None
    gpu: Annotated[
        str | None,
        Parameter(help="Memory to plan for: 24GB, a GPU (rtx-4090), or this-machine. [default: this machine]"),
    ] = None
    tokenizer: Annotated[
        Path | None, Parameter(help="Tokenizer folder, to count tokens where the model itself is not here.")
    ] = None
    workers: Annotated[
        int,
        Parameter(help="Processes that will share each step, as for train: the plan is of the one that takes most."),
    ] = 1
    gpus: Annotated[
        Optional[int], Parameter(help="As --workers: GPUs that will share each step, each as large as --gpu says.")  # noqa: UP045
    ] = None
    explain: Annotated[
        bool, Parameter(negative="", help="Show rules of thumb beside the plan, and how far off they are.")
    ] = False

    @property
    def processes(self) -> int:
        """That will share each step."""
        return self.workers if self.gpus is None else self.gpus


@dataclass(frozen=True)
class Instead:
    """What plan does instead of a plan."""

    verify: Annotated[
        bool,
        Parameter(negative="", help="Run three steps here and compare with their plan; needs the model and data."),
    ] = False
    calibrate: Annotated[
        bool, Parameter(negative="", help="Measure what this machine's GPU takes beside tensors, and keep it.")
    ] = False
    prove: Annotated[
        bool, Parameter(negative="", help="Show what was predicted for published runs beside what was measured.")
    ] = False


@dataclass(frozen=True)
class Question:
    """What is asked of plan: a model, what the plan is for, and the settings that were given."""

    model: str
    target: Target
    given: Given

    @property
    def data(self) -> list[str]:
        """The data that was named."""
        return self.target.data or []

    def arguments(self) -> Given:
        """As the Python functions take it."""
        tokenizer = str(self.target.tokenizer) if self.target.tokenizer is not None else None
        target: dict[str, object] = {"gpu": self.target.gpu, "tokenizer": tokenizer}
        if self.target.processes != 1:
            target["workers"] = self.target.processes
        return {"model": self.model, "data": self.data, **target, **self.given}


def plan(
    model: Annotated[
        str | None, Parameter(help="Name from the catalog (llama-3.1-8b), config.json, model folder or hub id.")
    ] = None,
    *,
    target: Annotated[Optional[Target], Parameter(name="*")] = None,  # noqa: UP045
    instead: Annotated[Optional[Instead], Parameter(name="*")] = None,  # noqa: UP045
    html: Annotated[Path | None, Parameter(help="Also write the result as a web page to this new file.")] = None,
    json: Json = False,
    set_: SetOption = None,
    flags: Annotated[Optional[PlanFlags], Parameter(name="*", consume_multiple=True, negative="")] = None,  # type: ignore[valid-type]  # noqa: UP045  # a model made at run time
) -> None:
    """Show how much memory a run takes and whether it fits, before anything but a config.json is downloaded.

    With data and without --method: which methods fit, ranked, with reasons (fitune.advise in Python).
    """
    check_page(html)
    target, instead, console = target or Target(), instead or Instead(), console_for(json)
    if sum((instead.verify, instead.calibrate, instead.prove)) > 1:
        raise ConfigError("--verify, --calibrate and --prove are three things", fix="one at a time")
    if instead.prove or instead.calibrate:
        figures = _proof(console) if instead.prove else _calibration(console)
    else:
        question = _question(model, target, settings.merge(settings.parse_assignments(set_ or []), typed(flags)))
        _check_workers(question, instead)
        if instead.verify:
            figures = _verified(question, html, console)
        elif "method" not in question.given and question.data:
            figures = _advised(question, html, console)
        else:
            figures = _planned(question, html, console)
    if json:
        print_json(figures)


def _question(model: str | None, target: Target, given: Given) -> Question:
    """The question, checked before torch is imported: unknown settings, wrong values and wrong paths, all at once."""
    if model is None:
        raise ConfigError("plan: of which model?", expected="a name such as llama-3.1-8b, a folder, or a hub id")
    data = target.data or []
    early.together(
        lambda: _build(given, model, data),
        lambda: early.model_or_config(model),
        *early.each(early.data, *data),
        lambda: early.template(str(given.get("template", "auto"))),
        *early.each(early.folder, target.tokenizer),
        *early.each(early.adapter, given.get("adapter")),
    )
    return Question(model, target, {name: value for name, value in given.items() if name not in ("model", "data")})


def _check_workers(question: Question, instead: Instead) -> None:
    """Raises ConfigError where what is asked is for one process."""
    workers, target = question.target.processes, question.target
    if workers < 1 or (target.gpus is not None and target.workers != 1):
        given = f"--workers {target.workers}" + ("" if target.gpus is None else f" --gpus {target.gpus}")
        raise ConfigError("--workers, or --gpus: 1 or more processes", received=given)
    if workers > 1 and instead.verify:
        raise ConfigError("--verify is for one process", received=f"{workers} processes", fix="leave --verify out")


def _planned(question: Question, html: Path | None, console: Screen) -> dict[str, object]:
    """One plan, drawn; what would help where it does not fit."""
    with imports.for_good():
        from fitune.commands.plan import answer
        from fitune.core.files import write_atomic
        from fitune.views.plan import plan_table, verdict
        from fitune.views.plan_drawing import plan_bar, plan_timeline
        from fitune.views.plan_page import page
        from fitune.views.terminal import Terminal

    with Terminal(console) as watch:
        found = answer(**question.arguments(), watch=watch)
    made, width = found.plan, min(console.width, 100)
    for part in (plan_table(made, console.width), plan_bar(made, width), plan_timeline(made, width, 10)):
        console.print(part)
    for note in made.notes:
        console.print(note, style="yellow", markup=False, highlight=False)
    console.print(verdict(made), markup=False, highlight=False)
    figures = {**made.as_dict(), **_explained(made, question, console)}
    if made.fits is False:
        from fitune.commands.savers import what_helps

        help_ = what_helps(found)
        console.print(help_.text, markup=False, highlight=False)
        figures["helps"] = help_.as_dict()
    if html is not None:
        write_atomic(html, page(made))
        console.write_line(f"page {html}")
    return figures


def _build(given: Given, model: str, data: list[str]) -> settings.RunConfig:
    """The settings of a plan; without data it is one of lengths that are given."""
    return (
        settings.build({**given, "model": model, "data": data}) if data else settings.settings_only(given, model=model)
    )


def _advised(question: Question, html: Path | None, console: Screen) -> dict[str, object]:
    """What fits, ranked, with the reasons."""
    with imports.for_good():
        from fitune.commands.advise import advise
        from fitune.core.files import write_atomic
        from fitune.views.advice import page, show
        from fitune.views.terminal import Terminal

    with Terminal(console) as watch:
        found = advise(**question.arguments(), watch=watch)
    show(found, console)
    if html is not None:
        write_atomic(html, page(found))
        console.write_line(f"page {html}")
    return {**found.as_dict(), **_explained(found.suggestions[0].plan, question, console)}


def _explained(plan: Plan, question: Question, console: Screen) -> dict[str, object]:
    """Rules of thumb beside a plan, where they were asked for."""
    if not question.target.explain:
        return {}
    from fitune.memory.rules import rules
    from fitune.views.plan import rules_table

    rows = rules(plan)
    console.print(rules_table(rows))
    return {"rules": [row.as_dict() for row in rows]}


def _verified(question: Question, html: Path | None, console: Screen) -> dict[str, object]:
    """Three real steps beside their plan."""
    others = {"--gpu": question.target.gpu, "--tokenizer": question.target.tokenizer, "--html": html}
    if useless := [flag for flag, value in others.items() if value]:
        raise ConfigError(f"--verify runs the model itself on this machine: {', '.join(useless)} would do nothing")
    if not question.data:
        raise ConfigError("--verify: with which data?", fix="add --data FILE")
    checked = settings.build({**question.given, "model": question.model, "data": question.data})
    with imports.for_good():
        from fitune.commands.verify import verify
        from fitune.views.plan import compare_table
        from fitune.views.terminal import Terminal

    with Terminal(console) as watch:
        found = verify(checked, watch)
    console.print(compare_table(found.rows))
    console.print(compare_table(found.phases))
    console.print(
        f"predicted {found.predicted / MIB:,.1f} MiB, really allocated {found.allocated / MIB:,.1f}: "
        f"[bold]{found.error:+.2%}[/]",
        highlight=False,
    )
    return found.as_dict()


def _calibration(console: Screen) -> dict[str, object]:
    from datetime import date

    with imports.for_good():
        from fitune.memory.calibration import calibrate

    found = calibrate(date.today().isoformat())
    console.write_line(
        f"{found['gpu']}: context {found['context'] / MIB:,.0f} MiB, "
        f"a workspace {found['workspace'] / MIB:,.1f} MiB; kept in {found['file']}"
    )
    return found


def _proof(console: Screen) -> dict[str, object]:
    with imports.for_good():
        from fitune.views.proof import proof, proof_table

    found = proof()
    console.print(proof_table(found))
    return found
