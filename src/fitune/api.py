"""fitune from Python: the same verbs and the same settings as on the command line.

Nothing is printed unless it is asked for, and nothing that dependencies say. What can be wrong with paths and names is
found before torch is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fitune.checks import early
from fitune.core import imports, names, quiet
from fitune.core.clock import Clock
from fitune.core.config import RunConfig, read_yaml
from fitune.core.config import merge as merged
from fitune.core.errors import ConfigError, RunFolderError, shorten
from fitune.core.options import DataSource
from fitune.core.quiet import quietly
from fitune.core.records import Message
from fitune.core.records import StepRecord as StepRecord
from fitune.data import given
from fitune.data.cache import Cache, default_folder

if TYPE_CHECKING:
    from fitune.commands.inspect import Inspection as Inspection
    from fitune.core.events import Watcher as Watcher
    from fitune.core.plan import Plan as Plan
    from fitune.core.results import Evaluation as Evaluation
    from fitune.core.results import Result as Result
    from fitune.core.tracking import Callback
    from fitune.core.tracking import Tracker as Tracker
    from fitune.core.verdict import Verdict as Verdict
    from fitune.memory.advice import Advised as Advised
    from fitune.models.load import Tuned as Tuned

# what is passed on as it is, by the modules that have it; loaded when it is first used
MODULES = {
    "Advised": "memory.advice", "Converted": "commands.convert", "Downloaded": "models.hub",
    "Evaluation": "core.results", "Exported": "commands.export", "Inspection": "commands.inspect",
    "Merged": "commands.merge", "Plan": "core.plan",
    "QuantizedModel": "core.results", "Result": "core.results", "StepRecord": "core.records",
    "Tracker": "core.tracking", "Tuned": "models.load", "Verdict": "core.verdict", "Watcher": "core.events",
    "convert": "commands.convert", "download": "models.hub", "export": "commands.export", "load_model": "models.load",
    "merge": "commands.merge",
    "quantize": "commands.quantize", "serve": "commands.serve",
    "ui": "commands.ui",
}  # fmt: skip
__all__ = sorted([*MODULES, "advise", "evaluate", "generate", "inspect", "load", "plan", "train", "verdict"])


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module 'fitune.api' has no attribute {name!r}")
    open_ = imports.module if MODULES[name].startswith("core.") else quiet.module  # records need none of the libraries
    found = getattr(open_(f"fitune.{MODULES[name]}"), name)
    return found if isinstance(found, type) else quietly(found)


Settings = Mapping[str, Any]  # the fields of RunConfig by name; `config.build` checks their values
Data = Any  # a path, a source, rows, or a list of them: see given.sources


def train(
    config: RunConfig | str | Path | None = None,
    *,
    resume: bool = False,
    fit: bool = False,
    verbose: bool = False,
    on_step: Callable[[StepRecord], None] | None = None,
    watch: Watcher | None = None,
    callbacks: Sequence[Callback] = (),
    **settings: Any,
) -> Result:
    """Fine-tune a model.

    Args:
        config: settings as a whole: a RunConfig, or a YAML file of them. Settings beside it win over it.
        resume: go on with the run in `output`.
        fit: choose the best settings that fit into this machine's memory, beside those that are given; the rows of an
            optimizer step stay as many. `fitune.advise` shows what it chooses, and why.
        verbose: show in the terminal what the command line shows. Default: nothing is printed.
        on_step: is called with the record of each optimizer step. What it raises ends the run; the checkpoints that
            are there stay whole, and `resume` goes on from the newest.
        watch: what the run reports to; see `fitune.Watcher`.
        callbacks: follow the run beside the trackers of `track`: objects with `start`, `log` or `end`, see
            `fitune.Tracker`, or functions of a step and its figures; in threads of their own, so they end nothing.
        settings: the fields of RunConfig: model, data, method, output, ... `data` and `eval_data` are paths, or rows:
            a list of dicts, a `datasets.Dataset`, a data frame, or anything that yields dicts. Rows are kept in the
            run's folder, so that it can be resumed.

    Returns:
        Losses, parameters, speed, memory, where the run folder is, and the record of each step (`history`).

    Raises:
        FituneError: what is wrong, and how to fix it.

    Example:
        >>> fitune.train(model="models/llama", data=["rows.jsonl"], method="lora", output="runs/first")
        >>> fitune.train(model="models/llama", data=[{"prompt": "1 + 1?", "completion": "2"}, ...])
    """
    settings = _beside(config, settings)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    if resume and "output" not in settings:
        raise ConfigError("resume: which run?", expected="output, the run folder")
    if resume and fit:
        raise ConfigError("fit with resume: a resumed run keeps its settings", fix="leave fit out")
    report = _Reports(verbose, on_step, watch, callbacks)
    if resume:
        early.resumed(settings["output"])
        return _resume({name: value for name, value in settings.items() if name not in ROWS}, report)
    cache = _cache(settings.get("cache", "auto"))
    settings |= {name: given.sources(settings[name], name, cache) for name in ROWS if name in settings}
    early.checked(settings)
    return _begin(settings, fit, report)


@dataclass(frozen=True)
class _Reports:
    """Whom a run reports to, and since when."""

    verbose: bool
    on_step: Callable[[StepRecord], None] | None
    watch: Watcher | None
    callbacks: Sequence[Callback] = ()
    clock: Clock = field(default_factory=Clock)

    def watcher(self) -> Watcher:
        from fitune.core.events import Several, Steps
        from fitune.views.screen import Screen
        from fitune.views.terminal import Terminal

        shown: list[Watcher] = [Terminal(Screen())] if self.verbose else []
        shown += [Steps(self.on_step)] if self.on_step is not None else []
        shown += [self.watch] if self.watch is not None else []
        return Several(shown)


@quietly
def _resume(settings: Settings, report: _Reports) -> Result:
    with imports.loading():
        from fitune.commands.train import resume_config
        from fitune.commands.train import train as run

    config = resume_config(settings["output"], dict(settings))
    return run(config, resume=True, watch=report.watcher(), clock=report.clock, callbacks=report.callbacks)


@quietly
def _begin(settings: Settings, fit: bool, report: _Reports) -> Result:
    with imports.loading():
        from fitune.commands.train import train as run
        from fitune.core.config import build

    watch = report.watcher()
    if not fit:
        return run(build(settings), watch=watch, clock=report.clock, callbacks=report.callbacks)
    from fitune.commands.fit import fit as fitted

    found = fitted(settings, watch=watch)
    return run(found.config, watch=watch, outside=found.outside, clock=report.clock, callbacks=report.callbacks)


ROWS = ("data", "eval_data")


def _beside(config: RunConfig | str | Path | None, settings: Settings) -> dict[str, Any]:
    """Settings by fitune's names; those of a config, where there is one, under them."""
    if config is None:
        return names.ours(settings)
    if isinstance(config, RunConfig):
        whole = config.model_dump(mode="json", exclude_unset=True)
    elif isinstance(config, (str, Path)):
        whole = read_yaml(Path(config))
    else:
        raise ConfigError(
            "a config of this kind cannot be used",
            received=f"{type(config).__name__}: {shorten(config, 80)}",
            expected="a RunConfig, or the path of a YAML file",
            fix="settings are keywords: model=..., data=..., method=...",
        )
    return merged(whole, names.ours(settings))


def _cache(folder: str) -> Cache:
    """Where rows without a file are written: where prepared data is kept, else a temporary folder."""
    try:
        return Cache() if folder == "none" else Cache(default_folder() if folder == "auto" else Path(folder))
    except RunFolderError:
        return Cache()


def plan(
    model: str | Path | RunConfig,
    *,
    data: Data = (),
    gpu: str | None = None,
    tokenizer: str | Path | None = None,
    watch: Watcher | None = None,
    **settings: Any,
) -> Plan:
    """What a run would take, before anything is downloaded.

    Args:
        model: a name of the catalog, a config.json, a model folder, or a hub id; or all settings at once, as for
            `train`: a RunConfig, or a YAML file.
        data: as for `train`; none: that of such settings, else every row is as long as max_length.
        gpu: a size (24GB), a GPU (rtx-4090, 4090), this-machine. Default: this machine.
        tokenizer: a tokenizer folder, for a model that is not here.
        watch: what progress is reported to.
        settings: as for `train`.

    Raises:
        FituneError: settings, model, data or device that cannot be.
    """
    model, there, settings = _question(model, data, tokenizer, settings)
    make = quietly(quiet.module("fitune.commands.plan").plan)
    made: Plan = make(model, data=there, gpu=gpu, tokenizer=tokenizer, watch=watch, **settings)
    return made


def advise(
    model: str | Path | RunConfig,
    *,
    data: Data = (),
    gpu: str | None = None,
    tokenizer: str | Path | None = None,
    watch: Watcher | None = None,
    **settings: Any,
) -> Advised:
    """Which methods and settings fit, ranked, each planned exactly, with the reasons.

    Args:
        model, data, gpu, tokenizer, watch: as for `plan`; there must be data.
        settings: as for `train`: those that must stay. batch_size and accumulation stay as their product, the rows of
            an optimizer step.

    Returns:
        Suggestions, the best first (`suggestions[0].settings` are for `train`), the memory savers, and the reasons.

    Raises:
        FituneError: settings, model, data or device that cannot be; or nothing fits.

    Example:
        >>> fitune.advise("llama-3.1-8b", data=["rows.jsonl"], gpu="24GB").suggestions[0].flags
    """
    model, there, settings = _question(model, data, tokenizer, settings)
    if not there:
        raise ConfigError("advise: with which data?", expected="paths or rows", fix='data=["rows.jsonl"]')
    search = quietly(quiet.module("fitune.commands.advise").advise)
    found: Advised = search(model, data=there, gpu=gpu, tokenizer=tokenizer, watch=watch, **settings)
    return found


def _question(
    model: str | Path | RunConfig, data: Data, tokenizer: str | Path | None, settings: Settings
) -> tuple[str | Path, list[Any], dict[str, Any]]:
    """The model, the data and the settings of a plan, checked before torch is imported."""
    settings = dict(settings)
    if not isinstance(model, (str, Path)) or str(model).endswith(early.YAML):
        settings = _beside(model, settings)
        data = data if _is_given(data) else settings.pop("data", ())
        model = settings.pop("model", "")
        settings = {name: value for name, value in settings.items() if name not in ("data", "output", "force")}
    settings = names.ours(settings)
    cache = _cache(settings.get("cache", "auto"))
    there = given.sources(data, "data", cache) if _is_given(data) else []
    held_out = _listed(settings.get("eval_data"))
    early.together(
        lambda: early.model_or_config(str(model)),
        *early.each(early.data, *_paths(there), *held_out),
        lambda: early.template(str(settings.get("template", "auto"))),
        *early.each(early.folder, tokenizer),
        *early.each(early.adapter, settings.get("adapter")),
    )
    return str(model), there, settings


def inspect(
    data: Data,
    *,
    model: str | Path,
    samples: int = 3,
    compare: Sequence[str | Path] = (),
    watch: Watcher | None = None,
    **settings: Any,
) -> Inspection:
    """What will be trained: rows, lengths, labels, tokens, and what the checks find.

    Args:
        data: paths or rows, as for `train`.
        model: a model folder, or a folder with only tokenizer files.
        samples: how many rows are kept token by token.
        compare: folders of other tokenizers to compare on the same data.
        watch: what is reported to.
        settings: as for `train`: those that concern data.

    Raises:
        FituneError: data or a tokenizer that cannot be read at all. Bad rows are counted, not raised.

    Example:
        >>> fitune.inspect(["rows.jsonl"], model="models/llama").label_share
    """
    from fitune.core.config import build

    settings = names.ours(settings)
    there = given.sources(data, "data", _cache(settings.get("cache", "auto")))
    early.together(
        lambda: early.folder(model),
        *early.each(early.data, *_paths(there)),
        *early.each(early.folder, *compare),
        lambda: early.template(str(settings.get("template", "auto"))),
    )
    checked = build({**settings, "model": str(model), "data": there})
    look = quietly(quiet.module("fitune.commands.inspect").inspect)
    seen: Inspection = look(checked, samples=samples, tokenizers=[str(one) for one in compare], watch=watch)
    return seen


def _listed(paths: object) -> list[str]:
    """The paths that stand in a setting of data; rows in memory need no look."""
    several = paths if isinstance(paths, (list, tuple)) else [paths]
    return [str(one) for one in several if isinstance(one, (str, Path))]


def _is_given(data: Data) -> bool:
    return not (isinstance(data, (list, tuple)) and not data)


def _paths(sources: Sequence[Any]) -> list[DataSource]:
    return [one if isinstance(one, DataSource) else DataSource.model_validate(
        one if isinstance(one, Mapping) else {"path": one}) for one in sources]  # fmt: skip


def load(
    run_or_model: str | Path,
    *,
    model: str | Path | None = None,
    device: str = "auto",
    template: str = "auto",
    precision: str | None = None,
    quant: str | None = None,
) -> Tuned:
    """A run, or a model folder, to talk to. See fitune.generate.

    Args:
        run_or_model: a run folder, a model folder or a hub id.
        model: where the base of a run lies now, if it was moved; its weights must be the same.
        device: auto, cpu, cuda, ...
        template: for a model folder; a run brings its own.
        precision: fp32, bf16, fp16 or auto. Default: the run's own; of a model folder fp32.
        quant: none, int8, nf4 or fp4. Default: as in the run; of a model folder none.
    """
    early.together(
        lambda: early.run_or_model(run_or_model), lambda: early.template(template), *early.each(early.folder, model)
    )
    open_ = quietly(quiet.module("fitune.engine.loading").load)
    how = {"device": device, "template": template, "precision": precision, "quant": quant}
    tuned: Tuned = open_(run_or_model, model=model, **how)
    return tuned


def generate(
    tuned: Tuned | str | Path,
    prompt: str | Sequence[dict[str, str]],
    *,
    model: str | Path | None = None,
    system: str = "",
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    base: bool = False,
) -> str:
    """The model's answer.

    Args:
        tuned: what `load` gave, or a path for it.
        prompt: a question, or messages `[{"role": "user", "content": ...}, ...]`.
        model: where the base of a run lies now, if it was moved; for a path.
        system: a system message.
        max_new_tokens: longest answer, in tokens.
        temperature: 0 is greedy.
        top_p: draw from the smallest set of tokens with this much probability.
        seed: makes drawing repeatable.
        base: answer as the base model, without what was tuned.

    Example:
        >>> fitune.generate("runs/first", "What is the capital?")
    """
    tuned = load(tuned, model=model) if isinstance(tuned, (str, Path)) else tuned
    from fitune.engine.drawing import Sampling
    from fitune.engine.generation import answer

    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    messages = [Message(turn["role"], turn["content"]) for turn in turns]  # type: ignore[arg-type]  # a role that is none is refused by the template
    if system:
        messages = [Message("system", system), *messages]
    return quietly(answer)(tuned, messages, Sampling(temperature, top_p, max_new_tokens, seed), base=base)


def evaluate(run_or_model: str | Path, data: Data, **how: Any) -> Evaluation:
    """Measure a run, beside its base, or a model.

    Args:
        run_or_model: a run folder, a model folder or a hub id.
        data: paths or rows, as for `train`; each row ends in the expected answer.
        how: model, take, answer, max_new_tokens, samples, skip_bad, template, columns, device, precision, quant, watch:
            see `fitune.commands.evaluate.evaluate`.

    Raises:
        FituneError: the run, the model or the data cannot be used.
    """
    cache = _cache("auto")
    there = _paths(given.sources(data, "data", cache))
    early.together(lambda: early.run_or_model(run_or_model), *early.each(early.data, *there))
    found: Evaluation = quietly(quiet.module("fitune.commands.evaluate").evaluate)(run_or_model, there, **how)
    return found


def verdict(runs: str | Path | Sequence[str | Path], data: Data = (), *, checks: Data = None, **how: Any) -> Verdict:
    """Is what was tuned better than its base, and what did it forget? Row by row, with intervals and exact tests.

    Args:
        runs: a run folder, or several side by side.
        data: held-out rows, as for `train`; none: those that each run held out.
        checks: rows that the base answers and the tuned model should still answer; None: those of the bundled model,
            where it is the base.
        how: kind, take, answer, max_new_tokens, skip_bad, columns: see `fitune.commands.verdict.Judging`; model,
            device, precision, quant: as for `load`; watch.

    Raises:
        FituneError: a run or the data cannot be used.

    Example:
        >>> fitune.verdict("runs/first", checks="general.jsonl").runs[0].forgot
    """
    several = [runs] if isinstance(runs, (str, Path)) else list(runs)
    cache = _cache("auto")
    held_out = _paths(given.sources(data, "data", cache)) if _is_given(data) else []
    general = None if checks is None else _paths(given.sources(checks, "checks", cache))
    checked = (*early.each(early.run_or_model, *several), *early.each(early.data, *held_out, *(general or [])))
    early.together(lambda: early.distinct(several), *checked)
    loading = {name: how.pop(name) for name in ("model", "device", "precision", "quant") if name in how}
    watch, module = how.pop("watch", None), imports.module("fitune.commands.verdict")
    judging = module.Judging(held_out, general, **how)
    found: Verdict = quietly(module.verdict)(several, judging, loading=loading, watch=watch)
    return found
