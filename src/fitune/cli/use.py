"""Verbs that use a model, as they are typed: chat, serve, eval, and the page in the browser, ui.

In: what was typed. Out: answers, or a table of scores and one JSON object. No torch before it is needed.
"""

from __future__ import annotations

import sys
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Optional

from cyclopts import Parameter

from fitune.checks import early
from fitune.cli.flags import Json, Moved, Precision, Quant, console_for, pair, print_json
from fitune.core import imports
from fitune.core.errors import ConfigError
from fitune.core.options import check_drawing
from fitune.views import screen


@dataclass(frozen=True)
class Loading:
    """How the model is loaded, the same for every verb that uses one."""

    model: Moved = None
    template: Annotated[str, Parameter(help="Prompt template, for a model folder; a run brings its own.")] = "auto"
    precision: Precision = None
    quant: Quant = None
    device: Annotated[str, Parameter(help="Where to compute: auto, cpu, cuda, cuda:1, ...")] = "auto"

    def check(self, run: str) -> list[Callable[[], object]]:
        """The checks that need no torch."""
        return [
            lambda: early.run_or_model(run),
            lambda: early.template(self.template),
            *early.each(early.folder, self.model),
        ]


@dataclass(frozen=True)
class Drawing:
    """How an answer is drawn from the model's probabilities."""

    temperature: Annotated[float, Parameter(help="0: always the most probable token; higher: more variety.")] = 0.0
    top_p: Annotated[
        float, Parameter(help="Draw only from the most probable tokens that together have this probability.")
    ] = 1.0
    max_new_tokens: Annotated[int, Parameter(help="Longest answer, in tokens.")] = 256
    seed: Annotated[int | None, Parameter(help="Seed of the random draws; the same seed, the same answers.")] = None


def chat(
    run: Annotated[str, Parameter(help="Run folder or model folder.")],
    *,
    compare: Annotated[bool, Parameter(negative="", help="Show the base model's answer too.")] = False,
    system: Annotated[str, Parameter(help="System message that the conversation starts with.")] = "",
    drawing: Annotated[Optional[Drawing], Parameter(name="*")] = None,  # noqa: UP045
    loading: Annotated[Optional[Loading], Parameter(name="*")] = None,  # noqa: UP045
) -> None:
    """Talk to the model of a run; works in a pipe too: echo 你好 | fitune chat RUN."""
    how, loading = drawing or Drawing(), loading or Loading()
    check_drawing(how.temperature, how.top_p, how.max_new_tokens)
    early.together(*loading.check(run))
    with imports.for_good():
        from fitune.commands.chat import HELP, Chat, talk
        from fitune.data.templates.base import kept_date
        from fitune.engine.drawing import Sampling
        from fitune.engine.loading import load

    console = screen.Screen()
    tuned = load(run, **asdict(loading))
    sampling = Sampling(how.temperature, how.top_p, how.max_new_tokens, how.seed)
    if notice := kept_date(tuned.template):
        screen.Screen(stderr=True).write_line(notice)
    other = Chat(tuned, sampling, system=system, base=True) if compare else None
    if sys.stdin.isatty():
        console.print(HELP)
    talk(_lines(), Chat(tuned, sampling, system=system), other, console)


@dataclass(frozen=True)
class Listening:
    """Where the server listens, and to whom."""

    host: Annotated[str, Parameter(help="Address to listen at; beyond this machine only with --api-key.")] = "127.0.0.1"
    port: Annotated[int, Parameter(help="Port; 0 takes a free one.")] = 8000
    api_key: Annotated[
        str | None,
        Parameter(env_var="FITUNE_API_KEY", help="Key that clients must bring; or set FITUNE_API_KEY. [default: none]"),
    ] = None
    allow_host: Annotated[
        list[str] | None,
        Parameter(negative="", consume_multiple=True, help="Further names by which clients may call the server."),
    ] = None


@dataclass(frozen=True)
class Bounds:
    """What the server takes."""

    max_running: Annotated[int, Parameter(help="Requests that are answered at once.")] = 64
    max_waiting: Annotated[int, Parameter(help="Requests that may wait; more are refused with status 429.")] = 256
    max_new_tokens: Annotated[int, Parameter(help="Most tokens of an answer.")] = 4096
    max_body: Annotated[int, Parameter(help="Most bytes of a request.")] = 1 << 20
    cache_tokens: Annotated[
        int | None,
        Parameter(
            help="Tokens of prompts and answers, for each model, that have their place at once. "
            "[default: those that half of the free memory holds]"
        ),
    ] = None


def serve(
    runs: Annotated[list[str], Parameter(help="Run folders or model folders; each is a model by its folder's name.")],
    *,
    listening: Annotated[Optional[Listening], Parameter(name="*")] = None,  # noqa: UP045
    bounds: Annotated[Optional[Bounds], Parameter(name="*")] = None,  # noqa: UP045
    loading: Annotated[Optional[Loading], Parameter(name="*")] = None,  # noqa: UP045
) -> None:
    """Serve runs to clients of OpenAI's API on this machine: /v1/chat/completions, /v1/completions, /v1/models."""
    where, bounds, loading = listening or Listening(), bounds or Bounds(), loading or Loading()
    least = min(bounds.max_running, bounds.max_new_tokens, bounds.max_body, bounds.cache_tokens or 1)
    if not 0 <= where.port < 65536 or least < 1 or bounds.max_waiting < 0 or where.api_key == "":
        raise ConfigError(
            "serve: a setting is out of range",
            received=f"port {where.port}, {', '.join(f'{name} {value}' for name, value in asdict(bounds).items())}"
            f"{', an empty API key' if where.api_key == '' else ''}",
            expected="port 0 to 65535, limits >= 1, max-waiting >= 0, a key that is not empty",
        )
    early.together(*(check for run in runs for check in loading.check(run)))
    with imports.for_good():
        from fitune.commands.serve import Limits, Place
        from fitune.commands.serve import serve as run_server

    run_server(
        runs,
        place=Place(where.host, where.port, where.api_key, where.allow_host or ()),
        limits=Limits(*asdict(bounds).values()),
        loading=asdict(loading),
        report=screen.Screen(stderr=True).write_line,
    )


def ui(
    *,
    port: Annotated[int, Parameter(help="Port on this machine; 0 takes a free one.")] = 8010,
    runs: Annotated[str, Parameter(help="Folder of the run folders; uploads and exports lie in it too.")] = "runs",
    folder: Annotated[
        list[str] | None,
        Parameter(
            negative="", consume_multiple=True, help="Further folders whose models and data may be chosen in the page."
        ),
    ] = None,
    upload_mib: Annotated[int, Parameter(help="Largest upload, in MiB.")] = 1024,
    open_: Annotated[bool, Parameter(name="--open", negative="", help="Open the page in the browser.")] = False,
    check: Annotated[
        bool, Parameter(negative="", help="Start, let the page's server answer its own requests, and stop.")
    ] = False,
) -> None:
    """Open a page in the browser: choose, plan, train, compare, chat, export; on this machine alone."""
    if not 0 <= port < 65536 or upload_mib < 1:
        raise ConfigError(
            "ui: a setting is out of range",
            received=f"port {port}, upload-mib {upload_mib}",
            expected="port 0 to 65535, upload-mib >= 1",
        )
    with imports.for_good():
        from fitune.commands import ui as pages

    report = screen.Screen(stderr=True).write_line
    started = webbrowser.open if open_ else None
    if check:
        for line in pages.check(runs=runs):
            report(line)
        return
    pages.ui(port=port, runs=runs, folders=folder or (), upload_mib=upload_mib, report=report, started=started)


def _lines() -> Iterator[str]:
    """Lines from the terminal, with a prompt, or from a pipe."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            yield line
            if screen.failed(sys.stdout):  # nobody reads the answers any more
                return
        return
    with suppress(ImportError):
        import readline  # noqa: F401  # arrow keys and history in input()
    while True:
        try:
            yield input("> ")
        except EOFError:
            return


@dataclass(frozen=True)
class Answers:
    """What eval generates and shows."""

    loss_only: Annotated[bool, Parameter(negative="", help="Measure only the loss; generate no answers.")] = False
    max_new_tokens: Annotated[int, Parameter(help="Longest answer, in tokens.")] = 256
    skip_bad: Annotated[bool, Parameter(negative="", help="Leave out rows that cannot be used, and count them.")] = (
        False
    )
    samples: Annotated[int, Parameter(help="Rows to show, with the base model's and the tuned model's answers.")] = 5


@dataclass(frozen=True)
class Measured:
    """What eval measures on."""

    data: Annotated[
        list[str] | None,
        Parameter(
            consume_multiple=True,
            help="Held-out data: files, folders or hub ids. [default: with --verdict the rows that the run held out]",
        ),
    ] = None
    take: Annotated[
        int | None, Parameter(help="Rows to use of each source, drawn with a fixed seed. [default: all]")
    ] = None
    map_: Annotated[
        list[str] | None,
        Parameter(name="--map", consume_multiple=True, negative="", help="What columns mean: content=prompt ..."),
    ] = None


@dataclass(frozen=True)
class Harness:
    """Tasks of lm-eval that eval measures on."""

    tasks: Annotated[
        list[str] | None,
        Parameter(
            consume_multiple=True,
            negative="",
            help="Tasks of lm-eval, in place of data, for the base and the tuned model. Needs fitune[eval].",
        ),
    ] = None
    task_files: Annotated[
        str | None, Parameter(help="With --tasks: a folder of task files beside lm-eval's own; they may run code.")
    ] = None
    limit: Annotated[int | None, Parameter(help="With --tasks: rows of each task. [default: all]")] = None
    shots: Annotated[
        int | None, Parameter(help="With --tasks: examples before each question. [default: as the task says]")
    ] = None


@dataclass(frozen=True)
class Judged:
    """Whether eval compares a run with its base, and on what beside the held-out rows."""

    verdict: Annotated[
        bool,
        Parameter(
            negative="",
            help="Compare each run with its base, row by row: better, no difference shown or worse, with intervals and "
            "exact tests, and what was forgotten.",
        ),
    ] = False
    checks: Annotated[
        list[str] | None,
        Parameter(
            consume_multiple=True,
            negative="",
            help="With --verdict: rows that the base answers and the tuned model should still answer. [default: those "
            "of the bundled model, where it is the base]",
        ),
    ] = None
    kind: Annotated[
        str, Parameter(help="With --verdict: the column that names the kind of a row; without it, by language.")
    ] = "kind"


def evaluate(
    runs: Annotated[list[str], Parameter(help="Run folder, model folder or hub id; with --verdict several runs.")],
    *,
    measured: Annotated[Optional[Measured], Parameter(name="*")] = None,  # noqa: UP045
    judged: Annotated[Optional[Judged], Parameter(name="*")] = None,  # noqa: UP045
    harness: Annotated[Optional[Harness], Parameter(name="*")] = None,  # noqa: UP045
    answers: Annotated[Optional[Answers], Parameter(name="*")] = None,  # noqa: UP045
    loading: Annotated[Optional[Loading], Parameter(name="*")] = None,  # noqa: UP045
    json: Json = False,
) -> None:
    """Measure a run beside its base model, or a model: loss, perplexity, exact match, BLEU-4, ROUGE-L; or --verdict."""
    measured, judged = measured or Measured(), judged or Judged()
    answers, loading = answers or Answers(), loading or Loading()
    columns = dict(pair("map", text) for text in measured.map_ or [])
    data = measured.data or []
    early.together(
        lambda: _check_measured(runs, measured, judged, harness),
        *(check for run in runs for check in loading.check(run)),
        *early.each(early.data, *data, *(judged.checks or [])),
    )
    if harness is not None and harness.tasks:
        _tasks(runs[0], harness, loading, json=json)
        return
    if judged.verdict:
        _verdict(runs, (measured, judged, answers, loading), columns, json=json)
        return
    with imports.for_good():
        from fitune.commands.evaluate import evaluate as run_evaluation
        from fitune.views.terminal import Terminal, answers_table, scores_table

    console = console_for(json)
    with Terminal(console) as watch:
        found = run_evaluation(
            runs[0],
            data,
            take=measured.take,
            answer=not answers.loss_only,
            max_new_tokens=answers.max_new_tokens,
            samples=answers.samples,
            skip_bad=answers.skip_bad,
            columns=columns,
            watch=watch,
            **asdict(loading),
        )
    if found.samples:
        console.print(answers_table(found.samples, base=found.base is not None))
    console.print(scores_table(found))
    if json:
        print_json(found.as_dict())


def _tasks(run: str, harness: Harness, loading: Loading, *, json: bool) -> None:
    """eval --tasks."""
    with imports.for_good():
        from fitune.commands.harness import Tasks, on_tasks
        from fitune.views.terminal import Terminal
        from fitune.views.verdict import tasks_table

    folder = None if harness.task_files is None else Path(harness.task_files)
    asked = Tasks(harness.tasks or [], folder, harness.limit, harness.shots)
    console = console_for(json)
    with Terminal(console) as watch:
        found = on_tasks(run, asked, loading=asdict(loading), watch=watch)
    console.print(tasks_table(found))
    if json:
        print_json(found.as_dict())


def _check_measured(runs: list[str], measured: Measured, judged: Judged, harness: Harness | None) -> None:
    """Raises ConfigError where what was typed does not go together."""
    if harness is not None and harness.task_files is not None and not Path(harness.task_files).is_dir():
        raise ConfigError(f"{harness.task_files}: no such folder", fix="--task-files is a folder of task files")
    if harness is not None and harness.tasks and (judged.verdict or measured.data or len(runs) > 1):
        raise ConfigError("--tasks: one model, without --verdict and --data", fix="measure them one after the other")
    if harness is not None and harness.tasks:
        return
    if judged.verdict:
        early.distinct(runs)
        return
    if judged.checks is not None:
        raise ConfigError("--checks without --verdict", fix="add --verdict, or give the rows as --data")
    if not measured.data:
        raise ConfigError(
            "eval: no data", fix="give held-out rows: --data F; or compare a run with its base: --verdict"
        )
    if len(runs) > 1:
        raise ConfigError(
            "eval: several models at once", received=", ".join(runs), expected="one; with --verdict several runs"
        )


def _verdict(
    runs: list[str],
    how: tuple[Measured, Judged, Answers, Loading],
    columns: dict[str, str],
    *,
    json: bool,
) -> None:
    """eval --verdict."""
    with imports.for_good():
        from fitune.commands.verdict import Judging, verdict
        from fitune.core.options import DataSource
        from fitune.views.terminal import Terminal
        from fitune.views.verdict import shown

    measured, judged, answers, loading = how
    if loading.template != "auto":
        raise ConfigError("--template with --verdict: a run brings its own", fix="leave --template out")
    loaded = {name: value for name, value in asdict(loading).items() if name != "template"}
    data, checks = ([DataSource(path=one) for one in some or ()] for some in (measured.data, judged.checks))
    judging = Judging(
        data,
        None if judged.checks is None else checks,
        judged.kind,
        measured.take,
        not answers.loss_only,
        answers.max_new_tokens,
        answers.skip_bad,
        columns,
    )
    console = console_for(json)
    with Terminal(console) as watch:
        found = verdict(runs, judging, loading=loaded, watch=watch)
    for part in shown(found):
        console.print(part, highlight=False)
    if json:
        print_json(found.as_dict())
