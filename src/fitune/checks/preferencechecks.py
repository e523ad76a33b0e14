"""Rules about preferences: each a function named as in the report.

In: a model with its method, a batch of preferences, an objective. Out: Findings.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from fitune.core.records import Batch, Finding, Layout
from fitune.engine.objectives.base import Preference, log_probabilities
from fitune.engine.step import held_out
from fitune.models.attached import compute_dtype
from fitune.models.switches import evaluating

# per token of an answer, by which model and reference may differ though they are the same: rows meet others in a batch,
# so products have other sizes
APART = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def preference_start(model: nn.Module, batch: Batch, layout: Layout, objective: Preference, *, same: bool) -> Finding:
    """Before the first step the model is its reference: the loss of the first rows is that of equal log-probabilities
    (DPO: log 2), and all rewards are 0.

    Args:
        model: with its method attached.
        batch: of the first step, with the reference's log-probabilities.
        layout: how documents go through the model.
        objective: of the run.
        same: the method changes nothing before the first step.
    """
    answers = batch.answers
    assert answers is not None
    found = held_out(model, [batch], layout, objective)
    text = f"the loss of the first {len(batch.rows)} rows is {found.loss:.6f}"
    if not objective.kind.reference:
        return Finding("preference-start", "ok", f"{text}; {objective.kind.name} has no reference")
    marks = None if answers.desirable is None else answers.desirable.tolist()
    text += f", that of the reference itself {objective.of_equal(len(batch.rows), marks):.6f}"
    if not same:
        return Finding("preference-start", "ok", f"{text}: the method changes the model at once")
    with evaluating(model):
        here = log_probabilities(model, batch, layout).cpu().numpy()
    apart = float((np.abs(here - answers.reference) / np.bincount(answers.of)).max())
    text += f"; log-probabilities of the answers are {apart:.1e} a token from the reference's"
    if not apart <= APART[compute_dtype(model)]:
        fix = "--cache none computes the reference anew; if it stays so, this is an error of fitune: please report it"
        return Finding("preference-start", "refuse", text, fix)
    return Finding("preference-start", "ok", text)
