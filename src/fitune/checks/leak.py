"""How documents go through the model without seeing each other: the leak probe.

In: a model with its method attached, samples. Out: the layout that keeps documents apart, and a Finding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig

from fitune.core.errors import ModelError
from fitune.core.records import Finding, Layout, Sample
from fitune.data.batches import flat
from fitune.data.pairs import Pairs
from fitune.data.store import lengths_of
from fitune.engine.out_of_memory import is_out_of_memory
from fitune.engine.step import hidden_states, label_hidden
from fitune.models.attached import compute_dtype
from fitune.models.head import output_head
from fitune.models.interfaces import causal_lm
from fitune.models.kernels import short
from fitune.models.parts import trainable
from fitune.models.switches import computing, evaluating, rows_attention
from fitune.models.tensors import here

PROBE_TOKENS = 48  # length of the documents that models are checked with
MOVED = 1e-3  # relative to the largest logit: so much may a change of one document change another, in any precision
TOLERANCE = {
    torch.float32: 1e-3,
    torch.bfloat16: 5e-2,
    torch.float16: 1e-2,
}  # between ways to compute; in float32 the table's are at 1e-6
LAYOUTS: tuple[Layout, ...] = ("flat", "padded", "documents")


@torch.no_grad()
def packing_leak(model: nn.Module, samples: Sequence[Sample], wanted: str = "auto") -> tuple[Layout, Finding]:
    """Which layout keeps documents apart: the leak probe, on the model itself.

    Two documents go through the model together. Their logits must be those that transformers' own forward gives each of
    them alone, and those of the second must not move when the first one is changed. Models with recurrent or linear
    attention layers leak in a flat batch; they run padded, with rows of like length together, or one by one.

    Args:
        model: with its method attached.
        samples: the first two are used, shortened.
        wanted: auto takes the first layout that passes; a layout given by name is refused if it does not.
    """
    with evaluating(model), perturbed(model):
        return _first_that_passes(model, samples, wanted)


@torch.no_grad()
def shared_prompt(model: nn.Module, pairs: Pairs) -> Finding:
    """A prompt that stands once for both answers of a pair gives each of them what a prompt of its own gives it.

    A pair goes through the model both ways, and the logits of its labels are compared. A model whose layers carry
    something past attention from token to token differs; there each answer gets a prompt of its own.

    Args:
        model: with its method attached; its layout is flat.
        pairs: one of them is used, shortened.
    """
    assert pairs.common is not None
    some = np.flatnonzero(pairs.common)
    if not len(some):
        return Finding("shared-prompt", "ok", "no pair has a prompt that is the same for both answers")
    depends = _depends_on_length(causal_lm(model).config)
    pair = pairs[int(some[lengths_of(pairs)[some].argmax()] if depends else some[0])]
    half, starts = PROBE_TOKENS // 2, pair.common + 1
    first = 0 if depends else max(0, starts - half)
    sides = [
        side.part(slice(first, None if depends else starts + half)) for side in (pair.chosen, pair.rejected)
    ]  # the prompt's end, and how each answer begins
    with evaluating(model), perturbed(model), short.in_16_bits():
        try:
            apart, once = (_pair_logits(model, sides, count) for count in (0, pair.common - first))
        except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError, ModelError) as error:
            if is_out_of_memory(error):
                raise
            return Finding("shared-prompt", "fixed", "the model cannot do it: each answer gets a prompt of its own")
    difference = float((apart - once).abs().max()) / max(float(apart.abs().max()), 1e-6)
    text = f"logits of answers are {difference:.1e} from those behind a prompt of their own"
    if not difference <= TOLERANCE[compute_dtype(model)]:
        return Finding("shared-prompt", "fixed", f"{text}: each answer gets one of its own")
    return Finding("shared-prompt", "ok", f"{text}; {int(pairs.common.sum()):,} tokens of prompts stand once")


def _pair_logits(model: nn.Module, sides: Sequence[Sample], common: int) -> torch.Tensor:
    """(L, V), of the labels of both answers, so many first tokens once."""
    batch = flat(Pairs(sides, common=np.array([common], np.int32)), [0])
    hidden = label_hidden(model, batch)
    with computing(model):
        logits: torch.Tensor = output_head(model)(hidden)
    return logits.float()


@contextmanager
def perturbed(model: nn.Module) -> Iterator[None]:
    """Inside, trainable tensors that are all zero have other values: what they will let through later is seen now. Of a
    model in shards each process looks at its own."""
    zero = [mine for p in trainable(model).values() if not bool((mine := here(p)).any())]
    generator = torch.Generator(device="cpu").manual_seed(0)
    for parameter in zero:
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    try:
        yield
    finally:
        for parameter in zero:
            parameter.zero_()


def _first_that_passes(model: nn.Module, samples: Sequence[Sample], wanted: str) -> tuple[Layout, Finding]:
    measured: dict[Layout, Leak] = {}
    for layout in LAYOUTS if wanted == "auto" else (cast(Layout, wanted),):
        measured[layout] = _leak(model, samples, layout)
        if measured[layout].passes:
            return layout, _leak_finding(layout, measured)
    text = ", ".join(f"{layout} {leak}" for layout, leak in measured.items())
    if all(math.isnan(leak.difference) for leak in measured.values()):
        text = "the model gives NaN before anything is trained: its weights, or --precision fp16, reach too far"
        return "documents", Finding("packing-leak", "refuse", text)
    return "documents", Finding("packing-leak", "refuse", f"documents of a batch see each other: {text}")


@dataclass(frozen=True)
class Leak:
    """How far a layout is from separate documents, and how much one document changes another; relative to the largest
    logit."""

    difference: float
    moved: float
    allowed: float

    @property
    def passes(self) -> bool:
        """Documents do not see each other."""
        return self.difference <= self.allowed and self.moved <= MOVED

    def __str__(self) -> str:
        return f"{self.difference:.1e} from separate documents, {self.moved:.1e} moved by another one"


def _leak_finding(layout: Layout, measured: Mapping[Layout, Leak]) -> Finding:
    if len(measured) == 1:
        return Finding("packing-leak", "ok", f"{layout} batches: {measured[layout]}")
    leaking = ", ".join(f"{name} leaks ({leak})" for name, leak in measured.items() if not leak.passes)
    return Finding("packing-leak", "fixed", f"{leaking}; running {layout}: {measured[layout]}")


def _leak(model: nn.Module, samples: Sequence[Sample], layout: Layout) -> Leak:
    """Infinity where the model cannot run in this layout at all."""
    inner = causal_lm(model)
    first, second = _probes(samples, inner.config)
    other = replace(first, ids=first.ids[::-1].copy())  # another first document of the same length
    head = output_head(model)

    def together(start: Sample) -> torch.Tensor:
        with short.in_16_bits():  # like with like: both ways round as often
            hidden = hidden_states(model, flat([start, second], [0, 1]), layout)
        with computing(model):
            logits: torch.Tensor = head(hidden)
        return logits.float()

    try:
        packed, changed = together(first), together(other)
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError, ModelError):
        return Leak(float("inf"), float("inf"), 0.0)
    device = packed.device
    # the outer model's own forward: PEFT puts virtual tokens there, and their logits come first
    with rows_attention(model), computing(model):
        alone = [
            model(input_ids=torch.from_numpy(s.ids)[None].long().to(device)).logits[0, -len(s) :].float()
            for s in (first, second)
        ]
    expected = torch.cat(alone)
    scale = max(float(expected.abs().max()), 1e-6)
    difference = float((packed - expected).abs().max()) / scale
    moved = float((packed[len(first) :] - changed[len(first) :]).abs().max()) / scale
    return Leak(difference, moved, TOLERANCE[compute_dtype(model)])


def _probes(samples: Sequence[Sample], config: PretrainedConfig) -> tuple[Sample, Sample]:
    """Two documents. Where something depends on their length (windows, chunks, rope that changes with it), the longest
    and the shortest as they are; else any two, shortened."""
    if not _depends_on_length(config):
        return _shortened(samples[0]), _shortened(samples[1 % len(samples)])
    lengths = lengths_of(samples)
    return samples[int(lengths.argmax())], samples[int(lengths.argmin())]


def _depends_on_length(config: PretrainedConfig) -> bool:
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = {rope.get("rope_type")} | {v.get("rope_type") for v in rope.values() if isinstance(v, dict)}
    return bool(
        getattr(config, "sliding_window", None)
        or getattr(config, "attention_chunk_size", None)
        or kinds & {"dynamic", "longrope"}
    )


def _shortened(sample: Sample) -> Sample:
    return Sample(sample.ids[-PROBE_TOKENS:], sample.mask[-PROBE_TOKENS:], sample.source)
