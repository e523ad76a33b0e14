"""Memory by closed forms: the explanation of a plan, its cross-check, and what is left where a trace fails.

In: a model on meta with its method, the tokens of the largest micro-batch. Out: bytes by category. Weights, gradients
and optimizer states are exact. Activations: what a gated transformer block keeps of each token, counted in widths: W of
the model, Q of all query heads, K of all key heads, M of the MLP.

    two norms keep their inputs            2 W
    attention keeps q, k, v, its output    2 Q + 2 K      (and 4 bytes for each head)
    an MLP keeps gate and up               2 M            (where it is not gated, its inner layer twice)
    inputs of trained linear layers        W in front of q, k, v and of gate and up, M in front of down

each in the dtype of the computation, in blocks at or above the first trained parameter. A block that is recomputed
keeps its input (W), and all of it in its own backward pass, when nothing is left of those above it; one that waits in
main memory keeps nothing. Logits go in chunks of rows: their
log-softmax in float32, which becomes their gradient, and one of both in the dtype of the computation. On a CUDA GPU
their gradient is written over them, and nothing is there beside them.
"""

from __future__ import annotations

import re

from torch import nn
from transformers import PretrainedConfig

from fitune.core.blocks import chosen
from fitune.core.config import RunConfig
from fitune.engine import optim
from fitune.memory import storage
from fitune.models import families, quant, sizes
from fitune.models.head import loss_rows
from fitune.models.interfaces import causal_lm
from fitune.models.kernels import fused
from fitune.models.kernels.loss import at_once
from fitune.models.kernels.target import CPU, Target, planned
from fitune.models.parts import first_trained, trainable
from fitune.models.precision import DTYPES


def closed(model: nn.Module, config: RunConfig, tokens: int, labels: int, where: Target = CPU) -> dict[str, int]:
    """Bytes by category (storage.CATEGORIES).

    Args:
        model: with its method, on meta or real.
        config: resolved.
        tokens: of the largest micro-batch.
        labels: of them those with a label.
        where: it runs.
    """
    trained = trainable(model)
    size = DTYPES[config.trainable_dtype].itemsize
    count = sum(p.numel() for p in trained.values())
    frozen = {id(p): p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad}
    constants = sum(t.numel() * t.element_size() for _, layer in quant.packed(model) for t in quant.constants(layer))
    model_config = causal_lm(model).config
    found = {
        storage.WEIGHTS: sum(frozen.values()),
        storage.CONSTANTS: constants,
        storage.TRAINABLE: count * size,
        storage.GRADIENTS: count * size,
        storage.STATES: int(count * state_bytes(config)),
        storage.ACTIVATIONS: tokens * _per_token(model, config, model_config, apart=where.kind == "cuda"),
        storage.LOSS: _logits(model, config, labels, where) + 8 * labels * model_config.hidden_size,
    }
    return {name: int(value) for name, value in found.items() if value}


def _logits(model: nn.Module, config: RunConfig, labels: int, where: Target) -> int:
    """Bytes of the logits that are there at once, and of what they become."""
    inner, item = causal_lm(model), DTYPES[config.precision].itemsize
    head, rows, vocabulary = inner.get_output_embeddings(), min(labels, loss_rows(model)), inner.config.vocab_size
    if where.kind == "cpu" and not any(p.requires_grad for p in head.parameters()):
        return at_once(rows, vocabulary, where) * (4 if item == 4 else 4 + item)
    with planned(where):
        wide = 0 if fused.refusal(where) is None else 4
    return (wide + item) * rows * int(vocabulary)


def state_bytes(config: RunConfig) -> float:
    """Bytes that the optimizer keeps of a trained parameter; states of 8 bits are that in every dtype."""
    kind = optim.find(config.optimizer)
    return kind.state_bytes * (1 if "8bit" in kind.name else DTYPES[config.trainable_dtype].itemsize / 4)


def _per_token(model: nn.Module, config: RunConfig, model_config: PretrainedConfig, *, apart: bool) -> float:
    """Bytes that the backward pass keeps of a token in all blocks, at most. apart: main memory is another memory."""
    item = DTYPES[config.precision].itemsize
    family = families.of(causal_lm(model))
    blocks = list(family.block_list(causal_lm(model)))
    width = model_config.hidden_size
    whole = [_block(block, model_config) for block in blocks]
    again, away = chosen(config.checkpointing, len(blocks)), chosen(config.offload if apart else False, len(blocks))
    most = below = 0.0
    for number in range(first_trained(model), len(blocks)):
        most = max(most, below + whole[number])
        below += 0 if number in away else width if number in again else whole[number]
    return item * max(most, below)


def _block(block: nn.Module, model_config: PretrainedConfig) -> float:
    """Numbers that a block keeps of a token."""
    width = model_config.hidden_size
    inner, heads = sizes.inner_width(model_config), sizes.heads(model_config)
    queries = heads * sizes.head_width(model_config)
    kept = 2 * width + 2 * queries + 2 * sizes.key_width(model_config) + 2 * inner + 2 * heads
    trained = [name for name, p in block.named_parameters() if p.requires_grad]
    attention = any(re.search(r"q_proj|k_proj|v_proj|query|c_attn|qkv", name) for name in trained)
    output = any(re.search(r"down_proj|fc2|dense_4h|c_proj", name) for name in trained)
    into = any(re.search(r"gate|up_proj|fc1|dense_h_to_4h|c_fc", name) for name in trained)
    return float(kept + width * (attention + into) + inner * output)
