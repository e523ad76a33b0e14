"""Rules about preferences: each a function named as in the report.

In: a model with its method, a batch of preferences, an objective. Out: Findings.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fitune.core.records import Batch, Finding, Layout
from fitune.data.batches import flat
from fitune.data.pairs import Pairs
from fitune.data.store import trained_of
from fitune.engine.held_out import held_out
from fitune.engine.objectives.base import Preference, log_probabilities
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


PROBES, STOPS = 32, 4  # pairs that are looked at where nobody computed their log-probabilities; and for their ends
SWAPPED = 0.35  # share of the pairs whose chosen answer is the likelier one, below which columns are suspected
SIGMAS = 3.0  # how far chance alone may be from one half


def swapped_answers(means: NDArray[np.floating]) -> Finding:
    """A model finds chosen answers about as likely as rejected ones, one that was tuned likelier: where it finds nearly
    all of them less likely, the columns are the wrong way round.

    Args:
        means: (R, 2), log-probabilities per token of each pair's answers, by the model before training.
    """
    means = means[means[:, 0] != means[:, 1]]  # one answer twice says nothing
    count = len(means)
    if not count:
        return Finding("swapped-answers", "ok", "no pair has two answers that differ")
    share = float((means[:, 0] > means[:, 1]).mean())
    text = f"before training the chosen answer is the likelier one, per token, in {share:.0%} of {count:,} pairs"
    if share < min(SWAPPED, 0.5 - SIGMAS * 0.5 / count**0.5):
        fix = "if the columns are the wrong way round: --map chosen=rejected rejected=chosen"
        return Finding("swapped-answers", "warn", f"{text}: are chosen and rejected swapped?", fix)
    return Finding("swapped-answers", "ok", text)


def means_of(model: nn.Module, pairs: Pairs, layout: Layout, rows: int) -> NDArray[np.floating]:
    """(R, 2): log-probabilities per token of the answers of pairs: those of the reference where they are known, else of
    the first pairs by the model as it is, so many rows at a time."""
    tokens = trained_of(pairs.samples).reshape(-1, 2)
    if pairs.reference is not None:
        known = ~np.isnan(pairs.reference[:, 0])
        return pairs.reference[known] / tokens[known]
    count = min(PROBES, len(pairs))
    with evaluating(model):
        batches = (flat(pairs, range(start, min(start + rows, count))) for start in range(0, count, rows))
        sums = [log_probabilities(model, batch, layout).cpu().numpy() for batch in batches]
    means: NDArray[np.floating] = np.concatenate(sums).reshape(-1, 2) / tokens[:count]
    return means


@torch.no_grad()
def template_seen(model: nn.Module, pairs: Pairs, layout: Layout, vocabulary: int) -> Finding:
    """The base model has seen the template: it gives the token that ends an answer more than chance does. Preferences
    between texts of a frame that is new to it teach the frame first, ORPO's odds of whole answers above all.

    Args:
        model: before training.
        pairs: of the run; the first ones are used.
        layout: how documents go through the model.
        vocabulary: tokens that chance would choose among.
    """
    samples = [sample for pair in pairs[:STOPS] for sample in (pair.chosen, pair.rejected)]
    ends = [replace(sample, mask=np.arange(len(sample)) == len(sample) - 1) for sample in samples]
    whole = np.array([sample.ends_whole for sample in samples])
    if not whole.any():
        return Finding("template-seen", "ok", "no answer is whole, so none has the token that ends it")
    with evaluating(model):
        logs = log_probabilities(model, flat(Pairs(ends), range(len(ends) // 2)), layout).cpu().numpy()[whole]
    found, chance = float(np.exp(logs.mean())), 1 / vocabulary
    text = f"the token that ends an answer has a probability of {found:.1e} (chance: {chance:.1e})"
    if found < chance:
        fix = "tune on answers first: --objective sft, then --adapter RUN; or a model that was tuned with this template"
        return Finding("template-seen", "warn", f"{text}: the base model never saw this template", fix)
    return Finding("template-seen", "ok", text)
