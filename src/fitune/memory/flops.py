"""Work of a run in floating-point operations, and what time that takes.

In: a model with its method (no weights needed), the lengths of the rows. Out: operations for each real token, forward
and backward, of the work that fitune does: what no trainable parameter needs is not done.

With P the linear weights of the body, H those of the output head, rho the share of tokens that carry a label, A causal
attention forward (2 x the mean length that a token sees x width of the heads x layers), f the share of the body at or
above the first trained parameter, T the base's own weights that are trained, R what is new:

    forward   2 (P + rho H) + A          backward   f (2 P + 2 A) + 2 rho H + 2 T + 4 R + 2 R forward
    with a share c of the blocks recomputed, of those that the backward pass goes through, c (2 P + A + 2 R)
    more

so full tuning is 6 (P + rho H) + 3 A, LoRA 4 (P + rho H) + 6 R + 3 A. Where the last block works on label rows alone
(kernels/last_block.py), the part of P, T and R that is in its layers, but for those of keys and values, counts rho
times; A is left as it is, since rows with labels come last and see the most keys.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor, nn

from fitune.core.blocks import Blocks, chosen
from fitune.core.config import RunConfig
from fitune.models import attached, families, quant, sizes
from fitune.models.interfaces import CausalLM, causal_lm
from fitune.models.kernels.last_block import layers
from fitune.models.methods.base import is_linear
from fitune.models.parts import first_trained, trainable

# The share of its rate that a GPU reaches while it tunes: published runs lie between 27 and 57 % (torchtune on RTX 4090
# 56 %, A100 34 to 57 %, Unsloth QLoRA 27 %, NeMo AutoModel on H100 42 %)
REACHED, REACHED_QUANTIZED = 0.4, 0.3
REACHED_CPU = 0.7  # of a measured product; the rest is attention, norms and the loss


@dataclass(frozen=True)
class Counts:
    """What a model is made of, in weights. attention: width of all heads x layers; blocks: how many; share: f of the
    module's text; inside: what is new in the blocks; ..._by_rows: of body, trained_base and new what works on label
    rows alone."""

    body: float
    head: float
    attention: float
    blocks: float
    share: float
    trained_base: float
    trained_head: float
    new: float
    inside: float
    trainable: float
    total: float
    body_by_rows: float
    trained_by_rows: float
    new_by_rows: float


def counts(model: nn.Module, config: RunConfig) -> Counts:
    """Of a model with its method on it."""
    inner = causal_lm(model)
    family = families.of(inner)
    head = inner.get_output_embeddings()
    linear = {
        id(module.weight): quant.numel(module.weight)
        for name, module in inner.named_modules()
        if is_linear(module) and module is not head and family.blocks in name and not NEW.search(name)
    }
    new = _new(model)
    model_config = inner.config
    heads = sizes.heads(model_config) * sizes.head_width(model_config)
    trained = trainable(model)
    matrices = {id(p): float(p.numel()) for p in new.values() if p.ndim == 2}
    last = _by_rows(inner, family)
    trains = {id(p): linear[id(p)] for p in trained.values() if id(p) in linear}
    blocks = len(family.block_list(inner))
    return Counts(
        body=float(sum(linear.values())),
        head=float(model_config.vocab_size * model_config.hidden_size),
        attention=float(heads * blocks),
        blocks=float(blocks),
        share=(blocks - first_trained(model)) / max(1, blocks),
        trained_base=float(sum(trains.values())),
        trained_head=float(model_config.vocab_size * model_config.hidden_size if head.weight.requires_grad else 0),
        new=sum(matrices.values()),
        inside=float(sum(p.numel() for name, p in new.items() if p.ndim == 2 and f"{family.blocks}." in name)),
        trainable=float(sum(p.numel() for p in trained.values())),
        total=float(sum(quant.numel(p) for p in model.parameters())),
        body_by_rows=float(sum(size for key, size in linear.items() if key in last)),
        trained_by_rows=float(sum(size for key, size in trains.items() if key in last)),
        new_by_rows=sum(size for key, size in matrices.items() if key in last),
    )


def _by_rows(inner: CausalLM, family: families.Family) -> set[int]:
    """The parameters of the last block that work on label rows alone, by their ids."""
    block = family.block_list(inner)[-1]
    given = layers(block, family)
    if attached.of(inner).label_rows in (None, "no") or given is None:
        return set()
    others = {id(p) for layer in (given[1:] or given) for p in layer.parameters()}
    return {id(p) for p in block.parameters()} - others


NEW = re.compile(r"lora_|adapter|prompt_encoder|mlp_tail|vera_|hada_|ia3_")


def _new(model: nn.Module) -> dict[str, Tensor]:
    """Trained parameters that the base does not have."""
    return {name: p for name, p in trainable(model).items() if NEW.search(name)}


def recomputed(found: Counts, checkpointing: Blocks) -> int:
    """How many blocks a setting recomputes: of those that it means, the ones that the backward pass goes through."""
    blocks = round(found.blocks)
    first = blocks - round(found.share * blocks)
    return sum(number >= first for number in chosen(checkpointing, blocks))


def per_token(found: Counts, lengths: ArrayLike, labelled: float, *, checkpointing: Blocks = False) -> float:
    """Operations for a real token of an epoch; see the module's text.

    Args:
        found: the model's.
        lengths: of the rows, in tokens.
        labelled: share of tokens that carry a label.
        checkpointing: as in the config; none of it is left to a plan.
    """
    sizes = np.asarray(lengths, dtype=np.float64)
    attention = 2 * float((sizes**2).sum() / sizes.sum()) * found.attention
    others = 1 - labelled
    body = found.body - others * found.body_by_rows
    trained, new = found.trained_base - others * found.trained_by_rows, found.new - others * found.new_by_rows
    through = found.share * found.body - (others * found.body_by_rows if found.share else 0.0)  # on the way back
    part = recomputed(found, checkpointing) / max(1.0, found.blocks)
    again = part * (2 * (found.body + found.inside) + attention)
    if found.share and round(found.blocks) - 1 in chosen(checkpointing, round(found.blocks)):
        again -= 2 * others * (found.body_by_rows + found.new_by_rows)
    forward = 2 * (body + labelled * found.head) + attention + 2 * new
    backward = 2 * (through + found.share * attention) + 2 * labelled * (found.head + found.trained_head)
    return forward + backward + 2 * trained + 4 * new + again


def later(found: Counts, lengths: ArrayLike, labelled: float, below: int, *, checkpointing: Blocks = False) -> float:
    """Operations of a later epoch as a share of those of the first one, where what the lowest blocks give is kept.

    Args:
        found, lengths, labelled, checkpointing: as for `per_token`.
        below: how many blocks do not run again; none of them works on label rows alone, or is gone through backward.
    """
    sizes = np.asarray(lengths, dtype=np.float64)
    part = below / max(1.0, found.blocks)
    attention = 2 * float((sizes**2).sum() / sizes.sum()) * found.attention
    whole = per_token(found, lengths, labelled, checkpointing=checkpointing)
    return (whole - part * (2 * found.body + attention)) / whole


def seconds(operations: float, tflops: float | None, *, quantized: bool, cpu: bool) -> float | None:
    """Time for so many operations on a device of that rate; None: nobody knows its rate."""
    if not tflops:
        return None
    reached = REACHED_CPU if cpu else REACHED_QUANTIZED if quantized else REACHED
    return operations / (tflops * 1e12 * reached)


def saturating_tokens(tflops: float | None, bandwidth: float | None, bytes_per_weight: float) -> int | None:
    """Tokens of a micro-batch at which products take longer than reading the weights, with room: beyond it, throughput
    hardly grows. A product does 2 operations for each weight and token."""
    if not tflops or not bandwidth:
        return None
    return int(4 * tflops * 1e12 / bandwidth * bytes_per_weight / 2)
