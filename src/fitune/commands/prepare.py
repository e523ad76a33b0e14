"""From a checked request to everything that a run needs, checked: data, plan, model.

In: a Request. Out: a Job. Whatever is wrong is found here, before the first step, and reported together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fitune.checks import guards, leak, modelchecks, preferencechecks, runchecks, stepchecks
from fitune.checks.findings import raise_refused
from fitune.commands import frozen, reference
from fitune.commands.planned_rows import ReadRows, laid_out, make_loader, read, work_of
from fitune.commands.request import Request
from fitune.commands.sharing_out import together
from fitune.core.blocks import AUTO, named
from fitune.core.clock import CHECKS, DATA, MODEL, PLAN, REFERENCE, Clock
from fitune.core.config import RunConfig
from fitune.core.errors import TrainingError
from fitune.core.events import Silent, Watcher
from fitune.core.files import sha256
from fitune.core.parse import parse
from fitune.core.plan import size_text
from fitune.core.records import Batch, Conversation, DataReport, Finding, Kept, Layout, Source, Units
from fitune.data import pipeline, readers
from fitune.data.batches import Loader
from fitune.data.cache import folder_digest, key
from fitune.data.pairs import Pairs
from fitune.engine import integrity, loading, objectives, optim
from fitune.engine.objectives.base import Preference
from fitune.engine.parallel import ALONE, World
from fitune.engine.shards import Shards
from fitune.engine.step import Objective
from fitune.memory import device as devices
from fitune.memory import plan as plans
from fitune.models import adapters, by_blocks, families, kernel_faults, precision, quant, weights
from fitune.models.devices import pick_device
from fitune.models.head import set_loss_rows
from fitune.models.interfaces import CausalLM
from fitune.models.load import Tuned, load_files, opened
from fitune.models.methods import new_tokens
from fitune.models.parts import groups, trainable
from fitune.models.prepare import checkpoint_blocks


@dataclass
class Job:
    """A run that is ready to start."""

    config: RunConfig  # resolved: no auto is left
    tuned: Tuned
    loader: Loader
    layout: Layout
    held_out: Units
    held_out_rows: list[Conversation]
    report: DataReport
    findings: list[Finding]
    kept: list[Kept]
    plan: plans.Plan
    work: plans.Work  # what the plan went over
    data_sha256: dict[str, str]
    inputs: dict[str, object]  # of weights, tokenizer, template and adapter: what a resumed run must find again
    total_steps: int
    eval_every: int
    save_every: int
    lr: float
    shards: Shards | None = None  # of the model, where it is in some

    @property
    def objective(self) -> Objective:
        """What is made small."""
        return objectives.of(self.config)

    @property
    def trainable(self) -> int:
        """How many parameters are trained."""
        return sum(p.numel() for p in trainable(self.tuned.model).values())

    def source(self, row: int) -> Source | None:
        """Where a training sample stands in the user's files."""
        return self.loader.samples[row].source

    def groups(self) -> list[tuple[str, int, int]]:
        """(part, trainable, total) of each part of the model."""
        return groups(self.tuned.model, self.tuned.family)

    @property
    def total(self) -> int:
        """How many parameters there are."""
        return sum(quant.numel(p) for p in self.tuned.model.parameters())


def prepare(
    request: Request,
    watch: Watcher,
    outside: Mapping[str, int] | None = None,
    clock: Clock | None = None,
    world: World = ALONE,
) -> Job:
    """Read and check the data, plan, load the model, put the method on it, check that too. Where the model goes into
    shards, all processes read it, and check it, together: process 0 publishes its settings before.

    Args:
        request: as `to_train` gave it.
        watch: what is found is reported to it.
        outside: bytes beside the tensors, as a plan of this run had them before; None: as they are now.
        clock: counts the seconds of each phase.
        world: the processes of the run.

    Raises:
        FituneError: whatever refuses the run.
    """
    clock = clock or Clock()
    folder = Path(request.config.model)
    rows = read(request, folder, watch, to_train=True)
    raise_refused(rows.data.findings)
    clock.ends(DATA)
    asked = request.changed(max_length=rows.rows.max_length)
    work = work_of(asked, rows.rows)
    plan = _planned(asked, work, outside)
    clock.ends(PLAN)
    shared = world if world.size > 1 and plan.parallel == "shard" else ALONE
    if not shared.alone:
        asked = asked.changed(parallel="shard")
        together(asked.config, world, pick_device(asked.config.device))
    loaded = _load(asked, rows, shared)
    clock.ends(MODEL)
    layout, packing = leak.packing_leak(loaded.model, rows.data.samples, asked.config.layout)
    rows, sharing = _prompts(rows, loaded, layout)
    if layout != work.layout or any(finding.level == "fixed" for finding in sharing):
        clock.ends(CHECKS)
        work = work_of(asked, rows.rows, layout)
        plan = _planned(asked, work, outside)
        clock.ends(PLAN)
    request = _as_planned(asked, plan, loaded)
    work = replace(work, config=request.config)
    findings = [*_check_model(request, rows, loaded, layout, packing), *sharing]
    loader, held_out = make_loader(request.config, rows.rows.samples, layout), laid_out(rows.rows.held_out, layout)
    findings += _check_batches(loader)
    loaded.refuse(findings)
    plan, tried = frozen.tried(plan, request.config, loaded.model, loader, work.largest)
    findings += tried
    loaded.refuse(tried)
    objective = objectives.of(request.config)
    if isinstance(objective, Preference):
        clock.ends(CHECKS)
        model = _reference(request, rows, loaded, layout, watch)
        loader, held_out = _compared(request.config, model, loader, held_out)
        findings += _check_preferences(request, loaded, loader, layout, objective)
        loaded.refuse(findings)
        clock.ends(REFERENCE)
    return _job(request, rows, loaded, _Ready(layout, loader, held_out, plan, work, [*rows.data.findings, *findings]))


@dataclass(frozen=True)
class _Loaded:
    """The model with its method on it.

    base: without it. family: of the base model. expected: elements of each tensor that the method trains, by its name,
    where the method says so. before: logits of the base model, where the method must not change them at the start.
    unchanged: are the weights those of the files? world: of the processes that have it in shards.
    """

    model: CausalLM
    base: CausalLM
    family: families.Family
    expected: dict[str, int] | None
    before: Any
    unchanged: Finding
    world: World
    shards: Shards | None

    def refuse(self, findings: Sequence[Finding]) -> None:
        """Raise what was refused, in one of the processes that have a part of the model in all of them."""
        mine = [asdict(finding) for finding in findings if finding.level == "refuse"]
        of_all = [
            parse(Finding, one, "a check")
            for each in self.world.gathered(mine, "the checks of the model")
            for one in each
        ]
        raise_refused(list(dict.fromkeys(of_all)))


@dataclass(frozen=True)
class _Ready:
    """What is decided once the model is there."""

    layout: Layout
    loader: Loader
    held_out: Units
    plan: plans.Plan
    work: plans.Work
    findings: list[Finding]


def _load(request: Request, rows: ReadRows, world: World) -> _Loaded:
    """The weights, the method and what it goes on from. world: whose processes have the model in shards."""
    config, method, folder = request.config, request.method, Path(request.config.model)
    apart, compared = not world.alone, runchecks.Compared(folder)
    files = opened(
        folder,
        precision=config.precision,
        device=str(pick_device(config.device)),
        quant=config.quant,
        storage=config.storage_dtype if method.low_precision_base else config.trainable_dtype,
    )
    unread = by_blocks.opened(files, config, compared.look) if apart else None
    base = load_files(files) if unread is None else unread.begun()
    if unread is None:
        compared.look(base)
    family = families.of(base)
    if rows.rows.added:
        new_tokens.add_rows(base, rows.rows.added)
    expected = method.expected(base, family, config)
    before = guards.start_of(base, rows.data.samples) if method.same_at_start and not apart else None
    model = adapters.attach(base, config)
    if expected is not None and rows.rows.added:
        expected |= adapters.row_sizes(model)
    if config.adapter is not None:
        adapters.load_into(model, adapters.locate(config.adapter))
    shards = Shards(model, world, unread) if apart else None
    if unread is not None:
        unread.check()
    if method.same_at_start and apart:
        with adapters.disabled(model):
            before = guards.start_of(model, rows.data.samples)
    return _Loaded(model, base, family, expected, before, runchecks.base_loaded(compared), world, shards)


def _prompts(rows: ReadRows, loaded: _Loaded, layout: Layout) -> tuple[ReadRows, list[Finding]]:
    """The rows, and what was found of prompts that stand once for two answers; where the model needs a prompt before
    each of them, rows that have it."""
    pairs = rows.rows.samples
    if layout != "flat" or not isinstance(pairs, Pairs) or pairs.common is None:
        return rows, []
    found = leak.shared_prompt(loaded.model, pairs)
    if found.level == "ok":
        return rows, [found]
    held_out = rows.rows.held_out
    assert isinstance(held_out, Pairs)
    return replace(rows, rows=replace(rows.rows, samples=pairs.apart(), held_out=held_out.apart())), [found]


def _as_planned(request: Request, plan: plans.Plan, loaded: _Loaded) -> Request:
    """What the plan chose, in the settings and on the model; in shards, what that of process 0 did."""
    chosen: dict[str, object] = {"loss_rows": plan.loss_rows}
    if plan.parallel:
        chosen["parallel"] = plan.parallel
    if request.config.checkpointing == AUTO:
        chosen |= {"checkpointing": named(plan.recomputed), "offload": named(plan.waiting)}
    if loaded.shards is not None:
        chosen = {**loaded.world.decided(chosen), "parallel": "shard"}
    request = request.changed(**chosen)
    config = request.config
    checkpoint_blocks(loaded.model, loaded.family, config.checkpointing, config.offload)
    set_loss_rows(loaded.model, config)
    return request


def _check_model(request: Request, rows: ReadRows, loaded: _Loaded, layout: Layout, packing: Finding) -> list[Finding]:
    """Every check of the loaded model; those that what is not finite would fail too come last.

    Raises:
        FituneError: a check refuses the run.
    """
    config, model, samples = request.config, loaded.model, rows.data.samples
    probe = guards.probe(samples)
    findings = [*_check_weights(request, loaded, probe, layout), packing]
    loaded.refuse(findings)
    highest = max([int(probe.ids.max()), *(token.id for token in rows.rows.added)])
    if loaded.before is not None and config.adapter is None:
        findings.append(guards.same_at_start(model, loaded.before, samples))
    findings += [guards.embeddings(model, highest), guards.nan_hidden(model, probe, layout)]
    loaded.refuse(findings)
    findings += [guards.grad_reaches(model, probe, layout), guards.accumulation_equality(model, probe, layout)]
    findings += [runchecks.adapter_scale(model, config), stepchecks.reference_loss(model, samples, layout)]
    findings += [stepchecks.eval_dropout(model, probe, layout)]
    return [*findings, _disk_space(config, model), guards.eval_memory(model)]


def _check_weights(request: Request, loaded: _Loaded, probe: Batch, layout: Layout) -> list[Finding]:
    """What is trained, and in which dtypes."""
    config, model, folder = request.config, loaded.model, Path(request.config.model)
    intact = guards.base_intact(folder)
    dtype = precision.DTYPES[config.trainable_dtype]
    sets = [modelchecks.trainable_set(model, loaded.expected, dtype), guards.quantised_trainable(model)]
    dtypes = [
        precision.speed(config, pick_device(config.device), request.model_config),
        precision.weights_kept(model, weights.stored_dtype(folder)),
        guards.fp16_range(model, probe, layout),
    ]
    if quant.name_of(loaded.base) != "none":
        dtypes.append(kernel_faults.finding(quant.faults(loaded.base)))
    towers = [*families.towers.finding(loaded.base), *modelchecks.layers_with_state(loaded.base)]
    return [modelchecks.family_found(loaded.family), *towers, intact, loaded.unchanged, *sets, *dtypes]


def _check_batches(loader: Loader) -> list[Finding]:
    first = next((micro for _, micro in loader.steps(0, 1)), [])
    return [stepchecks.each_row_once(loader), stepchecks.batch_labels(first, loader.samples)]


def _job(request: Request, rows: ReadRows, loaded: _Loaded, ready: _Ready) -> Job:
    config, data, folder = request.config, rows.data, Path(request.config.model)
    total = _total_steps(config, ready.loader)
    eval_every = config.eval_every or max(1, -(-total // 5))
    return Job(
        config=config,
        tuned=Tuned(loaded.model, rows.tokenizer, data.encoder.template, data.encoder, loaded.family),
        loader=ready.loader,
        layout=ready.layout,
        held_out=ready.held_out,
        held_out_rows=data.held_out_rows,
        report=data.report,
        findings=ready.findings,
        kept=precision.kept(loaded.model, weights.stored_dtype(folder)),
        plan=ready.plan,
        work=ready.work,
        data_sha256=_fingerprint(config),
        inputs=_inputs(config, folder, data.encoder.template.as_dict()),
        total_steps=total,
        eval_every=eval_every,
        save_every=config.save_every or eval_every,
        lr=optim.peak_learning_rate(config),
        shards=loaded.shards,
    )


def _total_steps(config: RunConfig, loader: Loader) -> int:
    return config.max_steps or loader.total_steps(config.epochs)


def _reference(
    request: Request, rows: ReadRows, loaded: _Loaded, layout: Layout, watch: Watcher
) -> reference.Reference:
    """The model before training."""
    config = request.config
    inputs = _inputs(config, Path(config.model), rows.data.encoder.template.as_dict())
    return reference.Reference(loaded.model, config, layout, inputs, watch, loaded.world)


def _compared(config: RunConfig, model: reference.Reference, loader: Loader, held_out: Units) -> tuple[Loader, Units]:
    """The loader and the held-out rows, with what the reference model gives their answers, where the objective needs
    that."""
    if not objectives.needs_reference(config):
        return loader, held_out
    met = reference.met(loader.epoch_steps(0), _total_steps(config, loader))
    return replace(loader, samples=model.added(loader.samples, met)), model.added(held_out)


def _check_preferences(
    request: Request, loaded: _Loaded, loader: Loader, layout: Layout, objective: Preference
) -> list[Finding]:
    """Is the model its reference before the first step, and do the answers suit it?"""
    first = next(micro for _, micro in loader.steps(0, 1))[0]
    same = request.method.same_at_start or request.config.adapter is not None
    start = preferencechecks.preference_start(loaded.model, first, layout, objective, same=same)
    pairs = loader.samples
    assert isinstance(pairs, Pairs)
    vocabulary = int(request.model_config.vocab_size)
    seen = preferencechecks.template_seen(loaded.model, pairs, layout, vocabulary)
    if pairs.desirable is not None:
        return [start, seen]
    means = preferencechecks.means_of(loaded.model, pairs, layout, request.config.batch_size)
    return [start, seen, preferencechecks.swapped_answers(means)]


def _planned(request: Request, work: plans.Work, outside: Mapping[str, int] | None = None) -> plans.Plan:
    """The plan on this machine, as it is now.

    Raises:
        TrainingError: it does not fit, and the run is not forced.
    """
    where = devices.here(str(pick_device(request.config.device)))
    cache = None if request.config.cache == "none" else pipeline.cache_of(request.config, Silent())
    plan = plans.plan(work, where, name=request.name, outside=outside, cache=cache)
    if plan.fits is False and not request.config.force:
        raise TrainingError(
            f"the plan says that this does not fit: it misses by {size_text(-(plan.spare or 0))}",
            received=f"{size_text(plan.needed)} needed, {size_text(plan.budget or 0)} there; {plans.made_of(plan)}",
            fix="a smaller --batch-size or --max-length, --checkpointing auto, --quant nf4, --optimizer adamw-8bit; "
            "or --force, to try it anyway",
        )
    return plan


def _inputs(config: RunConfig, folder: Path, template: dict[str, Any]) -> dict[str, Any]:
    """Names of things that decide a run beside its data, with digests of them."""
    found = {
        loading.WEIGHTS: weights.facts(folder),
        loading.CONFIG: loading.config_of(folder),
        integrity.TENSORS: weights.summed(folder),
        "the tokenizer": folder_digest(folder),
        "the template": key(template),
    }
    if config.adapter is not None:
        found["the adapter's tensors"] = weights.summed(Path(config.adapter))
    return found


def _disk_space(config: RunConfig, model: CausalLM) -> Finding:
    count = sum(p.numel() for p in trainable(model).values())
    each = int(count * (4 + optim.find(config.optimizer).state_bytes))
    return guards.disk_space(Path(str(config.output)), each, config.keep_last + 2)  # the best, and one being written


def _fingerprint(config: RunConfig) -> dict[str, str]:
    """The SHA-256 of every file that is read: a resumed run must find the same."""
    sources = [*config.sources(), *config.eval_sources()]
    return {str(file): sha256(file) for source in sources for file in readers.files(Path(source.path))}
