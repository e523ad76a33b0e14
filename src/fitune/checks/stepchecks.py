"""Rules about rows, gradients and states in the training loop: each a function named as in the report.

In: batches, a model, an optimizer, a checkpoint. Out: Findings, as in datachecks.py. Before the first step:
batch-labels, reference-loss, row-order, eval-dropout. In the first two: step-equality, which raises before the
optimizer has applied anything. When a run goes on: resume-exact, row-order. At its end: steps-applied.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from fitune.checks.findings import raise_refused
from fitune.checks.leak import PROBE_TOKENS, TOLERANCE, perturbed
from fitune.core.records import Batch, Finding, Layout, Pair, Sample, StepRecord, Units
from fitune.data.batches import Loader, flat
from fitune.engine import optim
from fitune.engine.checkpoint import Loaded, restore_rng, rng_state
from fitune.engine.held_out import held_out_loss
from fitune.engine.parallel import World
from fitune.engine.step import loss_sum
from fitune.engine.step_runner import StepRunner
from fitune.models.attached import compute_dtype
from fitune.models.interfaces import causal_lm
from fitune.models.parts import trainable
from fitune.models.switches import computing, evaluating, rows_attention, training
from fitune.models.tensors import bit_sum

OURS = "this is an error of fitune: please report it"

# ---- before the first step ----


def batch_labels(batches: Sequence[Batch], samples: Units) -> Finding:
    """Each document of a batch is its sample: its ids, positions from 0, and each label on the row before its token.

    Of a rejected answer whose prompt stands once, that holds from the prompt's last token on, behind the chosen one's.
    Computed here from the samples, token by token, so that an error in the code of the label shift is found.

    Args:
        batches: those of the first step.
        samples: all of them.
    """
    count = 0
    for batch in batches:
        there = [sample for row in batch.rows for sample in _documents(samples[row])]
        for document, (sample, (start, end)) in enumerate(zip(there, pairwise(batch.bounds.tolist()), strict=True)):
            begins = 0 if batch.shared is None else int(batch.shared[document])
            if begins and not np.array_equal(sample.ids[:begins], there[document - 1].ids[:begins]):
                return Finding("batch-labels", "refuse", f"{sample.source}: both answers have other prompts", OURS)
            if text := _differs(batch, sample, begins, start, end):
                text = f"document {document + 1} of the first step ({sample.source}): {text}"
                return Finding("batch-labels", "refuse", text, OURS)
            count += 1
    return Finding("batch-labels", "ok", f"each label of the first step's {count} documents is the token that follows")


def _documents(unit: Sample | Pair) -> list[Sample]:
    """What a row has in a batch: of labelled answers the one that is labelled."""
    if isinstance(unit, Sample):
        return [unit]
    return [unit.chosen] if unit.desirable is not None else [unit.chosen, unit.rejected]


def _differs(batch: Batch, sample: Sample, begins: int, start: int, end: int) -> str:
    """What of rows start .. end - 1 is not the sample from its token `begins` on; empty: nothing."""
    if batch.ids[start:end].tolist() != sample.ids[begins:].tolist():
        return "its ids are not the sample's"
    if batch.positions[start:end].tolist() != list(range(begins, len(sample))):
        return f"its positions begin at {int(batch.positions[start])}, not at {begins}"
    here = (batch.label_rows >= start) & (batch.label_rows < end)
    found = dict(zip((batch.label_rows[here] - start + begins).tolist(), batch.labels[here].tolist(), strict=True))
    wanted = {place - 1: int(sample.ids[place]) for place in range(1, len(sample)) if sample.mask[place]}
    if found != wanted:
        place = next(p for p in sorted({*found, *wanted}) if found.get(p) != wanted.get(p))
        return f"behind token {place} it has the label {found.get(place)}, the sample has {wanted.get(place)}"
    if sample.weights is not None:
        weights = None if batch.weights is None else batch.weights[here]
        if weights is None or not np.array_equal(weights, sample.weights[1:][sample.mask[1:]]):
            return "its weights are not the sample's"
    return ""


@torch.no_grad()
def reference_loss(model: nn.Module, samples: Sequence[Sample], layout: Layout) -> Finding:
    """The loss that is trained equals the one computed here from transformers' own logits.

    Args:
        model: with its method attached.
        samples: the first two are used, shortened.
        layout: how documents go through the model.
    """
    some = [samples[n].part(slice(-PROBE_TOKENS, None)) for n in range(min(2, len(samples)))]
    some = [sample for sample in some if len(sample) > 1]
    for sample in some:
        sample.mask[-1] = True
    if not some:
        return Finding("reference-loss", "ok", "rows of one token have no loss")
    with evaluating(model):
        batch = flat(some, range(len(some)))
        ours, rows = float(loss_sum(model, batch, layout)), sum(int(sample.mask[1:].sum()) for sample in some)
        with rows_attention(model):
            theirs = sum(_plain_loss(model, sample) for sample in some)
    off = abs(ours - theirs) / max(abs(theirs), 1e-6 * rows, 1e-6)
    text = f"{ours / rows:.4f} per target token, {theirs / rows:.4f} by transformers' own logits (off by {off:.1e})"
    if not off <= TOLERANCE[compute_dtype(model)]:
        return Finding("reference-loss", "refuse", text, OURS)
    return Finding("reference-loss", "ok", text)


def _plain_loss(model: nn.Module, sample: Sample) -> float:
    ids = torch.from_numpy(sample.ids)[None].long().to(next(causal_lm(model).parameters()).device)
    with computing(model):
        logits = model(input_ids=ids).logits[0, -len(sample) :].float()
    wanted = torch.from_numpy(sample.mask[1:].copy()).to(ids.device)
    losses = F.cross_entropy(logits[:-1][wanted], ids[0, 1:][wanted], reduction="none")
    if sample.weights is not None:
        losses = losses * torch.from_numpy(sample.weights[1:][sample.mask[1:]]).to(losses)
    return float(losses.double().sum())


def each_row_once(loader: Loader) -> Finding:
    """An epoch has every row exactly once."""
    rows = np.concatenate([micro for step in loader.epoch_steps(0) for micro in step])
    if not np.array_equal(np.sort(rows), np.arange(len(loader.samples))):
        different = f"{len(np.unique(rows)):,} different ones of {len(loader.samples):,}"
        text = f"the first epoch has {len(rows):,} rows, {different}"
        return Finding("row-order", "refuse", text, OURS)
    return Finding("row-order", "ok", f"the first epoch has each of {len(rows):,} samples once")


@torch.no_grad()
def eval_dropout(model: nn.Module, batch: Batch, layout: Layout) -> Finding:
    """Dropout is off in a held-out loss: with other random numbers it is the same."""
    before = rng_state()
    losses = []
    try:
        with training(model), perturbed(model):  # dropout before a matrix of zeros shows only once it has learned
            for seed in (1, 2):
                torch.manual_seed(seed)
                losses.append(held_out_loss(model, [batch], layout))
    finally:
        restore_rng(before)
    if losses[0] != losses[1]:
        text = f"the held-out loss of the same rows is {losses[0]:.6f}, then {losses[1]:.6f}: dropout is on"
        return Finding("eval-dropout", "refuse", text, OURS)
    return Finding("eval-dropout", "ok", "held-out losses do not depend on random numbers")


# ---- the first steps ----

LOOKED_AT = 2**16  # numbers of a gradient that are compared, spread over all of it
WATCHED = 2  # steps of a process in which what the optimizer gets is checked
OFF = 1e-3  # relative to the largest: what another order of additions may change


def _some(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1)[:: max(1, tensor.numel() // LOOKED_AT)].to(torch.float32, copy=True)


@contextmanager
def step_equality(runner: StepRunner, optimizer: torch.optim.Optimizer) -> Iterator[Sequence[Finding]]:
    """Inside, one optimizer step is watched: what the optimizer is given is the sum of what the micro-batches gave,
    clipped once, all by one factor. Nothing is left of an earlier step, and no micro-batch is lost.

    Args:
        runner: makes the step.
        optimizer: is asked to step inside.

    Yields:
        The findings, one for each time that the optimizer stepped.

    Raises:
        TrainingError: before the optimizer has applied what is wrong.
    """
    found: list[Finding] = []
    if isinstance(optimizer, optim.InBackward):
        yield [Finding("step-equality", "ok", "gradients are applied one by one in the backward pass")]
        return
    if runner.shards is not None:
        yield [
            Finding("step-equality", "ok", "the model is in shards: their gradients are summed in the backward pass")
        ]
        return
    parameters, sums, latest = trainable(runner.model), dict[str, Tensor](), dict[str, tuple[Tensor, bool]]()

    def came(name: str, gradient: Tensor) -> None:  # the output head's comes in chunks: the last counts
        latest[name] = _some(gradient), parameters[name].grad is None

    def added(name: str, parameter: Tensor) -> None:
        gradient, first = latest.pop(name)  # first of the step, which may be repeated
        sums[name] = gradient if first or name not in sums else sums[name] + gradient

    def used(*_: object) -> None:
        given = {name: _some(p.grad) for name, p in parameters.items() if p.grad is not None}
        if runner.world.size > 1:
            sums.update(_of_all(runner.world, sums, given))
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters.values() if p.grad is not None])
        rounding = max(torch.finfo(p.dtype).eps for p in parameters.values())
        how = (float(norm), runner.max_grad_norm, runner.scale.value, max(OFF, 2 * rounding))
        found.append(_as_summed(sums, given, *how))
        raise_refused(found[-1:])

    hooks = [p.register_hook(partial(came, name)) for name, p in parameters.items()]
    hooks += [p.register_post_accumulate_grad_hook(partial(added, name)) for name, p in parameters.items()]
    hooks.append(optimizer.register_step_pre_hook(used))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _of_all(world: World, sums: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sums over all processes, of which some had no rows for a tensor."""
    mine = [sums[name] if name in sums else torch.zeros_like(gradient) for name, gradient in given.items()]
    flat = world.added(torch.cat([one.double().reshape(-1) for one in mine]))
    parts = flat.split([one.numel() for one in mine])
    return {name: part.view_as(one) for (name, one), part in zip(given.items(), parts, strict=True)}


def _as_summed(
    sums: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    norm: float,
    max_norm: float,
    scale: float,
    most: float = OFF,
) -> Finding:
    """What the optimizer gets is the sums times one factor, that of clipping. most: relative, that rounding changes;
    gradients of 16 bits are rounded after each addition."""
    rule = "step-equality"
    if not given or sums.keys() != given.keys():
        return Finding(rule, "refuse", f"{len(sums)} tensors got a gradient, the optimizer has {len(given)}", OURS)
    squares = sum(float(s.double().square().sum()) for s in sums.values())
    if not squares:
        return Finding(rule, "ok", "every gradient of this step is zero")
    factor = sum(float((s.double() * given[name].double()).sum()) for name, s in sums.items()) / squares
    largest = max(float(g.abs().max()) for g in given.values())
    off = max(float((given[name] - factor * s).abs().max()) for name, s in sums.items()) / max(largest, 1e-30)
    if off > most:
        text = f"what the optimizer gets is not the sum of the micro-batches' gradients: {off:.1e} off"
        return Finding(rule, "refuse", text, OURS)
    clipped = factor * scale
    fits = abs(clipped - 1) <= most if not max_norm or norm < max_norm * (1 - most) else clipped <= 1 + most
    if not fits or (max_norm and norm > max_norm * (1 + most)):
        text = f"gradients of norm {norm:.3g} were multiplied by {clipped:.4g}; the highest norm is {max_norm:g}"
        return Finding(rule, "refuse", text, OURS)
    how = "" if abs(clipped - 1) <= OFF else f", clipped once by {clipped:.3g}"
    return Finding(rule, "ok", f"the optimizer gets the sum of the micro-batches' gradients{how} (off by {off:.1e})")


# ---- when a run goes on ----


def next_rows(loader: Loader, step: int) -> str:
    """A digest of the rows of the next step, for a checkpoint.

    Args:
        loader: of the run.
        step: how many steps are done.
    """
    epoch = 0
    while step >= (count := loader.count(epoch)):
        step, epoch = step - count, epoch + 1
    return _digest(loader.epoch_steps(epoch)[step])


def _digest(micro: Sequence[NDArray[np.int64] | tuple[int, ...]]) -> str:
    text = repr([[int(row) for row in rows] for rows in micro])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def row_order(expected: str, step: int, micro_batches: Sequence[Batch]) -> Finding:
    """The first step of a resumed run has the rows that the unbroken one has.

    Args:
        expected: what `next_rows` gave when the checkpoint was written.
        step: its number.
        micro_batches: its batches.
    """
    if _digest([batch.rows for batch in micro_batches]) != expected:
        text = f"step {step} would train other rows than the ones that its checkpoint names"
        return Finding("row-order", "refuse", text, "start a new run: the order of the rows has changed")
    return Finding("row-order", "ok", f"step {step} has the rows that the checkpoint names")


@torch.no_grad()
def resume_exact(
    loaded: Loaded, parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer | None
) -> Finding:
    """Weights, optimizer states and random numbers, after they were restored, have the checkpoint's bits.

    Args:
        loaded: the checkpoint.
        parameters: what it was restored into.
        optimizer: as well; None: both will be dealt out to several processes, and are not looked at.
    """
    held, weights = (loaded.optimizer, loaded.optimizer_scalars), dict[str, Tensor](parameters)
    tensors, scalars = held if optimizer is None else optim.state_tensors(optimizer, parameters)
    weights = loaded.trainable if optimizer is None else weights
    now = rng_state()
    random = {name: state for name, state in loaded.rng.items() if name == "cpu"}
    pairs = [("weights", loaded.trainable, weights), ("optimizer states", loaded.optimizer, tensors)]
    wrong = [what for what, stored, here in pairs if not _same_bits(stored, here)]
    wrong += ["optimizer states"] if scalars != loaded.optimizer_scalars and "optimizer states" not in wrong else []
    wrong += ["random numbers"] if not _same_bits(random, now) else []
    if wrong:
        text = f"{', '.join(wrong)} are not those of the checkpoint of step {loaded.step}"
        return Finding("resume-exact", "refuse", text, OURS)
    if optimizer is None:
        text = "random numbers have the checkpoint's bits; weights and states are compared as they are dealt out"
        return Finding("resume-exact", "ok", text)
    text = f"weights, {len(tensors) + len(scalars)} optimizer states and random numbers have the checkpoint's bits"
    return Finding("resume-exact", "ok", text)


def _same_bits(stored: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> bool:
    return all(
        name in here and value.dtype == here[name].dtype and bit_sum(value) == bit_sum(here[name].detach())
        for name, value in stored.items()
    )


# ---- at the end ----


def steps_applied(optimizer: torch.optim.Optimizer, records: Sequence[StepRecord]) -> Finding:
    """The optimizer has counted as many steps as the log says were applied: none was skipped, or made twice."""
    logged = sum(record.applied for record in records)
    counted = [int(states["step"]) for states in optimizer.state.values() if "step" in states]
    if isinstance(optimizer, optim.InBackward) or not counted:
        return Finding("steps-applied", "ok", f"{logged} steps applied; this optimizer counts none")
    if max(counted) != logged:
        text = f"the log has {logged} applied steps, the optimizer has counted {max(counted)}"
        return Finding("steps-applied", "refuse", text, OURS)
    return Finding("steps-applied", "ok", f"{logged} steps applied, and as many counted by the optimizer")
