"""A trial step of a model's sizes, with LoRA, forward and backward, timed in a precision.

In: a model's transformers config. Out: tokens a second. A matrix product alone does not show what a small model gains
from 16 bits on a CPU: casts, norms, rotary positions and attention gain little or nothing, and every number of tokens
that comes for the first time compiles kernels. So a block is what a run makes of one: the same attention, norm, gated
MLP and loss. The time of a step is that of a block times their number, and that of the head, timed on a part of the
vocabulary; the least of some passes, since others may be at work on the machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from fitune.models.kernels.attention import flat_attention
from fitune.models.kernels.gated import lean_mlps
from fitune.models.kernels.loss import label_loss
from fitune.models.kernels.norm import replace_norms

TOKENS = (192, 228, 240)  # of a pass; the first is not timed
PASSES = (
    3  # with each number; the first compiles kernels, which a run does once for each of few sizes (data/batches.py)
)
DOCUMENT, LABELLED = 64, 2  # tokens of one; every second token carries a label
BLOCKS, RANK = 2, 8
MOST_ROWS = 2**13  # of the head: its time grows with them, so more of them show nothing new


@dataclass(frozen=True)
class Widths:
    """Sizes of a model: numbers of a token in its stream and in its MLP, blocks, tokens of the vocabulary."""

    width: int
    inner: int
    blocks: int = BLOCKS
    vocabulary: int = 1

    @property
    def name(self) -> str:
        """For a key."""
        return f"{self.width}x{self.inner}x{self.blocks}-{self.vocabulary}"


def widths(model_config: object) -> Widths | None:
    """Sizes of a model by its transformers config; None: the config does not give them."""
    inner_config = getattr(model_config, "text_config", None) or model_config
    width, blocks, vocabulary = (
        getattr(inner_config, name, None) for name in ("hidden_size", "num_hidden_layers", "vocab_size")
    )
    if not (isinstance(width, int) and isinstance(blocks, int) and isinstance(vocabulary, int)):
        return None
    names = ("intermediate_size", "n_inner", "ffn_dim", "inner_hidden_size", "ffn_hidden_size")
    inner = next((value for name in names if isinstance(value := getattr(inner_config, name, None), int)), 4 * width)
    return Widths(width, inner, blocks, vocabulary)


def tokens_per_second(size: Widths, dtype: torch.dtype) -> float:
    """Of a forward and a backward pass on the CPU, weights frozen in that dtype, LoRA in float32."""
    state = torch.get_rng_state()
    blocks, rows = [_Block(size, dtype) for _ in range(BLOCKS)], min(size.vocabulary, MOST_ROWS)
    head = nn.Linear(size.width, rows, bias=False, dtype=dtype).requires_grad_(False)
    torch.set_rng_state(state)
    inside = outside = 0.0
    for count in TOKENS:
        autocast = torch.autocast("cpu", dtype) if dtype != torch.float32 else nullcontext()
        x, positions = torch.ones(count, size.width, dtype=dtype), torch.arange(count) % DOCUMENT
        with autocast:
            spent = _seconds(partial(_through, blocks, x, positions))
            loss = _seconds(partial(_loss, head, x[::LABELLED].requires_grad_()))
        if count != TOKENS[0]:
            inside, outside = inside + spent, outside + loss
    whole = inside * size.blocks / BLOCKS + outside * size.vocabulary / rows
    return sum(TOKENS[1:]) / whole


def _seconds(work: Callable[[], Tensor]) -> float:
    found = []
    for _ in range(PASSES):
        began = time.perf_counter()
        work().backward()
        found.append(time.perf_counter() - began)
    return min(found[1:])


def _through(blocks: list[_Block], x: Tensor, positions: Tensor) -> Tensor:
    for block in blocks:
        x = block(x, positions)
    return x.float().square().mean()


def _loss(head: nn.Linear, hidden: Tensor) -> Tensor:
    labels = torch.arange(len(hidden)) % head.out_features
    return label_loss(head, hidden, labels, head.out_features, None, len(hidden))


class _Block(nn.Module):
    """(T, W) to (T, W), with LoRA on queries and values."""

    def __init__(self, size: Widths, dtype: torch.dtype) -> None:
        super().__init__()
        w = size.width
        self.heads = next(count for count in range(max(1, w // 64), 0, -1) if w % count == 0 and w // count % 2 == 0)
        config = LlamaConfig(hidden_size=w, intermediate_size=size.inner, num_attention_heads=self.heads)
        self.before, self.behind, self.mlp = LlamaRMSNorm(w), LlamaRMSNorm(w), LlamaMLP(config)
        self.q, self.k, self.v, self.o = (nn.Linear(w, w, bias=False) for _ in range(4))
        self.to(dtype).requires_grad_(False)
        self.lora = nn.ParameterList(torch.randn(shape).mul_(0.01) for shape in ((RANK, w), (w, RANK)) * 2)
        self.rotary = LlamaRotaryEmbedding(config)
        lean_mlps(self)
        if dtype != torch.float32:
            replace_norms(self, dtype)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """See the class."""
        bounds = torch.tensor([*range(0, len(x), DOCUMENT), len(x)])
        inside, (a_q, b_q, a_v, b_v) = self.before(x), self.lora
        q = self.q(inside) + F.linear(F.linear(inside, a_q), b_q) * 2.0
        v = self.v(inside) + F.linear(F.linear(inside, a_v), b_v) * 2.0
        q, k, v = (one.unflatten(1, (self.heads, -1)).transpose(0, 1)[None] for one in (q, self.k(inside), v))
        q, k = apply_rotary_pos_emb(q, k, *self.rotary(x, positions[None]))
        mixed, _ = flat_attention(self, q, k, v, None, cu_seq_lens_q=bounds)
        x = x + self.o(mixed[0].flatten(1))
        out: Tensor = x + self.mlp(self.behind(x))
        return out
