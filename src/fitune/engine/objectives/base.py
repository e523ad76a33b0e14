"""What preference objectives are made of: log-probabilities of answers, and losses and rewards as functions of them.

In: a batch of pairs, a model. Out: the loss of its rows, a function of nothing but the sums of log-probabilities of its
answers; and sums that the step's rewards are made of. The log-probabilities come from the chunked head
(`kernels/row_losses.py`), so no logits of a whole batch are held.

Shapes: L = label rows, A = answers of a batch, R = its rows: pairs (A = 2 R) or labelled answers (A = R).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fitune.core.options import Options
from fitune.core.records import Answers, Batch, Layout
from fitune.engine.rewards import FIGURES
from fitune.engine.step import Loss, label_hidden, place
from fitune.models.head import loss_rows, output_head
from fitune.models.interfaces import causal_lm
from fitune.models.kernels.loss import label_loss
from fitune.models.kernels.row_losses import row_losses
from fitune.models.switches import computing, evaluating


@dataclass(frozen=True)
class Scored:
    """Answers and their log-probabilities, all (A,), float32; of pairs the chosen and the rejected one in turn.

    policy: by the model that is trained. reference: by the one that it is compared with. tokens: of each answer.
    desirable: of labelled answers. kl: the distance to the reference, of labelled answers, a scalar.
    """

    policy: Tensor
    reference: Tensor
    tokens: Tensor
    desirable: Tensor | None = None
    kl: Tensor | None = None

    @property
    def ratios(self) -> Tensor:
        """(A,): log-ratios of the model to the reference."""
        return self.policy - self.reference

    @property
    def means(self) -> Tensor:
        """(A,): log-probabilities per token."""
        return self.policy / self.tokens


def margin(each: Tensor) -> Tensor:
    """(R,): what the chosen answers have above the rejected ones, of (A,)."""
    return each[0::2] - each[1::2]


@dataclass(frozen=True)
class Kind:
    """A preference objective: a row of the table in `__init__.py`.

    losses: (R,) of the scored answers. rewards: (A,) of them. reference: does it need one? distance: does it need that
    of the model to the reference, over a whole step?
    """

    name: str
    losses: Callable[[Scored, Any], Tensor]
    rewards: Callable[[Scored, Any], Tensor]
    reference: bool = True
    distance: bool = False


@dataclass(frozen=True)
class Preference:
    """An objective with its settings; `of_step` gives that of one step.

    kl: of a step with labelled answers, how far the model is from the reference on answers to other prompts.
    """

    kind: Kind
    options: Options
    kl: Tensor | None = None
    figures = len(FIGURES)

    @property
    def first(self) -> int:
        """The sum of log-ratios of answers to other prompts, and how many there are."""
        return 2 if self.kind.distance and self.kl is None else 0

    def sums(self, model: nn.Module, batch: Batch, layout: Layout) -> Tensor:
        """See `first`. They need no gradient, so they are known before the first one."""
        other = _answers(batch).mismatched
        assert other is not None, "a distance needs answers to other prompts"
        with evaluating(model):
            found = log_probabilities(model, other, layout)
        ratios = (found - _reference(other, found.device)).double()
        return torch.stack([ratios.sum(), torch.ones_like(ratios).sum()])

    def of_step(self, sums: Tensor) -> Preference:
        """The objective of the batches that have these sums together."""
        return replace(self, kl=(sums[0] / sums[1]).clamp(min=0).float())

    def loss(self, model: nn.Module, batch: Batch, layout: Layout) -> Loss:
        """The sum of the losses of a batch's rows, with a gradient, and what its rewards are made of."""
        scored, losses = self._rows(model, batch, layout)
        with torch.no_grad():
            seen = _seen(scored, self.kind.rewards(scored, self.options))
        return Loss(losses, seen)

    def of_equal(self, rows: int, desirable: Sequence[bool] | None = None) -> float:
        """The mean loss where model and reference give the same to `rows` answers of one token each."""
        zero = torch.zeros(rows if desirable is not None else 2 * rows)
        marks = None if desirable is None else torch.tensor(list(desirable))
        equal = Scored(zero, zero, torch.ones_like(zero), marks, torch.zeros(()))
        return float(self.kind.losses(equal, self.options).mean())

    def _rows(self, model: nn.Module, batch: Batch, layout: Layout) -> tuple[Scored, Tensor]:
        """The scored answers, and the sum of the rows' losses."""
        inner, placed, answers = causal_lm(model), place(model, batch, layout), _answers(batch)
        hidden = label_hidden(model, batch, layout, placed)
        head, vocabulary, rows = output_head(model), inner.config.vocab_size, loss_rows(model)
        counts = np.bincount(answers.of, minlength=len(answers.reference)).tolist()
        trained = any(weight.requires_grad for weight in head.parameters()) and torch.is_grad_enabled()
        with computing(model):
            each = row_losses(head, hidden.detach() if trained else hidden, placed.labels, vocabulary, rows)
        each = each[: len(answers.of)].requires_grad_(trained or each.requires_grad)
        scored = replace(_score(each, counts, answers), kl=self.kl)
        loss = self.kind.losses(scored, self.options).sum()
        if trained:  # the head needs the factor of each row for its own gradient, so it is computed once more
            (factors,) = torch.autograd.grad(loss, each)
            padded = factors.new_zeros(len(placed.labels))
            padded[: len(factors)] = factors
            with computing(model):
                weighted = label_loss(head, hidden, placed.labels, vocabulary, padded, rows)
            loss = loss.detach() + (weighted - weighted.detach())
        return scored, loss


@torch.no_grad()
def log_probabilities(model: nn.Module, batch: Batch, layout: Layout) -> Tensor:
    """(A,), float32: of each answer of a batch the sum over its tokens, by the model as it is."""
    inner, placed, answers = causal_lm(model), place(model, batch, layout), _answers(batch)
    hidden = label_hidden(model, batch, layout, placed)
    with computing(model):
        each = row_losses(output_head(model), hidden, placed.labels, inner.config.vocab_size, loss_rows(model))
    counts = np.bincount(answers.of, minlength=len(answers.reference)).tolist()
    return _score(each[: len(answers.of)], counts, answers).policy


def _answers(batch: Batch) -> Answers:
    assert batch.answers is not None, "a batch of samples has no preferences"
    return batch.answers


def _reference(batch: Batch, device: torch.device) -> Tensor:
    """(A,): the reference's log-probabilities."""
    return torch.from_numpy(_answers(batch).reference).to(device)


def _score(each: Tensor, counts: Sequence[int], answers: Answers) -> Scored:
    """The answers of a batch, from the losses of their label rows, (L,), which stand side by side."""
    policy = -torch.stack([part.sum() for part in each.split(list(counts))])
    tokens = torch.tensor(counts, dtype=torch.float32, device=policy.device)
    marks = None if answers.desirable is None else torch.from_numpy(answers.desirable).to(policy.device)
    return Scored(policy, torch.from_numpy(answers.reference).to(policy.device), tokens, marks)


# ---- rewards ----


def _seen(scored: Scored, rewards: Tensor) -> Tensor:
    """What a batch adds to the rewards of its step: (10,), float64, as `rewards.FIGURES` has them."""
    if scored.desirable is None:
        good = torch.arange(len(rewards), device=rewards.device) % 2 == 0
        right, compared = (margin(rewards) > 0).sum(), len(rewards) // 2
    else:
        good = scored.desirable
        right, compared = torch.where(good, rewards > 0, rewards < 0).sum(), len(rewards)
    kl = scored.ratios.sum() if scored.kl is None else scored.kl * len(rewards)
    sums = [one[side].sum() for one in (rewards, scored.policy) for side in (good, ~good)]
    counts = [good.sum(), (~good).sum()]
    sizes = [torch.tensor(float(n), device=rewards.device) for n in (len(rewards), compared)]
    return torch.stack([one.detach().double() for one in (*sums, right, kl, *counts, *sizes)])
