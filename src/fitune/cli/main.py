"""The command line: a thin door over the Python functions. Nothing here loads torch before a verb needs it.

Flags are made from the fields of RunConfig (flags.py). Errors are one message on standard error and exit code 2 (130
after Ctrl-C); a result for programs is one JSON object on standard output (`--json`).
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import suppress
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, Optional

from cyclopts import App, Parameter
from cyclopts.exceptions import CycloptsError

from fitune.checks import early
from fitune.cli import help as helppage
from fitune.cli import last_catch as lastcatch
from fitune.cli import models as modelverbs
from fitune.cli import plan as planverb
from fitune.cli.flags import (
    QUANT,
    DataFlags,
    Flags,
    Json,
    Moved,
    Precision,
    Quant,
    SetOption,
    Verbose,
    console_for,
    pair,
    print_json,
    typed,
)
from fitune.cli.plan import check_page, print_figures
from fitune.core import config as settings
from fitune.core import names, quiet
from fitune.core.errors import ConfigError, FituneError
from fitune.views import screen

app = App(
    name="fitune",
    help="Fine-tune open large language models on the hardware that you have.",
    version_flags=["--version"],
    help_flags=["--help", "-h", helppage.ALL],
    help_format="plaintext",
    help_formatter=helppage.Help(),
    suppress_keyboard_interrupt=False,
)
app.register_install_completion_command(help="Let the shell complete verbs and flags; says what it writes.")


@app.command
def demo(
    *,
    output: Annotated[str | None, Parameter(help="Run folder. [default: runs/demo-<number>]")] = None,
    kill: Annotated[
        bool, Parameter(negative="", help="Show that a killed and resumed run equals an unbroken one.")
    ] = False,
    resume: Annotated[bool, Parameter(negative="", help="Go on with the demo in --output.")] = False,
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """Fine-tune the bundled model on the bundled data (CPU, about a minute) and show what changed."""
    from fitune.commands import demo as demos
    from fitune.views.terminal import Terminal, answers_table

    console = console_for(json)
    if kill:
        killed = demos.kill_demo(output, say=console.say)
        verdict = "[green]equal, bit for bit[/]" if killed.equal else "[red]NOT equal[/]"
        console.print(f"{killed.kills} kills, {killed.kills_inside_a_save} inside a save: weights and losses {verdict}")
        if json:
            print_json(killed.as_dict())
        if not killed.equal:
            raise SystemExit(1)
        return
    result, table = demos.demo(output, Terminal(console, verbose=verbose), resume=resume)
    console.print(answers_table(table[:: max(1, len(table) // 10)]))
    console.print(
        f"exact match on {result.held_out_prompts} held-out prompts: [bold]{result.base_accuracy:.1%}[/] before, "
        f"[bold]{result.tuned_accuracy:.1%}[/] after; {result.seconds:.0f} s in all, "
        f"peak memory of the process {result.peak_memory_mib:,.0f} MiB ({result.expected_memory_mib:,.0f} expected)",
        highlight=False,
    )
    _next_steps(console, result.run, str(demos.bundled() / "model"))
    if json:
        print_json(result.as_dict())


def _next_steps(console: screen.Screen, run: str, model: str) -> None:
    named = shlex.quote(run)
    console.say(f"\nrun folder   {run}   (open {Path(run) / 'report.html'})")
    console.say(f"talk to it   fitune chat {named} --compare")
    console.say(f"your data    fitune train --model {shlex.quote(model)} --data my.jsonl --output runs/mine")
    console.say("what fits    fitune plan llama-3.1-8b --gpu 24GB --data my.jsonl")


@app.command
def train(
    *,
    config: Annotated[Path | None, Parameter(help="YAML file with settings; flags win over it.")] = None,
    set_: SetOption = None,
    resume: Annotated[bool, Parameter(negative="", help="Go on with the run in --output.")] = False,
    fit: Annotated[
        bool,
        Parameter(
            negative="",
            help="Take the best settings that fit, beside what is given, and say why. "
            "Rows of a step stay as many: batch_size shrinks, accumulation grows.",
        ),
    ] = False,
    gpu: Annotated[
        str | None, Parameter(help="With --fit: for this GPU or size; where it is not here, only planned.")
    ] = None,
    verbose: Verbose = False,
    json: Json = False,
    flags: Annotated[Optional[Flags], Parameter(name="*", consume_multiple=True, negative="")] = None,  # type: ignore[valid-type]  # noqa: UP045
) -> None:
    """Fine-tune a model on your data."""
    values: dict[str, Any] = settings.read_yaml(config) if config else {}
    values = settings.merge(values, settings.parse_assignments(set_ or []))
    values = settings.merge(values, typed(flags))
    if resume and "output" not in values:
        raise ConfigError("--resume: which run?", fix="add --output RUN")
    if resume:
        early.resumed(values["output"])
    if gpu is not None and not fit:
        raise ConfigError("--gpu without --fit", fix="fitune plan takes --gpu; train takes it with --fit")
    if fit and resume:
        raise ConfigError("--fit with --resume: a resumed run keeps its settings", fix="leave --fit out")
    checked = None if resume else early.checked(values, output=gpu is None)

    from fitune.commands.train import resume_config
    from fitune.commands.train import train as run_training
    from fitune.views.terminal import Terminal

    console, outside = console_for(json), None
    if fit and checked is not None:
        planned = _fitted(values, checked, gpu, console, json)
        if planned is None:
            return
        checked, outside = planned
    if checked is None:
        checked = resume_config(values["output"], values)
    result = run_training(checked, resume=resume, watch=Terminal(console, verbose=verbose), outside=outside)
    base, before, after = result.base_held_out_loss, result.held_out_loss_before, result.held_out_loss_after
    if base is not None and before is not None and after is not None:
        of_base = f"{base:.4f} of the base, " if base != before else ""
        console.print(f"held-out loss {of_base}{before:.4f} before, [bold]{after:.4f}[/] after", highlight=False)
        if after > base:
            console.print("[yellow]the base model does better on the held-out rows than what was tuned[/]")
    console.print(
        f"{result.steps} steps, {result.real_tokens_per_second:,.0f} real tokens/s, peak memory "
        f"{result.peak_memory_mib:,.0f} MiB ({result.expected_memory_mib:,.0f} expected)",
        highlight=False,
    )
    console.say(f"run folder {result.run} (open report.html; fitune chat {shlex.quote(result.run)})")
    if json:
        print_json(result.as_dict())


def _fitted(
    values: dict[str, Any], checked: settings.RunConfig, gpu: str | None, console: screen.Screen, json: bool
) -> tuple[settings.RunConfig, dict[str, int]] | None:
    """The settings with those that fit best, and what their plan counts beside the tensors; None: they are for another
    machine, and nothing is run."""
    from fitune.commands.advise import advise
    from fitune.views.advice import show_fit
    from fitune.views.terminal import Terminal

    given = {k: v for k, v in values.items() if k not in ("model", "data", "output", "force")}
    with Terminal(console) as watch:
        found = advise(checked.model, data=checked.data, gpu=gpu, watch=watch, shown=1, with_savers=False, **given)
    best = found.suggestions[0]
    show_fit(found, console)
    if not found.here:
        console.print(f"planned for {found.where}, which is not here: nothing is run", markup=False, highlight=False)
        print_figures(found.as_dict(), json)
        return None
    return settings.build(settings.merge(values, best.settings)), best.plan.outside


@app.command
def inspect(
    data: Annotated[list[str], Parameter(help="Data files, folders or ids, as for train.")],
    *,
    model: Annotated[str, Parameter(help="Model folder, or a folder with nothing but tokenizer files.")],
    samples: Annotated[int, Parameter(help="Rows shown token by token.")] = 3,
    ids: Annotated[bool, Parameter(negative="", help="Print token ids too.")] = False,
    compare: Annotated[
        list[str] | None, Parameter(consume_multiple=True, negative="", help="Other tokenizers to compare.")
    ] = None,
    html: Annotated[Path | None, Parameter(help="Write a page to this file.")] = None,
    json: Json = False,
    set_: SetOption = None,
    flags: Annotated[Optional[DataFlags], Parameter(name="*", consume_multiple=True, negative="")] = None,  # type: ignore[valid-type]  # noqa: UP045
) -> None:
    """See what will be trained: rows, lengths, labels, tokens, and what the checks find."""
    given = settings.merge(settings.parse_assignments(set_ or []), typed(flags))
    early.together(
        lambda: early.folder(model),
        *early.each(early.data, *data),
        *early.each(early.folder, *(compare or ())),
        lambda: early.template(str(given.get("template", "auto"))),
        lambda: check_page(html),
    )
    checked = settings.build({**given, "model": model, "data": data})

    from fitune.commands.inspect import inspect as look
    from fitune.commands.inspect import page, show
    from fitune.core.files import write_atomic
    from fitune.views.terminal import Terminal

    console = console_for(json)
    with Terminal(console) as watch:
        seen = look(checked, samples=samples, tokenizers=compare or (), watch=watch)
    show(seen, console, ids=ids)
    if html is not None:
        write_atomic(html, page(seen))
        console.say(f"page {html}")
    if json:
        print_json(seen.as_dict())


@app.command
def chat(
    run: Annotated[str, Parameter(help="Run folder, or a model folder.")],
    *,
    model: Moved = None,
    compare: Annotated[bool, Parameter(negative="", help="Show the base model's answer beside.")] = False,
    system: Annotated[str, Parameter(help="System message.")] = "",
    temperature: Annotated[float, Parameter(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, Parameter(help="Draw from the smallest set of tokens with this probability.")] = 1.0,
    max_tokens: Annotated[int, Parameter(help="Longest answer, in tokens.")] = 256,
    seed: Annotated[int | None, Parameter(help="Makes drawing repeatable.")] = None,
    template: Annotated[str, Parameter(help="Prompt template of a model folder; a run brings its own.")] = "auto",
    precision: Precision = None,
    quant: Quant = None,
    device: Annotated[str, Parameter(help="auto, cpu, cuda, ...")] = "auto",
) -> None:
    """Talk to a run; works in a pipe too: echo 你好 | fitune chat RUN."""
    if temperature < 0 or not 0 < top_p <= 1 or max_tokens < 1:
        raise ConfigError(
            "chat: a setting is out of range",
            received=f"temperature {temperature}, top-p {top_p}, max tokens {max_tokens}",
            expected="temperature >= 0, 0 < top-p <= 1, max tokens >= 1",
        )
    early.together(lambda: early.run_or_model(run), lambda: early.template(template), *early.each(early.folder, model))
    from fitune.commands.chat import HELP, Chat, talk
    from fitune.data.templates.base import kept_date
    from fitune.engine.generation import Sampling
    from fitune.engine.loading import load

    console = screen.Screen()
    tuned = load(run, model=model, device=device, template=template, precision=precision, quant=quant)
    sampling = Sampling(temperature, top_p, max_tokens, seed)
    if told := kept_date(tuned.template):
        screen.Screen(stderr=True).say(told)
    other = Chat(tuned, sampling, system=system, base=True) if compare else None
    if sys.stdin.isatty():
        console.print(HELP)
    talk(_lines(), Chat(tuned, sampling, system=system), other, console)


@app.command(name="eval")
def evaluate(
    run: Annotated[str, Parameter(help="Run folder, model folder or hub id.")],
    *,
    data: Annotated[list[str], Parameter(consume_multiple=True, help="Held-out data: files, folders or hub ids.")],
    model: Moved = None,
    take: Annotated[int | None, Parameter(help="So many rows of each, drawn with a fixed seed.")] = None,
    map_: Annotated[
        list[str] | None,
        Parameter(name="--map", consume_multiple=True, negative="", help="What columns mean: content=prompt ..."),
    ] = None,
    loss_only: Annotated[bool, Parameter(negative="", help="Generate no answers.")] = False,
    max_tokens: Annotated[int, Parameter(help="Longest answer, in tokens.")] = 256,
    samples: Annotated[int, Parameter(help="Rows shown, base against tuned.")] = 5,
    template: Annotated[str, Parameter(help="Prompt template of a model folder; a run brings its own.")] = "auto",
    precision: Precision = None,
    quant: Quant = None,
    device: Annotated[str, Parameter(help="auto, cpu, cuda, ...")] = "auto",
    json: Json = False,
) -> None:
    """Measure a run beside its base, or a model: loss, perplexity, exact match, BLEU-4, ROUGE-L."""
    columns = dict(pair("map", text) for text in map_ or [])
    early.together(
        lambda: early.run_or_model(run),
        *early.each(early.data, *data),
        lambda: early.template(template),
        *early.each(early.folder, model),
    )
    from fitune.commands.evaluate import evaluate as run_evaluation
    from fitune.views.terminal import Terminal, answers_table, scores_table

    console = console_for(json)
    with Terminal(console) as watch:
        found = run_evaluation(
            run,
            data,
            model=model,
            take=take,
            answer=not loss_only,
            max_new_tokens=max_tokens,
            samples=samples,
            template=template,
            columns=columns,
            device=device,
            precision=precision,
            quant=quant,
            watch=watch,
        )
    if found.samples:
        console.print(answers_table(found.samples, base=found.base is not None))
    console.print(scores_table(found))
    if json:
        print_json(found.as_dict())


for verb in (
    modelverbs.merge, modelverbs.reseal, modelverbs.download, modelverbs.convert, modelverbs.export,
    modelverbs.quantize,
):  # fmt: skip
    app.command(verb)
app.command(planverb.plan)


@app.command
def doctor(
    *,
    clean: Annotated[
        bool, Parameter(negative="", help="Remove prepared data that no living run uses, and say how much it was.")
    ] = False,
    json: Json = False,
) -> None:
    """Is this machine fit to fine-tune? Exit code 1 where something is broken, with its fix."""
    if clean:
        _clean(json)
        return
    from fitune.commands.doctor import doctor as examine
    from fitune.views.terminal import doctor_table

    found = examine()
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


@app.command
def methods(
    *,
    model: Annotated[
        str | None, Parameter(help="Folder or hub id; only its config.json is read. [default: Llama-3.2-1B's shape]")
    ] = None,
    json: Json = False,
) -> None:
    """The ways of tuning: what each trains, how much that is, whether it merges."""
    if model is not None:
        early.shape(model)
    from fitune.commands.methods import EXAMPLE, overview
    from fitune.views.terminal import methods_table

    rows = overview(model)
    console_for(json).print(methods_table(rows, model or EXAMPLE))
    if json:
        print_json({"model": model or EXAMPLE, "methods": [row.as_dict() for row in rows]})


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


def own_options(verb: str) -> set[str]:
    """The names of a verb's options, but for the settings of a run."""
    command = app[verb].default_command if verb in app else None
    return set(signature(command).parameters) if command else set()


def main() -> None:
    """The `fitune` command."""
    quiet.for_good()
    screen.guard()
    try:
        words = sys.argv[1:]
        verb = words[0] if words else ""
        app(names.flags(words, verb, own_options(verb)), exit_on_error=False, print_error=False)
    except FituneError as error:
        _fail(str(error), error.exit_code)
    except CycloptsError as error:
        verb = next((word for word in sys.argv[1:2] if word in app), "")
        _fail(f"{_told(error)}\n  fix:      fitune {verb}{' ' if verb else ''}--help", 2)
    except KeyboardInterrupt:
        _fail("stopped", 130)
    except Exception as error:  # none of ours: a defect, told with what it takes to report it
        _fail(lastcatch.report(error, sys.argv[1:]), 1)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of a library in Rust: it is no Exception
            raise
        _fail(lastcatch.report(RuntimeError(str(error)), sys.argv[1:]), 1)
    finally:
        if text := screen.lost():
            sys.stderr.write(f"{text}\n")


def _told(error: CycloptsError) -> str:
    """The error in one line; of pydantic's own words, only what is wrong."""
    text = " ".join(str(error).split()).replace(f"{QUANT}name", "quant").replace(QUANT, "quant.")
    found = re.search(r"nullable\[\w+\] (\S+) (.*?) \[type=\w+, input_value=(.*?), input_type", text)
    name = found[1].replace(".constrained-int", "") if found else ""
    if missing := re.search(r"parameter (--\S+) requires an argument\.?$", text, re.IGNORECASE):
        return f"{missing[1]} is needed"
    return f"--{name}: {found[2]}, received {found[3]}" if found else text


def _fail(text: str, code: int) -> None:
    label = "" if code == 130 else "error: "
    sys.stderr.write(screen.visible(f"{label}{text}\n"))
    raise SystemExit(code)
