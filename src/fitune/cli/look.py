"""Verbs that look at something, as they are typed: inspect, template, methods, doctor.

In: what was typed. Out: tables in the terminal, a page, one JSON object. Nothing here loads torch before it is needed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Optional

from cyclopts import Parameter

from fitune.checks import early
from fitune.cli.flags import DataFlags, Json, SetOption, check_page, console_for, print_json, typed
from fitune.core import config as settings
from fitune.core import imports, parallel
from fitune.core.errors import ConfigError
from fitune.core.results import Check


@dataclass(frozen=True)
class Shown:
    """What inspect shows beside its tables."""

    samples: Annotated[int, Parameter(help="Rows to show token by token.")] = 3
    ids: Annotated[bool, Parameter(negative="", help="Print token ids beside the tokens.")] = False
    compare: Annotated[
        list[str] | None,
        Parameter(consume_multiple=True, negative="", help="Folders of other tokenizers to compare on the same data."),
    ] = None


def inspect(
    data: Annotated[list[str], Parameter(help="Data files, folders or ids, as for train.")],
    *,
    model: Annotated[str, Parameter(help="Model folder, or a folder with only tokenizer files.")],
    shown: Annotated[Optional[Shown], Parameter(name="*")] = None,  # noqa: UP045
    html: Annotated[Path | None, Parameter(help="Also write the result as a web page to this new file.")] = None,
    json: Json = False,
    set_: SetOption = None,
    flags: Annotated[Optional[DataFlags], Parameter(name="*", consume_multiple=True, negative="")] = None,  # type: ignore[valid-type]  # noqa: UP045  # a model made at run time
) -> None:
    """See what will be trained: rows, lengths, labels, tokens, and what the checks find."""
    shown = shown or Shown()
    given = settings.merge(settings.parse_assignments(set_ or []), typed(flags))
    early.together(
        lambda: early.folder(model),
        *early.each(early.data, *data),
        *early.each(early.folder, *(shown.compare or ())),
        lambda: early.template(str(given.get("template", "auto"))),
        lambda: check_page(html),
    )
    checked = settings.build({**given, "model": model, "data": data})

    with imports.for_good():
        from fitune.commands.inspect import inspect as look
        from fitune.commands.inspect import page, show
        from fitune.core.files import write_atomic
        from fitune.views.terminal import Terminal

    console = console_for(json)
    with Terminal(console) as watch:
        seen = look(checked, samples=shown.samples, tokenizers=shown.compare or (), watch=watch)
    show(seen, console, ids=shown.ids)
    if html is not None:
        write_atomic(html, page(seen))
        console.write_line(f"page {html}")
    if json:
        print_json(seen.as_dict())


def template(
    model: Annotated[str, Parameter(help="Model folder or hub id (tokenizer files are enough), or a run folder.")],
    *,
    template: Annotated[str, Parameter(help="Which template, as for train.")] = "auto",
    question: Annotated[str | None, Parameter(help="The question in the examples.")] = None,
    answer: Annotated[str | None, Parameter(help="The answer in the examples.")] = None,
    json: Json = False,
) -> None:
    """Show a model's prompts: template, roles, token ids, what is trained, and what ends an answer."""
    early.template(template)
    with imports.for_good():
        from fitune.commands.template import ANSWER, QUESTION, show
        from fitune.commands.template import template as look

    seen = look(model, template, question=question or QUESTION, answer=answer or ANSWER)
    show(seen, console_for(json))
    if json:
        print_json(seen.as_dict())


def methods(
    *,
    model: Annotated[
        str | None,
        Parameter(
            help="Model to count for: folder or hub id, of which only config.json is read. [default: llama-3.2-1b]"
        ),
    ] = None,
    json: Json = False,
) -> None:
    """The tuning methods: what each trains, how many parameters that is, whether it merges into the base model."""
    if model is not None:
        early.model_or_config(model)
    with imports.for_good():
        from fitune.commands.methods import EXAMPLE, overview
        from fitune.views.terminal import methods_table

    rows = overview(model)
    console_for(json).print(methods_table(rows, model or EXAMPLE))
    if json:
        print_json({"model": model or EXAMPLE, "methods": [row.as_dict() for row in rows]})


def doctor(
    *,
    clean: Annotated[
        bool,
        Parameter(negative="", help="Remove prepared data that no run in progress uses, and print its size."),
    ] = False,
    gpus: Annotated[
        bool,
        Parameter(
            negative="",
            help="Can the GPUs of this machine make a run together: NCCL, peer access, speed of an all-reduce.",
        ),
    ] = False,
    workers: Annotated[
        int, Parameter(help="With --gpus: processes; 0: one for each GPU, two where there is none.")
    ] = 0,
    json: Json = False,
) -> None:
    """Check whether this machine can fine-tune; exit code 1 where something is broken, with its fix."""
    if clean:
        _clean(json)
        return
    if gpus:
        _together(workers, json)
        return
    with imports.for_good():
        from fitune.commands.doctor import doctor as examine

    _print_checks(examine(), json)


def _together(workers: int, json: bool) -> None:
    """What `doctor --gpus` finds, in processes of their own, of which the first prints it."""
    with imports.for_good():
        from torch import cuda

        from fitune.commands.doctor_gpus import examine
        from fitune.commands.workers import launch
        from fitune.engine.parallel import join

    if parallel.size() == 1:
        count = workers or max(2, cuda.device_count())
        if not 2 <= count <= parallel.MOST:
            raise ConfigError(f"--workers: 2 to {parallel.MOST} processes", received=str(count))
        if code := launch(count, sys.argv[1:]):
            raise SystemExit(code)
        return
    found = examine(join())
    if parallel.rank() == 0:
        _print_checks(found, json)


def _print_checks(found: list[Check], json: bool) -> None:
    from fitune.views.terminal import doctor_table

    console_for(json).print(doctor_table(found))
    broken = [check for check in found if check.level == "broken"]
    if json:
        print_json({"ok": not broken, "checks": [check.as_dict() for check in found]})
    if broken:
        raise SystemExit(1)


def _clean(json: bool) -> None:
    from fitune.data import eviction
    from fitune.data.cache import default_folder

    folder = default_folder()
    there = eviction.entries(folder)
    gone, freed = eviction.clean(folder)
    left = len(there) - gone
    console_for(json).print(
        f"cache {folder}: {gone} entries of prepared data removed, {eviction.size_text(freed)} freed"
        + (f"; {left} are in use and stay" if left else ""),
        highlight=False,
        markup=False,
    )
    if json:
        print_json({"folder": str(folder), "removed": gone, "bytes": freed, "in_use": left})
