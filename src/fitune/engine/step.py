"""One optimizer step, and the held-out loss.

In: a model, the micro-batches of a step, an objective. Out: the loss of the whole step, and the gradient norm. For
answers (SFT) the loss is per target token; objectives on preferences stand in `objectives/`, their loss is per row.
That of answers is sum(weight x loss) / sum of the weights of all target tokens of the step, so that accumulation, the
number of rows in a micro-batch and their lengths never change it; without weights, that is sum(loss) / target tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from fitune.core.records import Batch, Layout, Rewards
from fitune.data.batches import rounded
from fitune.engine import last_block
from fitune.engine.optim import InBackward
from fitune.engine.rewards import rewards_of
from fitune.models import attached
from fitune.models.configs import longest_row
from fitune.models.head import loss_rows, output_head
from fitune.models.interfaces import CausalLM, causal_lm, decoder
from fitune.models.kernels import dynamic_rope
from fitune.models.kernels import placed as placing
from fitune.models.kernels.attention import FLAT
from fitune.models.kernels.flash import leads, seen_keys
from fitune.models.kernels.label_rows import KEYWORD, LabelRows
from fitune.models.kernels.loss import label_loss
from fitune.models.kernels.placed import Placed
from fitune.models.methods import virtual
from fitune.models.parts import trainable
from fitune.models.switches import SDPA, attention, computing


@dataclass(frozen=True)
class Loss:
    """Of a batch. total: the sum of its losses, a float32 scalar with a gradient. seen: what its rewards are made of
    (rewards.FIGURES), where it has some."""

    total: Tensor
    seen: Tensor | None = None


class Objective(Protocol):
    """What is made small. figures: how many numbers its rewards are made of. first: of how many numbers it must have
    the sums over all batches of a step, or of an evaluation, before the first loss; 0: none, or it has them."""

    @property
    def figures(self) -> int: ...
    @property
    def first(self) -> int: ...

    def sums(self, model: nn.Module, batch: Batch, layout: Layout) -> Tensor:
        """(first,), float64: what a batch adds to them."""

    def of_step(self, sums: Tensor) -> Objective:
        """The objective of the batches that have these sums together."""

    def loss(self, model: nn.Module, batch: Batch, layout: Layout) -> Loss:
        """The sum of a batch's losses."""


class Below(Protocol):
    """Has what frozen blocks gave for rows that were met before (frozen_states.py)."""

    def through(self, model: nn.Module, batch: Batch, placed: Placed) -> AbstractContextManager[None]:
        """Inside, a forward pass of this batch begins behind those blocks, where it can."""


@dataclass(frozen=True)
class Answers:
    """Tuning on answers: the cross-entropy of their tokens. below: what of the forward pass is known already."""

    below: Below | None = None
    figures = first = 0

    def sums(self, model: nn.Module, batch: Batch, layout: Layout) -> Tensor:
        """See Objective."""
        raise NotImplementedError("the loss of answers needs no sums")

    def of_step(self, sums: Tensor) -> Answers:
        """See Objective."""
        return self

    def loss(self, model: nn.Module, batch: Batch, layout: Layout) -> Loss:
        """See Objective."""
        return Loss(loss_sum(model, batch, layout, self.below))


SFT = Answers()


@dataclass(frozen=True)
class StepResult:
    """loss: per target token, per unit of weight, or per row of preferences. grad_norm: before clipping. tokens,
    targets: of all rows. finite: it was applied. rewards: of preferences."""

    loss: float
    grad_norm: float
    tokens: int
    targets: int
    finite: bool = True
    rewards: Rewards | None = None


def place(model: nn.Module, batch: Batch, layout: Layout = "flat") -> Placed:
    """The batch on the model's device, with what the method lays before its documents."""
    device, before = next(causal_lm(model).parameters()).device, virtual.of(model)
    if layout != "flat":
        return placing.place(batch, device, fill=False)
    if before is None:
        return placing.place(batch, device)
    if before.prefix is None:
        return placing.place(batch, device, laid=before.count)
    return placing.place(batch, device, prefix=before.count)


def hidden_states(model: nn.Module, batch: Batch, layout: Layout, placed: Placed | None = None) -> Tensor:
    """(T, W): the last hidden states of all tokens of a batch; those of virtual tokens before them are left out.

    Args:
        model: with or without a method's wrapper.
        batch: flat, as always; what the model gets depends on the layout.
        placed: the same batch on the model's device, where it is there already.
        layout: flat (all documents in one row, attention per document), padded (a row each, padded on the right and
            masked by position), documents (a forward each: for models that neither of the others suits).

    Raises:
        NotImplementedError: a prefix in another layout than flat.
    """
    placed = placed or place(model, batch, layout)
    rows = rows_of_all(model, batch, layout, placed)
    if placed.keep is not None:
        return rows[placed.keep]
    return rows[: len(batch.ids)] if placed.filler else rows


def rows_of_all(model: nn.Module, batch: Batch, layout: Layout, placed: Placed) -> Tensor:
    """The last hidden states of all rows that the model works on; of a flat batch also those of what is laid before
    its documents, and of the filler."""
    before = virtual.of(model)
    with computing(model):
        if layout == "flat":
            return _flat(model, batch, before, placed)
        if before is not None and before.prefix is not None:
            raise NotImplementedError("a prefix needs flat batches")
        with attention(model, SDPA):
            return _separate(model, batch, before, placed.ids, padded=layout == "padded")


def _flat(
    model: nn.Module,
    batch: Batch,
    before: virtual.Virtual | None,
    placed: Placed,
    labelled: LabelRows | None = None,
) -> Tensor:
    """Args: labelled: the last block works on these rows alone, and what comes first is theirs."""
    inner = causal_lm(model)
    inputs: dict[str, object] = {"input_ids": placed.ids[None]}
    if before is not None and before.prefix is not None:
        inputs["prefix"] = before.prefix
    elif before is not None:
        embedded = inner.get_input_embeddings()(placed.ids)
        rows = torch.cat([cast(Tensor, before.embeddings).to(embedded.dtype), embedded])
        inputs = {"inputs_embeds": rows.index_select(0, cast(Tensor, placed.order))[None]}
    positions, bounds = placed.positions, placed.documents.bounds
    if hasattr(decoder(inner), "flat_positions"):  # a model that makes its positions from the ids, ChatGLM's first
        laid = 0 if placed.order is None or before is None else before.count
        positions = placed.repeated(_by_model(inner, placed.ids[: len(batch.ids)], batch, laid))
    documents = {"cu_seq_lens_q": bounds, "documents": placed.documents, KEYWORD: labelled}
    with attention(model, FLAT, placed.documents, None if before is None else before.prefix, labelled):
        out: Tensor = decoder(inner)(
            **inputs, position_ids=positions[None], **documents, use_cache=False
        ).last_hidden_state[0]
    return out


def _by_model(inner: CausalLM, ids: Tensor, batch: Batch, laid: int) -> Tensor:
    """(2, T + D x laid): the positions of a flat batch, by a model that makes them from the ids of whole documents."""
    if batch.shared is None:
        return decoder(inner).flat_positions(ids, batch.bounds.tolist(), laid)
    starts, shared = batch.bounds[:-1], batch.shared
    bounds, rows = seen_keys(starts, batch.bounds[1:], leads(batch.bounds, shared), shared, 0)
    whole = decoder(inner).flat_positions(ids[torch.from_numpy(rows).to(ids.device)], bounds.tolist(), laid)
    inside = np.concatenate([np.arange(count + laid) for count in batch.lengths])
    own = inside >= np.repeat(np.where(shared > 0, shared + laid, 0), batch.lengths + laid)
    return whole[:, torch.from_numpy(np.flatnonzero(own)).to(ids.device)]


def _embedded(inner: PreTrainedModel, ids: Tensor, batch: Batch, before: virtual.Virtual) -> list[Tensor]:
    """Each document's embeddings behind the virtual ones."""
    embedded = inner.get_input_embeddings()(ids)
    start = cast(Tensor, before.embeddings).to(embedded.dtype)
    return [torch.cat([start, document]) for document in _documents(embedded, batch)]


def _documents(values: Tensor, batch: Batch) -> tuple[Tensor, ...]:
    return torch.split(values, [int(end - start) for start, end in pairwise(batch.bounds)])


def _separate(model: nn.Module, batch: Batch, before: virtual.Virtual | None, ids: Tensor, *, padded: bool) -> Tensor:
    """Documents in rows of their own: padded side by side, or one after the other."""
    if batch.shared is not None:
        raise NotImplementedError("a prompt that stands once for two answers needs flat batches")
    inner = causal_lm(model)
    skip = 0 if before is None else before.count
    name = "input_ids" if before is None else "inputs_embeds"
    documents = list(_documents(ids, batch)) if before is None else _embedded(inner, ids, batch, before)
    places = _own_positions(inner, ids, batch, skip)
    if not padded:
        outs = []
        for one, place in zip(documents, places, strict=True):
            dynamic_rope.reset(inner)
            outs.append(decoder(inner)(**{name: one[None]}, use_cache=False, **place).last_hidden_state[0])
        return torch.cat([out[skip:] for out in outs])
    rows = torch.nn.utils.rnn.pad_sequence(documents, batch_first=True)
    ones = [torch.ones(len(one), dtype=torch.long, device=ids.device) for one in documents]
    mask = torch.nn.utils.rnn.pad_sequence(ones, batch_first=True)
    width = _width(inner, rows.shape[1])
    more = width - rows.shape[1]
    rows, mask = F.pad(rows, (*[0, 0] * (rows.ndim - 2), 0, more)), F.pad(mask, (0, more))
    extra = {}
    if places[0]:
        padded_places = [F.pad(p["position_ids"], (0, width - p["position_ids"].shape[-1])) for p in places]
        extra = {"position_ids": torch.cat(padded_places)}
    states: Tensor = decoder(inner)(**{name: rows}, attention_mask=mask, use_cache=False, **extra).last_hidden_state
    real = mask.bool()
    real[:, :skip] = False
    return states[real]


def _width(inner: PreTrainedModel, longest: int) -> int:
    """One of few widths of padded rows, where the model holds so many tokens."""
    return rounded(longest) if rounded(longest) <= longest_row(inner.config) else longest


def _own_positions(inner: PreTrainedModel, ids: Tensor, batch: Batch, before: int) -> list[dict[str, Tensor]]:
    """Of each document its positions (1, 2, L), for a model that makes them from the ids; nothing for others."""
    if not hasattr(decoder(inner), "flat_positions"):
        return [{} for _ in pairwise(batch.bounds)]
    each = [decoder(inner).flat_positions(one, [0, len(one)], before) for one in _documents(ids, batch)]
    return [{"position_ids": one[None]} for one in each]


def label_hidden(model: nn.Module, batch: Batch, layout: Layout = "flat", placed: Placed | None = None) -> Tensor:
    """(L, W): the last hidden states of the rows that carry a label. The rest never reaches the head.

    Args:
        placed: as `place` gave it; L is its number of label rows. Without, that of the batch.
    """
    there = placed or place(model, batch, layout)
    if there.labelled is not None and last_block_is_ready(model):
        with computing(model):
            found = _flat(model, batch, virtual.of(model), there, there.labelled)[: len(there.label_rows)]
    else:
        found = rows_of_all(model, batch, layout, there)[there.label_rows]
    return found if placed is not None else found[: batch.targets]


def last_block_is_ready(model: nn.Module) -> bool:
    """Can its last block work on label rows alone? (`last_block.ready`)"""

    def run(tried: CausalLM, batch: Batch, by_rows: bool) -> Tensor:
        there = placing.place(batch, next(tried.parameters()).device)
        with computing(tried):
            found = _flat(tried, batch, None, there, there.labelled if by_rows else None)
        return found[: len(there.label_rows)] if by_rows else found[there.label_rows]

    return last_block.ready(model, run)


def loss_sum(model: nn.Module, batch: Batch, layout: Layout = "flat", below: Below | None = None) -> Tensor:
    """Sum of the cross-entropies of the batch's target tokens, each times its weight, float32."""
    inner, placed = causal_lm(model), place(model, batch, layout)
    with nullcontext() if below is None else below.through(model, batch, placed):
        hidden = label_hidden(model, batch, layout, placed)
    with computing(model):
        vocabulary, rows = inner.config.vocab_size, loss_rows(model)
        return label_loss(output_head(model), hidden, placed.labels, vocabulary, placed.weights, rows)


def training_step(
    model: nn.Module,
    micro_batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float,
    layout: Layout = "flat",
    scale: float = 1.0,
    objective: Objective = SFT,
) -> StepResult:
    """One optimizer step over some micro-batches.

    Args:
        model: in training mode.
        micro_batches: all rows of the step.
        optimizer: with its learning rate set.
        max_grad_norm: gradients are scaled down to this norm; 0: they are not.
        layout: how documents go through the model.
        scale: the loss is multiplied by it before the backward pass, and the gradients are divided by it after.
        objective: what is made small.

    Returns:
        Its figures. Where loss or gradient is not finite, nothing was applied.
    """
    # ---- training step -------------------------------------------------------------------------------------------
    made = make_gradients(model, micro_batches, layout, scale, objective)
    return apply_gradients(model, made, optimizer, max_grad_norm, scale)
    # --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """The first half of a step. total: the sum of its losses, a float64 scalar that is still on the model's device:
    nothing waits for it before the step's end. weight: what it is divided by. tokens, targets: of all rows. seen: what
    the rewards of preferences are made of, (10,) float64, where there are some."""

    total: Tensor
    weight: float
    tokens: int
    targets: int
    seen: Tensor | None = None

    @property
    def loss(self) -> float:
        """Per target token, or row; waits for the device."""
        return self.total.item() / self.weight


def first_sums(
    objective: Objective,
    model: nn.Module,
    batches: Iterable[Batch],
    layout: Layout,
    on_batch: Callable[[Batch], object] | None = None,
    idle: Iterable[Batch] = (),
) -> Tensor:
    """(first,), float64: what an objective must know of all these batches before the first loss. idle: go through the
    model for nothing."""
    sums = torch.zeros(objective.first, dtype=torch.float64, device=next(model.parameters()).device)
    with attention(model, FLAT if layout == "flat" else SDPA):
        for batch in batches:
            if on_batch is not None:
                on_batch(batch)
            sums = sums + objective.sums(model, batch, layout)
        for batch in idle:
            objective.sums(model, batch, layout)
    return sums


def make_gradients(
    model: nn.Module,
    micro_batches: Sequence[Batch],
    layout: Layout,
    scale: float = 1.0,
    objective: Objective = SFT,
    *,
    on_batch: Callable[[Batch], object] | None = None,
    weight: float | None = None,
    idle: Sequence[Batch] = (),
) -> Made:
    """The first half of a step: gradients of scale x the objective; no norm yet.

    Args:
        model, micro_batches, layout, scale, objective: as for `training_step`.
        on_batch: is called with each micro-batch before work on it begins.
        weight: of the whole step, where other processes have the rest of it; these may then be none.
        idle: go through the model for nothing, as often as other processes have more of the step.
    """
    if weight is None:
        weight = sum(batch.weight for batch in micro_batches)
    sums, seen = [], []
    with attention(model, FLAT if layout == "flat" else SDPA):  # once for all, not for each micro-batch
        if objective.first:
            objective = objective.of_step(first_sums(objective, model, micro_batches, layout, on_batch))
        for batch in micro_batches:
            if on_batch is not None:
                on_batch(batch)
            with attached.of(model).copies():  # the backward pass may go through blocks once more
                loss = objective.loss(model, batch, layout)
                (loss.total * (scale / weight)).backward()
            sums.append(loss.total.detach().double())
            seen += [] if loss.seen is None else [loss.seen]
        for batch in idle:
            (objective.loss(model, batch, layout).total * 0.0).backward()
    tokens, targets = sum(len(batch.ids) for batch in micro_batches), sum(batch.targets for batch in micro_batches)
    none = torch.zeros(objective.figures, dtype=torch.float64, device=next(model.parameters()).device)
    rewards = sum(seen[1:], seen[0]) if seen else none if objective.figures else None
    total = sum(sums[1:], sums[0]) if sums else none.new_zeros(())
    return Made(total, weight, tokens, targets, rewards)


class Parts(Protocol):
    """Has what is trained in parts, of which this process holds some (shards.py)."""

    def gradients(self) -> list[nn.Parameter]:
        """The optimizer's tensors, with their gradients."""

    def norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Of the gradients of all parts."""

    def drop(self) -> None:
        """Forget the gradients."""


def apply_gradients(
    model: nn.Module,
    made: Made,
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float,
    scale: float = 1.0,
    parts: Parts | None = None,
) -> StepResult:
    """The second half of a step: take off the scale, clip and update; or drop gradients that are not finite. Loss and
    norm are read together, the only time in a step that the CPU waits for a GPU. parts: where the model is in some."""
    parameters = list(trainable(model).values()) if parts is None else parts.gradients()
    if scale != 1:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.div_(scale)
    if isinstance(optimizer, InBackward):
        taken, _ = optimizer.taken()
        size = made.total.new_tensor(taken)
    elif parts is not None:
        size = parts.norm(parameters).to(made.total.device)
        torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm or float("inf"), size.float())
    else:
        size = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm or float("inf")).double()
    figures = [made.total[None], size[None], *([] if made.seen is None else [made.seen])]
    total, norm, *seen = (float(one) for one in torch.cat(figures).cpu())
    finite = math.isfinite(total) and math.isfinite(norm)
    rewards = rewards_of(seen) if seen else None
    done = StepResult(total / made.weight, norm, made.tokens, made.targets, finite, rewards)
    if finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if parts is not None:
        parts.drop()
    return done
