"""A trial step: two blocks as wide as a model's, with LoRA, forward and backward, timed in a precision.

In: a model's transformers config. Out: tokens a second. A matrix product alone does not show what a small model gains
from 16 bits on a CPU: casts, norms and attention gain nothing, and every number of tokens that comes for the first time
compiles kernels. So each pass has another number of tokens, as the batches of a run do.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

TOKENS = (192, 211, 227, 241)  # of a pass; the first is not timed
DOCUMENT = 64
BLOCKS, RANK = 2, 8


@dataclass(frozen=True)
class Widths:
    """Numbers of a token in a model's stream, and in its MLP."""

    width: int
    inner: int


def widths(model_config: object) -> Widths | None:
    """Widths of a model by its transformers config; None: the config does not give them."""
    inner_config = getattr(model_config, "text_config", None) or model_config
    width = getattr(inner_config, "hidden_size", None)
    if not isinstance(width, int):
        return None
    names = ("intermediate_size", "n_inner", "ffn_dim", "inner_hidden_size", "ffn_hidden_size")
    inner = next((value for name in names if isinstance(value := getattr(inner_config, name, None), int)), 4 * width)
    return Widths(width, inner)


def tokens_per_second(size: Widths, dtype: torch.dtype) -> float:
    """Of a forward and a backward pass on the CPU, weights frozen in that dtype, LoRA in float32."""
    state = torch.get_rng_state()
    blocks = [_block(size, dtype) for _ in range(BLOCKS)]
    torch.set_rng_state(state)
    spent = 0.0
    for count in TOKENS:
        began = time.perf_counter()
        with torch.autocast("cpu", dtype) if dtype != torch.float32 else nullcontext():
            x = torch.ones(count, size.width, dtype=dtype)
            for block in blocks:
                x = _through(x, block)
        x.float().square().mean().backward()
        spent += time.perf_counter() - began if count != TOKENS[0] else 0.0
    return sum(TOKENS[1:]) / spent


def _block(size: Widths, dtype: torch.dtype) -> dict[str, Tensor]:
    w, m = size.width, size.inner
    sizes = {"q": (w, w), "k": (w, w), "v": (w, w), "o": (w, w), "gate": (m, w), "up": (m, w), "down": (w, m)}
    made = {name: torch.randn(rows, cols).mul_(cols**-0.5).to(dtype) for name, (rows, cols) in sizes.items()}
    trained = {"qa": (RANK, w), "qb": (w, RANK), "va": (RANK, w), "vb": (w, RANK)}
    return made | {name: torch.randn(shape).mul_(0.01).requires_grad_() for name, shape in trained.items()}


def _through(x: Tensor, b: dict[str, Tensor]) -> Tensor:
    """(T, W) through a block."""
    heads = next(count for count in range(max(1, x.shape[1] // 64), 0, -1) if x.shape[1] % count == 0)
    inside = F.rms_norm(x, x.shape[1:])
    q = F.linear(inside, b["q"]) + F.linear(F.linear(inside, b["qa"]), b["qb"])
    v = F.linear(inside, b["v"]) + F.linear(F.linear(inside, b["va"]), b["vb"])
    k = F.linear(inside, b["k"])
    mixed = []
    for document in zip(*(part.split(DOCUMENT) for part in (q, k, v)), strict=True):
        one_q, one_k, one_v = (part.unflatten(1, (heads, -1)).transpose(0, 1)[None] for part in document)
        attended = F.scaled_dot_product_attention(one_q, one_k, one_v, is_causal=True)
        mixed.append(attended[0].transpose(0, 1).flatten(1))
    x = x + F.linear(torch.cat(mixed), b["o"])
    inside = F.rms_norm(x, x.shape[1:])
    return x + F.linear(F.silu(F.linear(inside, b["gate"])) * F.linear(inside, b["up"]), b["down"])
