"""One optimizer step, and the held-out loss.

In: a model, the micro-batches of a step. Out: the loss per target token of the whole step, and the gradient norm.
The objective is sum(loss) / number of target tokens of the step, so that accumulation, the number of rows in a
micro-batch and their lengths never change it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fitune.errors import TrainingError
from fitune.kernels.attention import FLAT
from fitune.kernels.loss import label_loss
from fitune.model import causal_lm, trainable, use_attention
from fitune.records import Batch


@dataclass(frozen=True)
class StepResult:
    """loss: per target token. grad_norm: before clipping. tokens, targets: of the whole step."""

    loss: float
    grad_norm: float
    tokens: int
    targets: int


def label_hidden(model: Any, batch: Batch) -> Tensor:
    """(L, W): the last hidden states of the rows that carry a label. The rest never reaches the head."""
    use_attention(model, FLAT)
    inner = causal_lm(model)
    device = next(inner.parameters()).device
    hidden: Tensor = inner.base_model(
        input_ids=torch.from_numpy(batch.ids)[None].to(device),
        position_ids=torch.from_numpy(batch.positions)[None].to(device),
        cu_seq_lens_q=torch.from_numpy(batch.bounds),
        use_cache=False,
    ).last_hidden_state
    return hidden[0, torch.from_numpy(batch.label_rows).to(device)]


def loss_sum(model: Any, batch: Batch) -> Tensor:
    """Sum of the cross-entropies of the batch's target tokens, float32."""
    inner = causal_lm(model)
    hidden = label_hidden(model, batch)
    labels = torch.from_numpy(batch.labels).to(hidden.device)
    return label_loss(inner.get_output_embeddings(), hidden, labels, inner.config.vocab_size)


def training_step(
    model: Any, micro_batches: Sequence[Batch], optimizer: torch.optim.Optimizer, max_grad_norm: float
) -> StepResult:
    """One optimizer step over some micro-batches.

    Args:
        model: in training mode.
        micro_batches: all rows of the step.
        optimizer: with its learning rate set.
        max_grad_norm: gradients are scaled down to this norm.

    Raises:
        TrainingError: the loss or the gradient is not finite; the step is not applied.
    """
    # ---- training step -------------------------------------------------------------------------------------------
    targets = sum(batch.targets for batch in micro_batches)
    total = 0.0
    for batch in micro_batches:
        loss = loss_sum(model, batch)
        (loss / targets).backward()
        total += loss.item()
    parameters = trainable(model)
    norm = torch.nn.utils.clip_grad_norm_(parameters.values(), max_grad_norm).item()
    mean = total / targets
    if not (torch.isfinite(torch.tensor([mean, norm])).all()):
        optimizer.zero_grad(set_to_none=True)
        raise TrainingError(
            "the loss or the gradient is not finite; the step was not applied",
            received=f"loss {mean}, gradient norm {norm}, rows {[row for b in micro_batches for row in b.rows][:16]}",
            fix="a lower --lr; the last checkpoint is good",
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    # --------------------------------------------------------------------------------------------------------------
    return StepResult(mean, norm, sum(len(batch.ids) for batch in micro_batches), targets)


@torch.no_grad()
def held_out_loss(model: Any, batches: Iterable[Batch]) -> float:
    """Loss per target token over held-out batches; the model's mode is left as it was."""
    training = model.training
    model.eval()
    total, targets = 0.0, 0
    for batch in batches:
        total += loss_sum(model, batch).item()
        targets += batch.targets
    model.train(training)
    return total / targets
