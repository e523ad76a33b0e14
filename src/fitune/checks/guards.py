"""Rules about the model, the run and its files: each a function named as in the report.

In: a model with its method, probe rows, folders. Out: Findings. Before the first step: base-intact,
nan-hidden, embeddings, quantised-trainable, fp16-master, fp16-range, grad-reaches, accumulation-equality, disk-space,
eval-memory. During it: frozen-intact.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fitune.checks.leak import PROBE_TOKENS
from fitune.core.records import Batch, Finding, Layout, Sample
from fitune.core.units import MIB
from fitune.data.batches import flat, split
from fitune.engine import optim
from fitune.engine.checkpoint import restore_rng, rng_state
from fitune.engine.non_finite import first_non_finite
from fitune.engine.step import hidden_states, loss_sum, make_gradients
from fitune.models import quant, weights
from fitune.models.attached import compute_dtype
from fitune.models.head import loss_rows
from fitune.models.interfaces import causal_lm
from fitune.models.kernels import target
from fitune.models.kernels.loss import at_once
from fitune.models.parts import trainable
from fitune.models.switches import evaluating, training
from fitune.models.tensors import bit_sum, finite, here

SAME = {
    torch.float32: 1e-4,
    torch.bfloat16: 5e-2,
    torch.float16: 1e-2,
}  # relative to the largest gradient: two ways to compute the same sum may differ by so much


def probe_row(samples: Sequence[Sample]) -> Sample:
    """The first sample, shortened."""
    return samples[0].part(slice(-PROBE_TOKENS, None))


def probe(samples: Sequence[Sample]) -> Batch:
    """Three short documents for the checks of a model, each with at least one trained token."""
    made = []
    for n in range(min(3, len(samples))):
        sample = samples[n]
        short = sample.part(slice(-PROBE_TOKENS, None))
        short.mask[-1] = True
        made.append(short if len(short) > 1 else sample)
    return flat(made, range(len(made)))


# ---- before the first step ----


def base_intact(folder: Path, known: Mapping[str, object] | None = None) -> Finding:
    """Every shard is as long as its header says, all shards of the index are there, and none has changed since the run
    began.

    Args:
        folder: the base model.
        known: what `weights.facts` gave when the run began.
    """
    wrong = weights.broken(folder)
    if wrong:
        return Finding("base-intact", "refuse", "; ".join(wrong), "download the model again")
    facts = weights.facts(folder)
    if known is not None and dict(known) != facts:
        changed = sorted(name for name in {*known, *facts} if known.get(name) != facts.get(name))
        text = f"the base model changed since this run began: {', '.join(changed)}"
        return Finding("base-intact", "refuse", text, "restore it, or start a new run")
    total = sum(size for size, _ in facts.values())
    return Finding("base-intact", "ok", f"{len(facts)} weight files, {total:,} bytes: complete")


def nan_hidden(model: nn.Module, batch: Batch, layout: Layout) -> Finding:
    """Weights and hidden states are finite: else every loss would be NaN, which some trainers log as 0."""
    with evaluating(model):
        with torch.no_grad():
            fine = finite(hidden_states(model, batch, layout))
        packed = {
            id(layer.weight) for _, layer in quant.packed(model)
        }  # their bits are not floats, whatever the dtype says
        bad = [
            n
            for n, p in model.named_parameters()
            if p.is_floating_point() and id(p) not in packed and not finite(here(p))
        ]
        first = (
            "" if fine and not bad else (f"the weight {bad[0]}" if bad else first_non_finite(model, [batch], layout)[0])
        )
    if first:
        return Finding("nan-hidden", "refuse", f"the model is not finite before training: {first}", "--precision fp32")
    return Finding(
        "nan-hidden", "ok", "weights and hidden states are finite; every step is checked before it is applied"
    )


def embeddings(model: nn.Module, highest: int) -> Finding:
    """Embedding and head have the same rows, enough for every id, and are one tensor where the config says so."""
    inner = causal_lm(model)
    table, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    rows, scores = int(table.weight.shape[0]), int(head.weight.shape[0])
    if rows != scores:
        return Finding("embeddings", "refuse", f"the embedding has {rows:,} rows, the output head {scores:,}")
    if highest >= rows:
        return Finding("embeddings", "refuse", f"token id {highest:,} has no row: the embedding has {rows:,}")
    tied = bool(getattr(inner.config, "tie_word_embeddings", False))
    if tied != (table.weight.data_ptr() == head.weight.data_ptr()):
        real, expected = ("two tensors", "one") if tied else ("one tensor", "two")
        text = f"embedding and output head are {real}; config.json says {expected}"
        return Finding("embeddings", "warn", text)
    return Finding("embeddings", "ok", f"{rows:,} rows, the output head {'shares them' if tied else 'has its own'}")


@torch.no_grad()
def start_of(model: nn.Module, samples: Sequence[Sample]) -> Tensor:
    """(T, W): the hidden states of the first probe row before a method is attached."""
    with evaluating(model):
        return hidden_states(model, flat([probe_row(samples)], [0]), "documents").float()


def same_at_start(model: nn.Module, before: Tensor, samples: Sequence[Sample]) -> Finding:
    """A method that must not change the model at the start does not change it."""
    difference = float((start_of(model, samples) - before).abs().max() / before.abs().max())
    if difference > SAME[compute_dtype(model)]:
        text = f"the method changes the model before the first step, by {difference:.1e} of the largest value"
        return Finding("same-at-start", "refuse", text, "another --method, which does not depend on the layers' names")
    return Finding("same-at-start", "ok", f"the method changes nothing before the first step ({difference:.1e})")


def quantised_trainable(model: nn.Module) -> Finding:
    """Only floating-point tensors can be trained; gradients of quantized ones would be lost."""
    wrong = [n for n, p in trainable(model).items() if not p.is_floating_point() or hasattr(p, "quant_state")]
    if wrong:
        text = f"{len(wrong)} quantized tensors would be trained, the first {wrong[0]}"
        return Finding("quantised-trainable", "refuse", text, "--method lora, or another with a frozen base model")
    return Finding("quantised-trainable", "ok", "every trainable tensor is floating point")


def fp16_master(model: nn.Module, optimizer: torch.optim.Optimizer, lr: float = 0.0, *, force: bool = False) -> Finding:
    """Weights that are trained in float16 need an epsilon that is not close to zero there: Adam divides by it. In 16
    bits small updates are lost; float32 keeps them.

    Args:
        model: with its method.
        optimizer: of its trainable parameters.
        lr: the highest learning rate of the run; 0: not known.
        force: what may ruin the model is only a warning.
    """
    low = {name: p for name, p in trainable(model).items() if p.dtype != torch.float32}
    if not low:
        return Finding("fp16-master", "ok", "what is trained is float32, with its gradients and states")
    halves = {id(p) for p in low.values() if p.dtype == torch.float16}
    adams = [
        (lr * group.get("times", 1.0), float(group["eps"]), name)
        for group in optimizer.param_groups
        if (name := _adam(group)) and any(id(p) in halves for p in group["params"])
    ]
    if adams:
        highest, epsilon, name = max(adams)
        found = optim.in_float16(name, epsilon, highest, force=force)
        return replace(found, text=f"{len(halves)} tensors: {found.text}")
    kinds = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in low.values()}))
    return Finding("fp16-master", "warn", f"trained in {kinds}: small updates are lost", "--trainable-dtype fp32")


def _adam(group: Mapping[str, object]) -> str | None:
    """The name of torch's AdamW that a group of parameters belongs to; None: of another optimizer, which computes in
    float32 or has no epsilon."""
    if not isinstance(group.get("eps"), float) or "fused" not in group:
        return None
    return "adamw" if group["fused"] else "adamw-foreach"


FP16_HIGHEST = 65504.0
CLOSE = 0.5  # of it: a row that is longer than the probe may exceed it


def fp16_range(model: nn.Module, batch: Batch, layout: Layout) -> Finding:
    """In float16 everything must stay below 65,504: no layer's output on the probe is close to it."""
    if compute_dtype(model) != torch.float16:
        return Finding("fp16-range", "ok", "nothing is computed in float16")
    largest: dict[str, float] = {}

    def look(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            out = output[0] if isinstance(output, tuple) else output
            if isinstance(out, Tensor) and out.is_floating_point():
                largest[name] = max(largest.get(name, 0.0), float(out.abs().nan_to_num(nan=float("inf")).max()))

        return hook

    hooks = [m.register_forward_hook(look(n)) for n, m in causal_lm(model).named_modules() if not list(m.children())]
    try:
        with evaluating(model), torch.no_grad():
            hidden_states(model, batch, layout)
    finally:
        for hook in hooks:
            hook.remove()
    name = max(largest, key=lambda key: largest[key])
    text = f"the largest output is {largest[name]:,.0f} of {FP16_HIGHEST:,.0f}, of {name}"
    if largest[name] >= FP16_HIGHEST:
        return Finding("fp16-range", "refuse", text, "--precision bf16, which has float32's range, or fp32")
    if largest[name] > CLOSE * FP16_HIGHEST:
        return Finding("fp16-range", "warn", text, "--precision bf16 or fp32")
    return Finding("fp16-range", "ok", text)


LOOKED_AT = 2**16  # numbers of each gradient that are compared, spread over all of it


@contextmanager
def _watching(model: nn.Module, look: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Inside, each gradient is passed to `look` as soon as it is computed, and dropped: all of them together may not
    fit. Model and random numbers are restored."""
    before = rng_state()

    def watcher(name: str) -> Callable[[Tensor], None]:
        def seen(parameter: Tensor) -> None:
            assert parameter.grad is not None
            look(name, here(parameter.grad))
            parameter.grad = None

        return seen

    hooks = [p.register_post_accumulate_grad_hook(watcher(name)) for name, p in trainable(model).items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)
        restore_rng(before)


def _gradients(model: nn.Module, backward: Callable[[], object]) -> dict[str, Tensor]:
    """The gradients of the mean loss over all targets, without dropout: of each the numbers that are compared."""
    found: dict[str, Tensor] = {}

    def add(name: str, gradient: Tensor) -> None:
        some = gradient.reshape(-1)[:: max(1, gradient.numel() // LOOKED_AT)]
        found[name] = found[name] + some if name in found else some.clone()

    with _watching(model, add), evaluating(model):
        backward()
    return found


def grad_reaches(model: nn.Module, batch: Batch, layout: Layout) -> Finding:
    """A first backward pass, in training mode: a finite gradient reaches every trainable tensor."""
    fine: dict[str, bool] = {}
    with _watching(model, lambda name, gradient: fine.update({name: finite(gradient)})), training(model):
        try:
            (loss_sum(model, batch, layout) / batch.weight).backward()
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
    found = trainable(model)
    none, bad = [name for name in found if name not in fine], [name for name in found if not fine.get(name, True)]
    if none or bad:
        text = f"no gradient reaches {len(none)} trainable tensors" if none else f"{len(bad)} gradients are not finite"
        return Finding("grad-reaches", "refuse", f"{text}, the first of {(none or bad)[0]}")
    return Finding("grad-reaches", "ok", f"a finite gradient reaches all {len(found)} trainable tensors")


def accumulation_equality(model: nn.Module, batch: Batch, layout: Layout) -> Finding:
    """Gradient accumulation gives the gradient of the whole batch, which is computed here: the sum of the losses over
    the number of target tokens, whatever the micro-batches."""
    whole = _gradients(model, lambda: (loss_sum(model, batch, layout) / batch.weight).backward())
    parts = split(batch, len(batch.rows))
    pieces = _gradients(model, lambda: make_gradients(model, parts, layout))
    # of the largest gradient of all: some, of key biases for example, are zero but for rounding
    scale = max((float(g.abs().max()) for g in whole.values() if g.numel()), default=0.0) or 1.0
    both = [(g, pieces[name]) for name, g in whole.items() if name in pieces and g.numel()]
    worst = max((float((g - piece).abs().max()) / scale for g, piece in both), default=0.0)
    allowed = SAME[compute_dtype(model)]
    if worst > allowed:
        text = f"micro-batches change the gradient by {worst:.1e} of its largest value, above {allowed}"
        return Finding(
            "accumulation-equality", "refuse", text, "--batch-size so that accumulation is 1, or --layout padded"
        )
    return Finding(
        "accumulation-equality", "ok", f"micro-batches change the gradient by {worst:.1e} of its largest value"
    )


def disk_space(folder: Path, trained_bytes: int, keep: int, free: int | None = None) -> Finding:
    """The checkpoints that are kept at the same time, and the result, fit on the disk.

    Args:
        folder: the run folder, which may not exist yet.
        trained_bytes: of weights and optimizer states.
        keep: checkpoints that are kept, with the best one and the one that is being written.
        free: bytes; None: asks the operating system.
    """
    place = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    there = shutil.disk_usage(place).free if free is None else free
    needed = trained_bytes * (keep + 1)
    text = f"{needed / MIB:,.0f} MiB for {keep} checkpoints and the result, {there / MIB:,.0f} MiB free"
    if needed > there:
        return Finding("disk-space", "refuse", text, "free some space, --keep-last 1, or another --output")
    return Finding("disk-space", "ok", text)


def eval_memory(model: nn.Module) -> Finding:
    """Held-out losses never hold the logits of a whole batch: the output head gets label rows, a chunk at a time."""
    inner, rows = causal_lm(model), loss_rows(model)
    count = at_once(rows, inner.config.vocab_size, target.of(next(inner.parameters()).device))
    text = (
        f"at most {count:,} logits ({8 * count / MIB:,.0f} MiB with their gradient), no more than {rows:,} rows at once"
    )
    return Finding("eval-memory", "ok", text)


# ---- while it runs ----


Bits = Mapping[str, tuple[int, bool]]  # of each parameter a sum over its bits, and whether it is trained


@torch.no_grad()
def fingerprint(model: nn.Module) -> Bits:
    """For each parameter an exact sum over its bits, and whether it is trained."""
    sums = {}
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    for name, layer in quant.packed(model):
        tensors |= {f"{name}|scales {n}": scales for n, scales in enumerate(quant.constants(layer))}
    for name, p in tensors.items():
        mine = here(p)  # of a model in shards
        sums[name] = (bit_sum(mine.detach()), p.requires_grad and bool(mine.numel()))
    return sums


def rate_that_moves(lr: float, made: int, step: int) -> float:
    """The learning rate that must have changed every trained tensor by the end of a run; 0: none need have changed.

    Args:
        lr: of the run.
        made: steps since it began or went on: near the end of a run the rate may be 0, and the first step changes but
            one factor of LoRA, since the other one begins at 0 (Hu et al. 2021).
        step: that it ends with.
    """
    return lr if made > 1 and 2 * made > step else 0.0


def frozen_intact(before: Bits, model: nn.Module, lr: float, when: str = "after two steps") -> Finding:
    """After two steps, and at the end: every frozen tensor has the same bits, and every trained one has changed.

    Args:
        before: what `fingerprint` gave.
        model: now.
        lr: the learning rate; with 0 nothing needs to change.
        when: it is, for people.
    """
    now = fingerprint(model)
    moved = [n for n, (value, trained) in before.items() if not trained and now[n][0] != value]
    still = [n for n, (value, trained) in before.items() if trained and now[n][0] == value]
    if moved:
        text = f"{len(moved)} frozen tensors changed, the first {moved[0]}"
        return Finding("frozen-intact", "refuse", text, "this is an error of fitune: please report it")
    if still and lr > 0:
        text = f"{len(still)} trained tensors have not changed {when.replace('after', 'in')}: {still[0]}"
        return Finding("frozen-intact", "warn", text, "a higher --lr, or --trainable-dtype fp32")
    frozen = sum(not trained for _, trained in before.values())
    return Finding("frozen-intact", "ok", f"{when} {frozen} frozen tensors have the same bits, the rest changed")
