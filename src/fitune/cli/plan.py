"""`fitune plan`, as it is typed: one plan, or what fits, or a plan beside what is measured.

In: what was typed. Out: tables in the terminal, a page, one JSON object. Nothing here loads torch before it is needed.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any, Optional

from cyclopts import Parameter

from fitune.checks import early
from fitune.cli.flags import Json, SetOption, console_for, optional, print_json, typed
from fitune.core import config as settings
from fitune.core.errors import ConfigError
from fitune.core.units import MIB
from fitune.views.screen import Screen


def check_page(html: Path | None) -> None:
    """Whether it can be written is known before the work."""
    if html is not None and html.exists():
        raise ConfigError(f"{html}: exists; nothing of yours is overwritten", fix="choose another --html")
    if html is not None and not html.absolute().parent.is_dir():
        raise ConfigError(f"{html}: no such folder", fix=f"mkdir -p {shlex.quote(str(html.parent))}")


PlanFlags = optional(settings.RunConfig, "PlanFlags", without=("model", "data", "output", "force"))


def plan(
    model: Annotated[
        str | None, Parameter(help="Name of the catalog (llama-3.1-8b), config.json, model folder or hub id.")
    ] = None,
    *,
    data: Annotated[
        list[str] | None,
        Parameter(consume_multiple=True, negative="", help="Data files, folders or ids, as for train."),
    ] = None,
    gpu: Annotated[
        str | None, Parameter(help="A size (24GB), a GPU (rtx-4090), this-machine. [default: this machine]")
    ] = None,
    tokenizer: Annotated[Path | None, Parameter(help="Tokenizer folder, for a model that is not here.")] = None,
    verify: Annotated[
        bool, Parameter(negative="", help="Run three steps on this machine and compare; needs the model and data.")
    ] = False,
    calibrate: Annotated[
        bool, Parameter(negative="", help="Measure what this machine's GPU takes beside tensors, and keep it.")
    ] = False,
    prove: Annotated[
        bool, Parameter(negative="", help="Show what was predicted of published runs, beside what was measured.")
    ] = False,
    html: Annotated[Path | None, Parameter(help="Write a page to this file.")] = None,
    json: Json = False,
    set_: SetOption = None,
    flags: Annotated[Optional[PlanFlags], Parameter(name="*", consume_multiple=True, negative="")] = None,  # type: ignore[valid-type]  # noqa: UP045
) -> None:
    """What a run takes before it runs, and whether that fits. Nothing but a config.json is ever fetched."""
    check_page(html)
    if sum((verify, calibrate, prove)) > 1:
        raise ConfigError("--verify, --calibrate and --prove are three things", fix="one at a time")
    console = console_for(json)
    if prove or calibrate:
        print_figures(_proof(console) if prove else _calibration(console), json)
        return
    if model is None:
        raise ConfigError("plan: of which model?", expected="a name such as llama-3.1-8b, a folder, or a hub id")
    given = settings.merge(settings.parse_assignments(set_ or []), typed(flags))
    _check(model, data or [], tokenizer, given)
    given = {name: value for name, value in given.items() if name not in ("model", "data")}
    if verify:
        useless = [flag for flag, value in (("--gpu", gpu), ("--tokenizer", tokenizer), ("--html", html)) if value]
        if useless:
            raise ConfigError(f"--verify runs the model itself on this machine: {', '.join(useless)} would do nothing")
        print_figures(_verified(model, data, given, console), json)
        return

    from fitune.commands.plan import answer
    from fitune.core.files import write_atomic
    from fitune.views.plan import plan_table, verdict
    from fitune.views.plan_drawing import plan_bar, plan_timeline
    from fitune.views.plan_page import page
    from fitune.views.terminal import Terminal

    words = str(tokenizer) if tokenizer is not None else None
    if "method" not in given and data:
        print_figures(_advised(model, data, gpu, words, given, console, html), json)
        return
    with Terminal(console) as watch:
        found = answer(model, data=data or (), gpu=gpu, words=words, watch=watch, **given)
    made = found.plan
    console.print(plan_table(made))
    console.print(plan_bar(made, min(console.width, 100)))
    console.print(plan_timeline(made, min(console.width, 100), 10))
    for note in made.notes:
        console.print(note, style="yellow", markup=False, highlight=False)
    console.print(verdict(made), markup=False, highlight=False)
    figures = made.as_dict()
    if made.fits is False:
        from fitune.commands.savers import what_helps

        help_ = what_helps(found)
        console.print(help_.text, markup=False, highlight=False)
        figures["helps"] = help_.as_dict()
    if html is not None:
        write_atomic(html, page(made))
        console.say(f"page {html}")
    print_figures(figures, json)


def _build(given: dict[str, Any], model: str, data: list[str]) -> settings.RunConfig:
    """The settings of a plan; without data it is one of lengths that are given."""
    return (
        settings.build({**given, "model": model, "data": data}) if data else settings.settings_only(given, model=model)
    )


def _check(model: str, data: list[str], tokenizer: Path | None, given: dict[str, Any]) -> None:
    """Unknown settings, wrong values and wrong paths, all of them at once."""
    early.together(
        lambda: _build(given, model, data),
        lambda: early.shape(model),
        *early.each(early.data, *data),
        lambda: early.template(str(given.get("template", "auto"))),
        *early.each(early.folder, tokenizer),
        *early.each(early.adapter, given.get("adapter")),
    )


def _advised(
    model: str,
    data: list[str],
    gpu: str | None,
    words: str | None,
    given: dict[str, Any],
    console: Screen,
    html: Path | None,
) -> dict[str, Any]:
    """What fits, ranked, with the reasons."""
    from fitune.commands.advise import advise
    from fitune.core.files import write_atomic
    from fitune.views.advice import page, show
    from fitune.views.terminal import Terminal

    with Terminal(console) as watch:
        found = advise(model, data=data, gpu=gpu, words=words, watch=watch, **given)
    show(found, console)
    if html is not None:
        write_atomic(html, page(found))
        console.say(f"page {html}")
    return found.as_dict()


def print_figures(values: dict[str, Any], json: bool) -> None:
    if json:
        print_json(values)


def _verified(model: str, data: list[str] | None, given: dict[str, Any], console: Screen) -> dict[str, Any]:
    """Three steps for real, beside their plan."""
    if not data:
        raise ConfigError("--verify: with which data?", fix="add --data FILE")
    checked = settings.build({**given, "model": model, "data": data})
    from fitune.commands.plan import verify
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


def _calibration(console: Screen) -> dict[str, Any]:
    from datetime import date

    from fitune.memory.calibration import calibrate

    found = calibrate(date.today().isoformat())
    console.say(
        f"{found['gpu']}: context {found['context'] / MIB:,.0f} MiB, "
        f"a workspace {found['workspace'] / MIB:,.1f} MiB; kept in {found['file']}"
    )
    return found


def _proof(console: Screen) -> dict[str, Any]:
    from fitune.views.proof import proof, proof_table

    found = proof()
    console.print(proof_table(found))
    return found
