"""What the sample answers of a run take beside the weights: they are generated with the optimizer's states still there.

In: the config of a model, how many prompts are answered side by side. Out: bytes, by a closed form: how long an answer
becomes depends on values. Keys and values of every token stay until the end; a block's grow by a copy, one block of one
answer at a time. The prompts go through one after the other, in pieces, of which one block's work is there at once.
"""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from fitune.core.config import RunConfig
from fitune.core.records import Batch
from fitune.engine.forward import PIECE
from fitune.engine.generation import SIDE_BY_SIDE
from fitune.engine.trial import ROWS
from fitune.models import sizes
from fitune.models.kernels.cached import rooms
from fitune.models.precision import DTYPES


def widens() -> bool:
    """Does oneDNN make bf16 products in a float32 copy of the result on this CPU? It takes them with AVX512, and gives
    bf16 without a copy only with AVX512-BF16; with less than AVX512 torch makes them itself, without a copy."""
    return torch.cpu._is_avx512_supported() and not torch.cpu._is_avx512_bf16_supported()


def bytes_taken(config: RunConfig, model_config: PretrainedConfig, held_out: Batch, *, on_gpu: bool) -> int:
    """The most that they take; 0: nothing is answered.

    Args:
        config: resolved.
        model_config: the model's transformers config.
        held_out: rows whose longest stands for the longest prompt.
        on_gpu: a GPU answers, not this machine's CPU.
    """
    rows = min(config.sample_prompts, SIDE_BY_SIDE)
    if not rows:
        return 0
    prompt = int(held_out.lengths.max(initial=0))
    item, width = DTYPES[config.precision].itemsize, model_config.hidden_size
    each = 2 * sizes.key_width(model_config) * item  # of a token in a block
    inner = sizes.inner_width(model_config)
    blocks, whole = model_config.num_hidden_layers, prompt + config.sample_tokens - 1  # the last one goes nowhere
    piece = min(prompt, PIECE)
    norms = 8 * width if on_gpu and item < 4 else 0  # which compute in float32: on a GPU an allowance, not measured
    copy = 4 * inner if not on_gpu and config.precision == "bf16" and widens() else 0
    # gate, up and their product; or, of an up projection that has a float32 copy, the copy where the product comes
    mlp = 2 * inner * item + max(inner * item, copy)
    first = rows * blocks * each * rooms(prompt) + piece * (4 * width * item + mlp + norms)
    last = (rows * blocks + 1) * each * rooms(whole) + ROWS * model_config.vocab_size * item
    return int(max(first, last))
