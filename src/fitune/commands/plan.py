"""`fitune plan`: what a run would take, before anything is downloaded or loaded.

In: a model by its name, config.json, folder or hub id, data if there is some, a device by its name or size. Out: the
plan. Of a hub's model only config.json is fetched. Where no tokenizer is at hand the lengths of rows are estimated from
their characters, and the plan says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fitune.checks import datachecks
from fitune.commands.prepare import Job, absolute, check_quantized, own_settings, prepare, quant_settings, resolve
from fitune.core import catalog
from fitune.core.config import RunConfig, build
from fitune.core.errors import Collector, ConfigError, DataError
from fitune.core.events import Silent, Watcher
from fitune.core.files import expand
from fitune.core.letters import FULL_WIDTH
from fitune.core.plan import Compared
from fitune.core.records import Conversation, DataReport, LengthChoice, Message, Sample
from fitune.data import formats, rows, templates, tokenizer
from fitune.data.batches import Loader
from fitune.data.cache import Cache
from fitune.data.fitting import NO_LIMIT
from fitune.data.lengths import automatic, choices, summary
from fitune.data.tokenizer.new_tokens import NewToken, add_tokens
from fitune.engine import optim
from fitune.memory import device as devices
from fitune.memory import plan as plans
from fitune.memory import steps, trace
from fitune.models import adapters, methods, precision
from fitune.models.configs import config_of, read_config, read_config_file
from fitune.models.devices import pick_device
from fitune.models.kernels.target import of
from fitune.models.locate import locate
from fitune.models.parts import trainable

NO_DATA = "-"  # stands for data that nobody named
ASSUMED_LENGTH = 1024  # of a row, where neither data nor max_length say anything
ESTIMATED = 20_000  # rows whose lengths are estimated; more are alike
# Characters for a token, measured with five tokenizers on Chinese and English instructions (docs/en/memory.md)
WIDE, NARROW, LATIN = 1.4, 0.5, 4.2
BIG_VOCABULARY = 60_000  # from here on Chinese words are tokens of their own
EXTRA = 12  # tokens of a template for each message
FULL_WIDTH_LETTER = re.compile(f"[{FULL_WIDTH}]")


@dataclass(frozen=True)
class Asked:
    """What a plan is for: a checked config, the shape of the model, its folder where it has one, and its name."""

    config: RunConfig
    shape: Any
    folder: Path | None
    name: str
    where: devices.Device


@dataclass(frozen=True)
class Rows:
    """What is known of the data. note: how, where that must be told. words: the folder of the tokenizer, where there is
    one; added: tokens that it got. lengths: of the uncut rows, as `lengths.summary`; choices: what each length cuts."""

    samples: Sequence[Sample]
    held_out: Sequence[Sample]
    max_length: int
    note: str = ""
    report: DataReport | None = None
    words: Path | None = None
    added: Sequence[NewToken] = ()
    lengths: Mapping[str, float] = field(default_factory=dict)
    choices: Sequence[LengthChoice] = ()


def plan(
    model: str | Path,
    *,
    data: str | Path | Sequence[str | Path | Mapping[str, Any]] = (),
    gpu: str | None = None,
    words: str | Path | None = None,
    watch: Watcher | None = None,
    **settings: Any,
) -> plans.Plan:
    """What a run would take.

    Args:
        model: a name of the catalog, a config.json, a model folder, or a hub id.
        data: files, folders or ids, as for `train`; none: every row is as long as max_length.
        gpu: a size (24GB), a GPU (rtx-4090), this-machine. Default: this machine.
        words: a tokenizer folder, for a model that is not here.
        watch: is told how far it is.
        settings: as for `train`.

    Raises:
        FituneError: settings, model, data or device that cannot be.
    """
    return answer(model, data=data, gpu=gpu, words=words, watch=watch, **settings).plan


@dataclass(frozen=True)
class Answer:
    """A plan, with what it was made of: the question, what is known of its data, and the settings that were given."""

    asked: Asked
    rows: Rows
    plan: plans.Plan
    given: Mapping[str, Any]


def answer(
    model: str | Path,
    *,
    data: str | Path | Sequence[str | Path | Mapping[str, Any]] = (),
    gpu: str | None = None,
    words: str | Path | None = None,
    watch: Watcher | None = None,
    **settings: Any,
) -> Answer:
    """As `plan`, with what it was made of, so that nobody who asks on reads the data or traces the model again."""
    sources = [data] if isinstance(data, (str, Path)) else list(data)
    settings = {name: _plain(value) for name, value in settings.items()}
    wanted = ask(str(model), data=[_plain(source) for source in sources], gpu=gpu, settings=settings)
    known = look(wanted, words, watch or Silent())
    made = plans.plan(work_of(wanted, known), wanted.where, name=wanted.name)
    notes = [known.note] if known.note else []
    if wanted.where.kind == "cuda" and not wanted.where.bf16 and made.precision == "bf16":
        notes.append(f"bf16 {precision.EMULATED}: --precision auto")
    made = replace(made, notes=[*notes, *made.notes], max_length=known.max_length)
    return Answer(wanted, known, made, settings)


def _plain(value: Any) -> Any:
    """A path as text, anything else as it is."""
    return str(value) if isinstance(value, Path) else value


def ask(model: str, *, data: Sequence[Any], gpu: str | None, settings: Mapping[str, Any]) -> Asked:
    """The settings, checked; all that is wrong at once."""
    config = build({**settings, "model": model, "data": list(data) or [NO_DATA]})
    problems = Collector()
    with problems.gather():
        where = _place(gpu, config.device)
    with problems.gather():
        methods.find(config.method).check(config)
        own_settings(config)
    with problems.gather():
        optim.check(config)
    changes = _sources(config, problems)
    with problems.gather():
        if config.adapter is not None:
            adapters.locate(config.adapter)
    with problems.gather():
        shape, folder, name = shape_for(model)
    problems.raise_any()
    with problems.gather():
        config = _precision(config, where, shape)
    with problems.gather():
        quant_settings(config, shape)
        check_quantized(config, methods.find(config.method), shape, torch.device(where.kind))
    problems.raise_any()
    return Asked(config.model_copy(update=changes), shape, folder, name, where)


def _place(gpu: str | None, device: str) -> devices.Device:
    """Where the run is to fit; of this machine the device that the settings name."""
    where = devices.find(gpu)
    return devices.here(str(pick_device(device))) if where.here and device != "auto" else where


def _sources(config: RunConfig, problems: Collector) -> dict[str, list[Any]]:
    """The data by its absolute paths; what is wrong with any of it goes to the problems."""
    found: dict[str, list[Any]] = {"data": [], "eval_data": []}
    for name, given in (("data", config.data), ("eval_data", config.eval_data)):
        for source in given:
            with problems.gather():
                found[name].append(source if source == NO_DATA else absolute(source))
    for source in [*config.sources(), *config.eval_sources()]:
        with problems.gather():
            formats.check(source.format or "auto", source.map)
    with problems.gather():
        if config.template not in ("auto", "chat_template"):  # those of the tokenizer, which may not be here
            templates.choose(config.template, None)
    return found


def shape_for(model: str) -> tuple[Any, Path | None, str]:
    """The config of a model by whatever names it, its folder where there is one, and a name for people.

    Raises:
        ModelError: nothing of that name, or a config that cannot be read.
    """
    entry = catalog.get(model)
    path = expand(model)
    if entry is not None and not path.exists():
        return config_of(entry.config), None, entry.name
    if path.is_file():
        return read_config_file(path), None, path.absolute().parent.name if path.name == "config.json" else path.name
    folder = locate(model, only=("config.json",))
    return read_config(folder), folder if path.is_dir() else None, folder.absolute().name if path.is_dir() else model


def _precision(config: RunConfig, where: devices.Device, shape: Any) -> RunConfig:
    """auto for a device that may not be here: bf16 where that is computed, else fp16 on a GPU."""
    if config.precision == "auto" and where.kind == "cuda":
        config = config.model_copy(update={"precision": "bf16" if where.bf16 else "fp16"})
    return precision.resolve(config, pick_device("cpu") if not where.here else pick_device(config.device), shape)


# ---- rows ----


def look(wanted: Asked, words: str | Path | None, watch: Watcher) -> Rows:
    """The lengths of the rows: by the tokenizer, by their characters, or none where there is no data."""
    config, shape = wanted.config, wanted.shape
    limit = getattr(shape, "max_position_embeddings", None) or NO_LIMIT
    limit -= methods.find(config.method).virtual_tokens(config)
    _check_length(config, limit)
    folder = expand(words) if words is not None else wanted.folder
    if words is None and (config.data == [NO_DATA] or folder is None or not _has_tokenizer(folder)):
        return _without_tokenizer(config, shape, limit)
    assert folder is not None
    loaded = tokenizer.load(folder)
    added = add_tokens(loaded, config.new_tokens, config.answer_tokens) if config.new_tokens else []
    if config.data == [NO_DATA]:
        return replace(_no_data(config, limit), words=folder, added=added)
    found = datachecks.read(
        config, folder, loaded, limit=limit, vocabulary=max(shape.vocab_size, len(loaded)), watch=watch
    )
    if not len(found.samples):
        raise DataError("no row is left to train on", fix="fitune inspect tells what became of them")
    told = found.report
    return Rows(
        found.samples, found.held_out, told.max_length, "", told, folder, added, told.lengths, told.length_choices
    )


def _check_length(config: RunConfig, limit: int) -> None:
    """Raises ConfigError where no row can be of the longest length."""
    if limit < 2:
        left = f"room for {max(0, limit)} tokens"
        raise ConfigError("virtual tokens leave no room for a row", received=left, expected="room for 2 or more")
    if config.max_length != "auto" and config.max_length > limit:
        raise ConfigError("max_length is above what the model can hold", received=config.max_length, expected=limit)


def _without_tokenizer(config: RunConfig, shape: Any, limit: int) -> Rows:
    """Rows where only their characters are known, or nothing; new tokens come behind the vocabulary."""
    added = [NewToken(text, shape.vocab_size + n, (0,)) for n, text in enumerate(config.new_tokens)]
    known = _no_data(config, limit) if config.data == [NO_DATA] else _estimated(config, shape, limit)
    return replace(known, added=added)


def _no_data(config: RunConfig, limit: int) -> Rows:
    length = min(limit, ASSUMED_LENGTH if config.max_length == "auto" else config.max_length)
    rows_ = [_blank(length)] * (2 * config.batch_size * config.accumulation)
    return Rows(rows_, rows_[: config.batch_size], length, f"no data given: every row has {length:,} tokens")


def _has_tokenizer(folder: Path) -> bool:
    return any(folder.glob("tokenizer*")) or any(folder.glob("*.model")) or (folder / "vocab.json").is_file()


def _estimated(config: RunConfig, shape: Any, limit: int) -> Rows:
    """Rows of about the lengths that a tokenizer would give them."""
    sources, cache = config.sources(), Cache()
    found = rows.load(sources, seed=config.seed, fill=config.fill, skip_bad=config.skip_bad, cache=cache).rows
    every = max(1, len(found) // ESTIMATED)
    guessed = np.array([_tokens(row, shape.vocab_size) for row in islice(found, 0, None, every)])
    auto = automatic(guessed, guessed, limit, batch_size=config.batch_size, batch_tokens=config.batch_tokens)
    longest = auto if config.max_length == "auto" else min(limit, config.max_length)
    samples = [_blank(int(length)) for length in np.minimum(guessed, longest)]
    share = max(1, min(config.val_rows, round(config.val_share * len(samples))))
    share = share if config.val_share or config.eval_data else 0
    note = (
        f"no tokenizer at hand (--tokenizer FOLDER): lengths of {len(samples):,} rows are estimated from their "
        "characters, which may be a third off"
    )
    told = choices(guessed, guessed, guessed, chosen=longest, auto=auto)
    return Rows(samples, samples[:share], longest, note, lengths=summary(guessed), choices=told)


def _tokens(row: Conversation, vocabulary: int) -> int:
    text = "".join(part for message in row.messages for part in _texts(message))
    text += json.dumps([dict(tool) for tool in row.tools], ensure_ascii=False) if row.tools else ""
    wide = len(FULL_WIDTH_LETTER.findall(text))
    each = WIDE if vocabulary >= BIG_VOCABULARY else NARROW
    return max(2, round(wide / each + (len(text) - wide) / LATIN) + EXTRA * len(row.messages))


def _texts(message: Message) -> list[str]:
    called = [call.name + call.arguments for call in message.tool_calls]
    return [message.content, message.context, *called]


def _blank(length: int) -> Sample:
    """A row of that length, of which every token but the first is trained."""
    return Sample((np.arange(length) % 8).astype(np.int32), np.arange(length) > 0)


def work_of(wanted: Asked, known: Rows) -> plans.Work:
    """What the run would do."""
    config = _with_words(wanted.config.model_copy(update={"max_length": known.max_length}), known.words)
    layout = steps.likely_layout(config.layout, wanted.shape)
    loader = Loader(
        known.samples, config.batch_size, config.accumulation, config.seed, config.batch_tokens, layout == "padded"
    )
    deciding = steps.deciding(loader, config.max_steps or loader.total_steps(config.epochs))
    held_out = steps.largest_held_out(known.held_out, config.batch_size)
    return plans.Work(config, wanted.shape, deciding, held_out, layout, known.added)


def _with_words(config: RunConfig, words: Path | None) -> RunConfig:
    """A prompt in words begins as their tokens; without a tokenizer as others, of which there are as many."""
    if words is not None and config.method == "prompt" and config.prompt.init == "text":
        return config.model_copy(update={"model": str(words)})
    return plans.without_words(config)


# ---- verify ----


@dataclass(frozen=True)
class Verified:
    """Predicted beside measured, in bytes. rows: by category at the peak, phases: the most of each, and the whole.

    allocated: what torch's own profiler (on a GPU its allocator) counted, beside the trace's predicted peak.
    """

    rows: list[Compared]
    phases: list[Compared]
    predicted: int
    allocated: int

    @property
    def error(self) -> float:
        """As a share of what was allocated."""
        return self.predicted / max(1, self.allocated) - 1

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "rows": [asdict(row) for row in self.rows],
            "phases": [asdict(phase) for phase in self.phases],
            "predicted": self.predicted,
            "allocated": self.allocated,
            "error": self.error,
        }


def verify(config: RunConfig, watch: Watcher | None = None) -> Verified:
    """Run three steps, an evaluation and a checkpoint's copies for real, and compare with their plan.

    Args:
        config: as for `train`; nothing is written.
        watch: is told what is found.

    Raises:
        FituneError: as `train` does.
    """
    job = prepare(resolve(config), watch or Silent())
    work = _three(job)
    target = of(job.tuned.device)
    seen = plans.usage(plans.traced(work, target), without="start")  # the job has its method already
    measured, allocated = _really(job, work)
    phases = {moment.phase: moment.bytes for moment in measured.phases}
    parts = dict.fromkeys([*seen.peak.parts, *measured.peak.parts])
    return Verified(
        rows=[Compared(name, seen.peak.parts.get(name, 0), measured.peak.parts.get(name, 0)) for name in parts],
        phases=[Compared(m.phase, m.bytes, phases.get(m.phase, 0)) for m in seen.phases],
        predicted=seen.peak.bytes,
        allocated=allocated,
    )


def _three(job: Job) -> plans.Work:
    """Three steps: the first, the one with the largest micro-batch, and the first again."""
    first, *rest = job.work.steps
    without_answers = job.work.config.model_copy(update={"sample_prompts": 0})  # they are not compared
    return replace(job.work, config=without_answers, steps=[first, rest[-1] if rest else first, first])


def _really(job: Job, work: plans.Work) -> tuple[plans.Usage, int]:
    """What a trace of real tensors sees, and, the work done once more, the most bytes that torch counts itself."""
    model, cuda = job.tuned.model, job.tuned.device.type == "cuda"
    tracer = trace.Tracer(of(job.tuned.device), real=True)
    tracer.at("load")
    there = trace.count(model, tracer)
    tracer.at("")
    plans.go(model, work, tracer, on_gpu=cuda)
    tracer.close()
    for parameter in trainable(model).values():  # an optimizer in the backward pass would go on
        (getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).clear()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        plans.go(model, work, trace.Blind(), on_gpu=True)
        return plans.usage(tracer), torch.cuda.max_memory_allocated()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        plans.go(model, work, trace.Blind())
    now = most = there
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return plans.usage(tracer), most


__all__ = ["Answer", "Verified", "answer", "ask", "plan", "verify"]
