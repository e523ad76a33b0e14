"""What a run will take, before it runs.

In: a resolved config, the model's config, the micro-batches of some steps. Out: a Plan: the most of each phase by
category, where the peak is and of what it is made, what CUDA's caching allocator makes of it, and whether it fits. The
run's own code goes over shadows (trace.py); no weight is read.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial

import torch
from transformers import PretrainedConfig

from fitune.core import processor
from fitune.core.blocks import AUTO, chosen, named
from fitune.core.config import RunConfig
from fitune.core.plan import Holding, Moment
from fitune.core.plan import Plan as Plan
from fitune.core.records import Batch, Layout
from fitune.core.units import MIB
from fitune.data.batches import rounded
from fitune.data.cache import Cache
from fitune.data.tokenizer.new_tokens import NewToken
from fitune.engine import objectives, optim
from fitune.engine.held_out import held_out
from fitune.engine.loss_scale import LossScale
from fitune.engine.parallel import in_one_buffer
from fitune.engine.step import apply_gradients, last_block_is_ready, make_gradients
from fitune.memory import allocator, answers, chunks, depth, device, frozen, heap, kept, recompute, sharded
from fitune.memory.closed import closed
from fitune.memory.counted import shadows
from fitune.memory.cuda import Cuda
from fitune.memory.host import PaperHost
from fitune.memory.measure import resident_mib
from fitune.memory.places import Starting, put_host_apart
from fitune.memory.shadow import Shadow
from fitune.memory.sparse import OnPaper
from fitune.memory.storage import STATES
from fitune.memory.trace import STEP, Blind, Building, Tracer
from fitune.memory.usage import Usage, usage
from fitune.models import adapters, attached, families, methods, precision, quant
from fitune.models.head import loss_rows, set_loss_rows
from fitune.models.interfaces import CausalLM, causal_lm, decoder
from fitune.models.kernels.target import CPU, Target
from fitune.models.load import outline
from fitune.models.methods import new_tokens
from fitune.models.offload import Waits
from fitune.models.parts import block_count, trainable
from fitune.models.prepare import checkpoint_blocks


@dataclass(frozen=True)
class Work:
    """What a run asks of memory.

    config: resolved. model_config: the model's transformers config. steps: micro-batches of optimizer steps, in order;
    the largest that will come is among them. held_out: the largest batch of an evaluation. added: new tokens. deep:
    where model_config has fewer blocks than the model that is asked for, the transformers config of that one. epochs:
    of the rows; None: nobody knows them. processes: that share each step, of which this is the one that takes most.
    """

    config: RunConfig
    model_config: PretrainedConfig
    steps: Sequence[Sequence[Batch]]
    held_out: Batch | None = None
    layout: Layout = "flat"
    added: Sequence[NewToken] = field(default_factory=list)
    deep: PretrainedConfig | None = None
    epochs: frozen.Epochs | None = None
    processes: int = 1

    @property
    def largest(self) -> Batch:
        """The micro-batch with the most tokens."""
        return max((batch for step in self.steps for batch in step), key=lambda batch: len(batch.ids))


def without_prompt_text(config: RunConfig) -> RunConfig:
    """A prompt given as text needs a tokenizer; one that begins otherwise has as many tokens and takes as much."""
    if config.method != "prompt" or config.prompt.init != "text":
        return config
    return config.model_copy(update={"prompt": config.prompt.model_copy(update={"init": "vocab"})})


SETS = ("checkpointing", "offload")  # settings that name blocks


# ---- tracing ----


@contextmanager
def _on_paper() -> Iterator[None]:
    """Inside, torch's random numbers are not used up, and nothing is collected: at what moment a cycle would be freed
    is chance, and looking for some through all of transformers takes a tenth of the time."""
    state, collects = torch.get_rng_state(), gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        torch.set_rng_state(state)
        if collects:
            gc.enable()


def without_values(work: Work) -> CausalLM:
    """The model of a run with its method on it, on meta."""
    with _on_paper(), Building(), torch.device("meta"):
        return _with_method(_base(work), work)


def _base(work: Work) -> CausalLM:
    """The model of a run before its method is put on it."""
    config = work.config
    method = methods.find(config.method)
    storage = config.storage_dtype if method.low_precision_base else config.trainable_dtype
    base: CausalLM = outline(work.model_config, precision=config.precision, quant=config.quant, storage=storage)
    last_block_is_ready(base)  # tried here, where nothing is counted
    if work.added:
        new_tokens.add_rows(base, work.added)
    return base


def _with_method(base: CausalLM, work: Work) -> CausalLM:
    family = families.of(base)
    model: CausalLM = adapters.attach(base, work.config)
    checkpoint_blocks(model, family, work.config.checkpointing, work.config.offload)
    set_loss_rows(model, work.config)
    return model


def start(
    make: Callable[[], CausalLM], attach: Callable[[CausalLM], CausalLM], target: Target = CPU, *, apart: bool = True
) -> tuple[CausalLM, Tracer]:
    """A model of shadows with its method, and the tracer that saw them made: the phases "load" and "start".

    Args:
        make: the model without the method; called where tensors are made on meta.
        attach: puts the method on it, and gives the whole.
        target: where it is to run.
        apart: on a GPU, what the method makes in main memory stays there.
    """
    with Building(), torch.device("meta"):
        base = make()
    tracer = Tracer(target)
    with tracer.during("load"):
        shadows(base, tracer)
    try:
        with tracer, Starting(tracer, apart=apart and target.kind == "cuda"), tracer.during("start"):
            model = attach(base)
    except Exception as error:
        if not apart or "CUDA" not in f"{error}{error.__cause__}":
            raise
        # code that asks for the GPU by itself cannot be shown one here: then all that it makes lies there
        return start(make, attach, target, apart=False)
    put_host_apart(model, tracer)
    with tracer.during("start"):
        shadows(model, tracer)  # what the method made without a tracer; the others get their categories
    return model, tracer


def started(work: Work, target: Target = CPU) -> tuple[CausalLM, Tracer]:
    """The model of a run with its method on it, of shadows, and the tracer that saw it being made.

    Args:
        work: what is to be done.
        target: where it is to run.
    """
    with _on_paper():
        return start(lambda: _base(work), lambda base: _with_method(base, work), target)


def over(model: CausalLM, tracer: Tracer, work: Work, target: Target = CPU, *, saves: bool = True) -> Tracer:
    """The tracer, after the steps, an evaluation and a checkpoint.

    Args:
        model, tracer: as `started` gave them; they are of no use for anything else afterwards.
        work: what goes over the model.
        target: where it is to run.
        saves: the checkpoint too.
    """
    on_gpu = target.kind == "cuda"
    attached.of(model).waits = Waits(PaperHost(tracer, apart=on_gpu))
    with _on_paper(), Cuda(target) if on_gpu else OnPaper():
        go(model, work, tracer, on_gpu=on_gpu, saves=saves)
    tracer.close()
    return tracer


def traced(work: Work, target: Target = CPU) -> Tracer:
    """Everything that the start, the steps, an evaluation and a checkpoint allocate."""
    return over(*started(work, target), work, target)


def deep(model: CausalLM, work: Work, target: Target = CPU) -> Tracer:
    """The same; of a deep model, whose blocks are alike, from shallow ones.

    Args:
        model: as `without_values` gave it.
        work, target: as for `traced`.
    """

    config, blocks = work.config, block_count(model)
    again, away = chosen(config.checkpointing, blocks), chosen(config.offload, blocks)

    def run(model_config: PretrainedConfig, stay: Sequence[int]) -> tuple[list[object], Tracer]:
        marks = [(number in again, number in away) for number in stay]
        which = {name: named(n for n, mark in enumerate(marks) if mark[at]) for at, name in enumerate(SETS)}
        few = replace(work, config=config.model_copy(update=which), model_config=model_config, deep=work.model_config)
        made, tracer = started(few, target)
        kinds = depth.kinds(made, marks)
        return kinds, over(made, tracer, few, target)

    kinds = depth.kinds(model, [(number in again, number in away) for number in range(blocks)])
    return depth.traced(model, kinds, work.model_config, run) or traced(work, target)


def go(model: CausalLM, work: Work, tracer: Tracer | Blind, *, on_gpu: bool = False, saves: bool = True) -> None:
    """The steps, the evaluation and the checkpoint of a piece of work, on shadows or for real."""
    config, objective = work.config, objectives.of(work.config)
    model.train()
    parameters = trainable(model)
    scale = LossScale.START if precision.scaled(config) else 1.0
    with tracer, tracer.inside(model, decoder(causal_lm(model))):
        optimizer = optim.make(parameters, config, partial(methods.find(config.method).rates, config))
        for micro_batches in work.steps:
            with tracer.during(STEP):
                made = make_gradients(model, micro_batches, work.layout, scale, objective)
            with tracer.during("update"):
                if work.processes > 1:
                    in_one_buffer([p for p in parameters.values() if p.grad is not None], lambda _: None)
                apply_gradients(model, made, optimizer, config.max_grad_norm, scale)
            for states in optimizer.state.values():
                for value in states.values():
                    if isinstance(value, torch.Tensor):
                        tracer.own(value, STATES)
        if work.held_out is not None:
            with tracer.during("evaluation"):
                held_out(model, [work.held_out], work.layout, objective)
            taken = answers.bytes_taken(config, work.deep or work.model_config, work.held_out, on_gpu=on_gpu)
            if taken and isinstance(next(iter(parameters.values())), Shadow):  # a closed form: values decide it
                with tracer.during("answers"):
                    tracer.brief(taken, "generate")
        if saves and not on_gpu:  # from there the copies go to main memory
            with tracer.during("checkpoint"):
                optim.state_tensors(optimizer, parameters)


# ---- the plan ----


def plan(
    work: Work,
    where: device.Device,
    *,
    name: str,
    outside: Mapping[str, int] | None = None,
    cache: Cache | None = None,
) -> Plan:
    """The plan of a run.

    Args:
        work: what it does. Where its loss_rows are auto, or the blocks to recompute, they are chosen here.
        where: it is to fit.
        name: of the model, for people.
        outside: bytes beside the tensors, where they are known better than by the calibration.
        cache: where traces are kept, and found again.
    """
    beside = None if outside is None else frozen.without(outside)

    def planned(how: recompute.How) -> Plan:
        nonlocal beside
        known = replace(work, config=work.config.model_copy(update=how))
        made = _with_rows(known, partial(_plan, where=where, name=name, outside=beside, cache=cache), where)
        # once: plans that are compared differ by what their settings take, and by that alone
        beside = {what: size for what, size in frozen.without(made.outside).items() if what != heap.HOLES}
        return sharded.chosen(made, known.config, known.processes, lambda: without_values(known))

    return fitted(work, where, planned) if work.config.checkpointing == AUTO else planned({})


def fitted(work: Work, where: device.Device, planned: Callable[[recompute.How], Plan]) -> Plan:
    """The plan with the cheapest blocks to recompute.

    Args:
        work: what the run does.
        where: it is to fit.
        planned: the plan with blocks that are named.
    """
    config = work.config.model_copy(update={"checkpointing": False})
    model = without_values(replace(work, config=config))
    price = recompute.price(model, config, work.largest, where)
    return recompute.cheapest(planned, recompute.able(model, True), price)


def _with_rows(work: Work, make: Callable[[Work], Plan], where: device.Device) -> Plan:
    """The plan with as many label rows at once as it has room for."""
    vocabulary = int(work.model_config.vocab_size) + len(work.added)
    fewest = chunks.least(work.config, vocabulary, where.target)
    made = make(_with_loss_rows(work, fewest))
    more = chunks.most(work.config, vocabulary, where.target, work.largest.targets) - fewest
    if more == 0 or not chunks.roomy(made.needed + chunks.EACH * vocabulary * more, where):
        return made
    larger = make(_with_loss_rows(work, fewest + more))
    return larger if chunks.roomy(larger.needed, where) else made


def _with_loss_rows(work: Work, rows: int) -> Work:
    return replace(work, config=work.config.model_copy(update={"loss_rows": rows}))


def _plan(work: Work, where: device.Device, name: str, outside: Mapping[str, int] | None, cache: Cache | None) -> Plan:
    found = kept.traced(_question(work, where), cache, partial(_trace, work, where))
    batch, config, seen, figures = work.largest, work.config, found.usage, found.allocator
    beside = {**(outside if outside is not None else outside_of(where, config.precision)), **found.between}
    allocated = figures.get("allocated", seen.peak.bytes)
    inside = figures.get("smallest", allocated)
    made = Plan(
        model=name,
        method=config.method,
        precision=config.precision,
        quant=config.quant.name,
        device=where.kind,
        gpu=where.name if where.kind == "cuda" else None,
        how=found.how,
        why=found.why,
        tokens=len(batch.ids),
        rows=len(batch.rows),
        max_length=None if config.max_length == "auto" else config.max_length,
        trainable=found.trainable,
        total=found.total,
        phases=seen.phases,
        peak=seen.peak,
        largest=seen.largest,
        timeline=seen.timeline,
        allocated=allocated,
        reserved=figures.get("reserved"),
        reserved_expandable=figures.get("reserved_expandable"),
        smallest=figures.get("smallest"),
        outside=beside,
        needed=inside + sum(beside.values()),
        budget=where.budget,
        closed=found.forms,
        notes=_notes(seen.peak, found.forms, found.how, found.why),
        loss_rows=found.loss_rows,
        host=found.host,
        **asdict(found.sets),
    )
    return frozen.planned(made, config, found.below, work.epochs, where, work.layout)


def _question(work: Work, where: device.Device) -> kept.Question:
    """What decides the trace of a piece of work."""
    deep_config = None if work.deep is None else work.deep.to_json_string(use_diff=False)
    others = [work.layout, [asdict(token) for token in work.added], deep_config]
    return kept.Question(work.config, work.model_config, work.steps, work.held_out, others, where)


def _trace(work: Work, where: device.Device) -> kept.Traced:
    """What a trace finds, or where it fails the closed forms."""
    model = without_values(work)
    batch = work.largest
    forms = closed(model, work.config, rounded(len(batch.ids)), batch.targets, where.target)
    trained = sum(p.numel() for p in trainable(model).values())
    total = sum(quant.numel(p) for p in model.parameters())
    rows, sets = loss_rows(model), recompute.sets(model, work.config, batch)
    below = frozen.of_model(model, work.config, batch)
    try:
        tracer = deep(model, work, where.target)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        why = f"this model cannot be traced ({reason})"
        return kept.Traced(_by_forms(forms), {}, {}, forms, trained, total, rows, sets, 0, below, "closed form", why)
    sets = replace(sets, more_work=tracer.again / max(1, tracer.once))
    figures = _allocator(tracer, where) if where.kind == "cuda" else {}
    between = heap.beside(tracer.events, tracer.course) if where.kind == "cpu" else {}
    return kept.Traced(usage(tracer), figures, between, forms, trained, total, rows, sets, tracer.host_most, below)


def _by_forms(forms: Mapping[str, int]) -> Usage:
    peak = Moment("loss", sum(forms.values()), dict(forms))
    return Usage([peak], peak, [Holding(name, 1, size) for name, size in forms.items()], [])


FAR = 0.35  # share by which closed forms and trace may differ before it is reported
SCRATCH = 64 * MIB  # and bytes: what kernels take for themselves is in no closed form


def _notes(peak: Moment, forms: Mapping[str, int], how: str, why: str) -> list[str]:
    if how != "trace":
        return [f"by closed forms, which may be a third off: {why}"]
    total = sum(forms.values())
    if abs(total / max(1, peak.bytes) - 1) <= FAR or abs(total - peak.bytes) <= SCRATCH:
        return []
    return [
        f"closed forms give {total / MIB:,.0f} MiB, the trace {peak.bytes / MIB:,.0f}: this model keeps other things "
        "than a plain gated transformer"
    ]


LIBRARIES = 48 * MIB  # on a CPU in float32: what is loaded of torch's libraries while they work, and threads' buffers


def outside_of(where: device.Device, precision: str = "fp32") -> dict[str, int]:
    """What no tensor holds: on a CPU what this process has already, what torch's libraries add while they work, and in
    16 bits the compiled kernels that are kept. The workspaces of CUDA go through the allocator, and are counted there.
    """
    if where.kind == "cuda":
        return {"CUDA context": device.calibration(where.name).context}
    kernels = processor.kernel_bytes() if precision in ("bf16", "fp16") else 0
    return {"Python, torch and data": int(resident_mib() * MIB), "kernels, threads and buffers": LIBRARIES + kernels}


def _allocator(tracer: Tracer, where: device.Device) -> dict[str, int]:
    """What CUDA's caching allocator makes of the events of a trace."""
    events = with_workspaces(tracer, device.calibration(where.name).workspace)
    plain, expandable = allocator.replay(events), allocator.replay(events, expandable=True)
    return {
        "allocated": plain.allocated,
        "reserved": plain.reserved,
        "reserved_expandable": expandable.reserved,
        "smallest": allocator.smallest_budget(events),
    }


def with_workspaces(tracer: Tracer, size: int) -> list[allocator.Event]:
    """The events, with cuBLAS' workspaces behind the weights: one for each thread that multiplies."""
    loaded = next((at for at, phase, _ in tracer.course if phase not in ("", "load", "start")), len(tracer.events))
    first = len(tracer.blocks)
    return [*tracer.events[:loaded], (first, size), (first + 1, size), *tracer.events[loaded:]]


def made_of(made: Plan, most: int = 3) -> str:
    """Where the peak is, and what it is made of, as text."""
    parts = sorted(made.peak.parts.items(), key=lambda item: -item[1])[:most]
    shares = ", ".join(f"{name} {count / max(1, made.peak.bytes):.0%}" for name, count in parts)
    return f"the peak is in the {made.peak.phase}: {shares}"


def with_budget(made: Plan, budget: int | None) -> Plan:
    """The same plan against another budget."""
    return replace(made, budget=budget)
