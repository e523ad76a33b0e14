"""Verbs that train, as they are typed: train, demo.

In: what was typed. Out: a run folder, a few lines in the terminal, one JSON object. Nothing here loads torch
before it is needed.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Optional

from cyclopts import Parameter

from fitune.checks import early
from fitune.cli.flags import Flags, Given, Json, SetOption, Verbose, console_for, print_json, typed
from fitune.core import config as settings
from fitune.core import imports, parallel
from fitune.core.clock import Clock, before_text
from fitune.core.errors import ConfigError
from fitune.core.results import Result
from fitune.views import screen


def train(
    *,
    config: Annotated[Path | None, Parameter(help="YAML file with settings; flags win over it.")] = None,
    set_: SetOption = None,
    resume: Annotated[bool, Parameter(negative="", help="Go on with the run in --output.")] = False,
    fit: Annotated[
        bool,
        Parameter(
            negative="",
            help="Choose the best settings that fit into memory, beside those given, and print why. "
            "The rows of an optimizer step stay as many: batch_size shrinks, accumulation grows.",
        ),
    ] = False,
    gpu: Annotated[
        str | None,
        Parameter(help="With --fit: the GPU (rtx-4090) or size (24GB) to fit into; planned only, if it is not here."),
    ] = None,
    workers: Annotated[
        int,
        Parameter(
            help="Processes that share each optimizer step, on this machine. The rows of a step, and what is made "
            "small, stay the same; each process has the whole model."
        ),
    ] = 1,
    gpus: Annotated[
        str | None, Parameter(help="As --workers, each process on a GPU of this machine: how many, or all.")
    ] = None,
    verbose: Verbose = False,
    json: Json = False,
    flags: Annotated[Optional[Flags], Parameter(name="*", consume_multiple=True, negative="")] = None,  # type: ignore[valid-type]  # noqa: UP045  # a model made at run time
) -> None:
    """Fine-tune a model on your data."""
    if _launched(workers, gpus):
        return
    values: Given = settings.read_yaml(config) if config else {}
    values = settings.merge(values, settings.parse_assignments(set_ or []))
    values = settings.merge(values, typed(flags))
    checked = _checked(values, resume=resume, fit=fit, gpu=gpu)

    with imports.for_good():
        from fitune.commands.train import resume_config
        from fitune.commands.train import train as run_training
        from fitune.engine.parallel import join
        from fitune.views.terminal import Terminal

    console, outside = console_for(json), None
    if fit and checked is not None:
        planned = _fitted(values, gpu, console, json)
        if planned is None:
            return
        checked, outside = planned
    world = join()
    if checked is None:
        checked = resume_config(values["output"], values)
    watch = Terminal(console, verbose=verbose)
    result = run_training(checked, resume=resume, watch=watch, outside=outside, clock=Clock(whole=True), world=world)
    _print_result(result, console)
    if json:
        print_json(result.as_dict())


def _launched(workers: int, gpus: str | None) -> bool:
    """Was everything done by other processes: those that this one started, or, where this one is a later process of a
    run, by that run?

    Raises:
        ConfigError: the number of processes is none.
        SystemExit: they did not end well.
    """
    if parallel.rank():
        with imports.for_good():
            from fitune.commands.follow import follow
            from fitune.engine.parallel import join

        follow(join())
        return True
    if parallel.size() > 1:
        parallel.stop_with_parent()
        return False
    if gpus is not None:
        workers = _on_gpus(gpus, workers)
    if not 1 <= workers <= parallel.MOST:
        raise ConfigError(f"--workers: 1 to {parallel.MOST} processes", received=str(workers))
    if workers == 1:
        return False
    from fitune.commands.workers import launch

    code = launch(workers, sys.argv[1:])
    if code:
        raise SystemExit(code)
    return True


def _on_gpus(gpus: str, workers: int) -> int:
    """How many processes --gpus starts.

    Raises:
        ConfigError: there are not so many GPUs.
    """
    with imports.for_good():
        from torch import cuda

    there = cuda.device_count()
    count = there if gpus == "all" else int(gpus) if gpus.isdecimal() else 0
    if workers != 1 or not 1 <= count <= there:
        raise ConfigError(
            "--gpus: a number of GPUs, or all, without --workers",
            received=f"--gpus {gpus}" + (f" --workers {workers}" if workers != 1 else ""),
            expected=f"1 to {there} GPUs" if there else "a CUDA GPU; there is none",
            fix="--workers N for processes on the CPU" if not there else "fewer GPUs",
        )
    return count


def _checked(values: Given, *, resume: bool, fit: bool, gpu: str | None) -> settings.RunConfig | None:
    """The settings, checked before torch is imported; None for a run that is resumed, which has its own."""
    if resume and "output" not in values:
        raise ConfigError("--resume: which run?", fix="add --output RUN")
    if resume:
        early.resumed(values["output"])
    if gpu is not None and not fit:
        raise ConfigError(
            "--gpu without --fit",
            received=f"--gpu {gpu}",
            expected="with --fit, or for fitune plan: the memory that a run is to fit in",
            fix=f"to choose a GPU of this machine: --device cuda:{gpu if gpu.isdecimal() else 0}",
        )
    if fit and resume:
        raise ConfigError("--fit with --resume: a resumed run keeps its settings", fix="leave --fit out")
    return None if resume else early.checked(values, output=gpu is None)


def _fitted(
    values: Given, gpu: str | None, console: screen.Screen, json: bool
) -> tuple[settings.RunConfig, dict[str, int]] | None:
    """The settings that fit best, and what their plan counts beside the tensors; None: they are for another machine,
    and nothing is run."""
    with imports.for_good():
        from fitune.commands.fit import fit
        from fitune.views.advice import show_fit
        from fitune.views.terminal import Terminal

    with Terminal(console) as watch:
        found = fit(values, gpu=gpu, watch=watch, workers=parallel.size())
    show_fit(found.advised, console)
    if found.advised.here:
        return found.config, found.outside
    console.print(
        f"planned for {found.advised.where}, which is not here: nothing is run", markup=False, highlight=False
    )
    if json:
        print_json(found.advised.as_dict())
    return None


def _print_result(result: Result, console: screen.Screen) -> None:
    base, before, after = result.base_held_out_loss, result.held_out_loss_before, result.held_out_loss_after
    if base is not None and before is not None and after is not None:
        of_base = f"{base:.4f} of the base model, " if base != before else ""
        console.print(f"held-out loss {of_base}{before:.4f} before, [bold]{after:.4f}[/] after", highlight=False)
        if after > base and result.held_out_rewards_after is None:
            console.print("[yellow]the base model does better on the held-out rows than what was tuned[/]")
    if (rewards := result.held_out_rewards_after) is not None and rewards.margin is not None:
        right = "" if rewards.accuracy is None else f", {rewards.accuracy:.1%} right"
        console.print(f"held-out reward margin [bold]{rewards.margin:+.4f}[/] after{right}", highlight=False)
    console.print(
        f"{result.steps} steps, {result.real_tokens_per_second:,.0f} real tokens/s, peak memory "
        f"{result.peak_memory_mib:,.0f} MiB ({result.expected_memory_mib:,.0f} expected)",
        highlight=False,
    )
    if result.phases:  # runs of older versions have none
        console.print(f"{before_text(result.phases)}", highlight=False)
    console.write_line(f"run folder {result.run} (open report.html; fitune chat {shlex.quote(result.run)})")


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
    with imports.for_good():
        from fitune.commands import demo as demos
        from fitune.views.terminal import Terminal, answers_table

    console = console_for(json)
    if kill:
        killed = demos.kill_demo(output, report=console.write_line)
        verdict = "[green]equal, bit for bit[/]" if killed.equal else "[red]NOT equal[/]"
        console.print(f"{killed.kills} kills, {killed.kills_inside_a_save} inside a save: weights and losses {verdict}")
        if json:
            print_json(killed.as_dict())
        if not killed.equal:
            raise SystemExit(1)
        return
    watch = Terminal(console, verbose=verbose)
    result, table = demos.demo(output, watch, resume=resume, clock=Clock(whole=True))
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
    console.write_line(f"\nrun folder   {run}   (open {Path(run) / 'report.html'})")
    console.write_line(f"talk to it   fitune chat {named} --compare")
    console.write_line(f"your data    fitune train --model {shlex.quote(model)} --data my.jsonl --output runs/mine")
    console.write_line("what fits    fitune plan llama-3.1-8b --gpu 24GB --data my.jsonl")
