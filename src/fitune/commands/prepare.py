"""From a config to everything that a run needs, checked: data, model, memory.

In: a RunConfig. Out: a Job. Whatever is wrong is found here, before the first step, and told together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fitune.checks import datachecks, guards, leak, modelchecks, runchecks, stepchecks
from fitune.checks.findings import raise_refused
from fitune.core.begun import free_folder
from fitune.core.config import RunConfig
from fitune.core.errors import Collector, ConfigError, TrainingError
from fitune.core.events import Watcher
from fitune.core.files import expand, sha256
from fitune.core.options import DataSource
from fitune.core.plan import size_text
from fitune.core.records import Conversation, DataReport, Finding, Kept, Layout, Source
from fitune.data import formats, pipeline, readers, templates, tokenizer
from fitune.data.batches import Loader
from fitune.data.cache import folder_digest, key
from fitune.data.fitting import NO_LIMIT
from fitune.data.store import Samples
from fitune.data.tokenizer.new_tokens import add_tokens
from fitune.engine import integrity, loading, optim
from fitune.memory import device as devices
from fitune.memory import plan as plans
from fitune.memory import steps
from fitune.models import adapters, families, kernel_faults, methods, precision, quant, weights
from fitune.models.configs import quantized_as, read_config, without_weights
from fitune.models.devices import pick_device
from fitune.models.head import set_loss_rows
from fitune.models.load import Tuned, load_model
from fitune.models.locate import locate
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
    held_out: Samples
    held_out_rows: list[Conversation]
    report: DataReport
    findings: list[Finding]
    kept: list[Kept]
    plan: plans.Plan
    work: plans.Work  # what the plan went over
    data_sha256: dict[str, str]
    inputs: dict[str, Any]  # of weights, tokenizer, template and adapter: what a resumed run must find again
    total_steps: int
    eval_every: int
    save_every: int
    lr: float

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


def resolve(config: RunConfig) -> RunConfig:
    """The config with absolute paths, so that the run folder can be used from anywhere.

    Raises:
        ConfigError, DataError, ModelError, Problems: the cheap mistakes, all of them at once.
    """
    problems = Collector()
    with problems.gather():
        methods.find(config.method).check(config)
        own_settings(config)
    with problems.gather():
        optim.check(config)
    changes: dict[str, Any] = {"data": [], "eval_data": []}
    for name, given in (("data", config.data), ("eval_data", config.eval_data)):
        for source in given:
            with problems.gather():
                changes[name].append(absolute(source))
    for source in [*config.sources(), *config.eval_sources()]:
        with problems.gather():
            formats.check(source.format or "auto", source.map)
    with problems.gather():
        folder = locate(config.model)
        changes["model"] = str(expand(folder.resolve()))
        read_config(folder)
        weights.check(folder)
        templates.choose(
            config.template,
            tokenizer.load(folder),
            system_role=config.system_role,
            options=config.template_options,
        )
    problems.raise_any()
    if config.adapter is not None:
        with problems.gather():
            place = adapters.locate(config.adapter).resolve()
            changes["adapter"] = str(place)
            integrity.check_adapter(place)
    with problems.gather():
        shape = read_config(folder)
        config = precision.resolve(config, pick_device(config.device), shape)
        quant_settings(config, shape)
    problems.raise_any()
    changes["output"] = config.output or free_folder(f"{folder.name}-{config.method}")
    return config.model_copy(update=changes)


def quant_settings(config: RunConfig, model_config: Any) -> None:
    """Settings of a quantizer without one do nothing; neither do they on a model that is quantized already."""
    options = config.quant
    if options.name == "none" and options != quant.PLAIN:
        raise ConfigError("settings of quant are given, but nothing is quantized", fix="--quant nf4 or int8")
    there = quantized_as(model_config)
    if there.name != "none" and options.name not in ("none", there.name):
        raise ConfigError(
            f"--quant {options.name}: this model is quantized already, as {there.name}",
            fix="leave --quant out, or take the original model",
        )
    if options.name != "none":
        quant.find(options.name)


def own_settings(config: RunConfig) -> None:
    """Settings of another method than the run's would do nothing.

    Raises:
        ConfigError: some were given.
    """
    own = methods.find(config.method).options
    plain = type(config)(model=config.model, data=config.data)
    for group in sorted({method.options or "" for method in methods.TABLE.values()} | {"peft"}):
        if group and group != own and getattr(config, group) != getattr(plain, group):
            whose = next((m.name for m in methods.TABLE.values() if m.options == group), "peft:TYPE")
            raise ConfigError(
                f"settings of {group} are given, but the method is {config.method}",
                fix=f"leave them out, or --method {whose}",
            )


def absolute(source: str | DataSource) -> str | DataSource:
    """The source with its absolute path, of a data set on the hub that of its snapshot; its first row can be read."""
    path = readers.locate(source if isinstance(source, str) else source.path)
    next(readers.read_rows(path), None)
    # a link's own name is kept: it tells the kind of file, which that of its target may not
    path = path.resolve() if path.is_dir() else path.parent.resolve() / path.name
    return str(path) if isinstance(source, str) else source.model_copy(update={"path": str(path)})


def prepare(config: RunConfig, watch: Watcher, outside: Mapping[str, int] | None = None) -> Job:
    """Read and check the data, load the model, put the method on it, check that too.

    Args:
        config: as `resolve` gave it.
        watch: is told what is found.
        outside: bytes beside the tensors, as a plan of this run had them before; None: as they are now.

    Raises:
        FituneError: whatever refuses the run.
    """
    folder = Path(config.model)
    model_config = read_config(folder)
    words = tokenizer.load(folder)
    added = add_tokens(words, config.new_tokens, config.answer_tokens) if config.new_tokens else []
    limit = getattr(model_config, "max_position_embeddings", None) or NO_LIMIT
    vocabulary = max([model_config.vocab_size, *(token.id + 1 for token in added)])
    limit -= methods.find(config.method).virtual_tokens(config)
    data = datachecks.read(config, folder, words, limit=limit, vocabulary=vocabulary, watch=watch)
    raise_refused(data.findings)
    config = config.model_copy(update={"max_length": data.report.max_length})

    device = pick_device(config.device)
    method = methods.find(config.method)
    check_quantized(config, method, model_config, device)
    work = _work(config, model_config, data, added, steps.likely_layout(config.layout, model_config))
    plan = _planned(work, device, folder.name, outside)
    _refuse_what_cannot_fit(plan, config)
    config = config.model_copy(update={"loss_rows": plan.loss_rows})
    base = load_model(
        folder,
        precision=config.precision,
        device=str(device),
        quant=config.quant,
        storage=config.storage_dtype if method.low_precision_base else config.trainable_dtype,
    )
    family = families.of(base)
    loaded = runchecks.base_loaded(base, folder)
    if added:
        new_tokens.add_rows(base, added)
    expected = method.expected(base, family, config)
    before = guards.start_of(base, data.samples) if method.same_at_start else None
    model = adapters.attach(base, config)
    if expected is not None and added:
        expected |= adapters.row_sizes(model)
    if config.adapter is not None:
        adapters.load_into(model, adapters.locate(config.adapter))
    checkpoint_blocks(model, family, config.checkpointing)
    set_loss_rows(model, config)
    samples = data.samples
    layout, apart = leak.packing_leak(model, samples, config.layout)
    work = replace(work, config=config)
    if layout != work.layout:
        work = _work(config, model_config, data, added, layout)
        plan = _planned(work, device, folder.name, outside)
        _refuse_what_cannot_fit(plan, config)
    probe = guards.probe(samples)
    intact = guards.base_intact(folder)
    dtype = precision.DTYPES[config.trainable_dtype]
    sets = [modelchecks.trainable_set(model, expected, dtype), guards.quantised_trainable(model)]
    stored = weights.stored_dtype(folder)
    dtypes = [precision.speed(config, device, model_config), precision.weights_kept(model, stored)]
    dtypes.append(guards.fp16_range(model, probe, layout))
    if quant.name_of(base) != "none":
        dtypes.append(kernel_faults.finding(quant.faults(base)))
    model_findings = [
        modelchecks.family_found(family),
        *families.towers.finding(base),
        intact,
        loaded,
        *sets,
        *dtypes,
        apart,
    ]
    raise_refused(model_findings)
    highest = max([int(probe.ids.max()), *(token.id for token in added)])
    if before is not None and config.adapter is None:
        model_findings.append(guards.same_at_start(model, before, samples))
    model_findings += [guards.embeddings(model, highest), guards.nan_hidden(model, probe, layout)]
    raise_refused(model_findings)  # what is not finite would fail the next ones too
    model_findings += [guards.grad_reaches(model, probe, layout), guards.accumulation_equality(model, probe, layout)]
    model_findings += [runchecks.adapter_scale(model, config), stepchecks.reference_loss(model, samples, layout)]
    model_findings += [stepchecks.eval_dropout(model, probe, layout)]
    model_findings += [_disk_space(config, model), guards.eval_memory(model)]
    loader = _loader(config, samples, layout)
    first = next((micro for _, micro in loader.steps(0, 1)), [])
    model_findings += [stepchecks.each_row_once(loader), stepchecks.batch_labels(first, samples)]
    raise_refused(model_findings)
    total = config.max_steps or loader.total_steps(config.epochs)
    eval_every = config.eval_every or max(1, -(-total // 5))
    return Job(
        config=config,
        tuned=Tuned(model, words, data.encoder.template, data.encoder, family),
        loader=loader,
        layout=layout,
        held_out=data.held_out,
        held_out_rows=data.held_out_rows,
        report=data.report,
        findings=[*data.findings, *model_findings],
        kept=precision.kept(model, stored),
        plan=plan,
        work=work,
        data_sha256=_fingerprint(config),
        inputs=_inputs(config, folder, data.encoder.template.as_dict()),
        total_steps=total,
        eval_every=eval_every,
        save_every=config.save_every or eval_every,
        lr=optim.peak_learning_rate(config),
    )


def _loader(config: RunConfig, samples: Samples, layout: Layout) -> Loader:
    by_length = layout == "padded"
    return Loader(samples, config.batch_size, config.accumulation, config.seed, config.batch_tokens, by_length)


def _work(config: RunConfig, shape: Any, data: pipeline.Data, added: list[Any], layout: Layout) -> plans.Work:
    """What the run asks of memory."""
    loader = _loader(config, data.samples, layout)
    deciding = steps.deciding(loader, config.max_steps or loader.total_steps(config.epochs))
    held_out = steps.largest_held_out(data.held_out, config.batch_size)
    return plans.Work(config, shape, deciding, held_out, layout, added)


def _planned(work: plans.Work, device: torch.device, name: str, outside: Mapping[str, int] | None = None) -> plans.Plan:
    """The plan on this machine."""
    return plans.plan(work, devices.here(str(device)), name=name, outside=outside)


def _refuse_what_cannot_fit(plan: plans.Plan, config: RunConfig) -> None:
    if plan.fits is False and not config.force:
        raise TrainingError(
            f"the plan says that this does not fit: it misses by {size_text(-(plan.spare or 0))}",
            received=f"{size_text(plan.needed)} needed, {size_text(plan.budget or 0)} there; {plans.made_of(plan)}",
            fix="a smaller --batch-size or --max-length, --checkpointing, --quant nf4, --optimizer adamw-8bit; "
            "or --force, to try it anyway",
        )


def check_quantized(config: RunConfig, method: methods.Method, model_config: Any, device: torch.device) -> None:
    """What cannot be tuned on quantized weights is refused before any are read."""
    options = quantized_as(model_config)
    options = options if options.name != "none" else config.quant
    if options.name == "none":
        return
    shape = without_weights(model_config)
    there = methods.Quantized(quant.planned(shape, options), options.name, device.type)
    reason = method.quant_problem(shape, families.of(shape), config, there)
    if reason is not None:
        raise ConfigError(
            f"{method.name} does not go with quant {options.name}: {reason}",
            fix="a method and settings that leave the base's weights alone (plain lora is one), or leave --quant out",
        )


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


def _disk_space(config: RunConfig, model: Any) -> Finding:
    count = sum(p.numel() for p in trainable(model).values())
    each = int(count * (4 + optim.find(config.optimizer).state_bytes))
    return guards.disk_space(Path(str(config.output)), each, config.keep_last + 2)  # the best, and one being written


def _fingerprint(config: RunConfig) -> dict[str, str]:
    """The SHA-256 of every file that is read: a resumed run must find the same."""
    sources = [*config.sources(), *config.eval_sources()]
    return {str(file): sha256(file) for source in sources for file in readers.files(Path(source.path))}
