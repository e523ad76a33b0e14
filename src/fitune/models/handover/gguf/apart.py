"""Tensors of transformers that are several in a GGUF, or one under another name.

In: a tensor by transformers' name, the model's config. Out: by name what it becomes, under names that llama.cpp's map
knows. Each function works on meta tensors too, so that shapes are known before anything is read. E = experts, W = width
of the model, I = width of an expert, H = heads, R = rank of the latent keys and values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

Apart = Callable[[str, Tensor, Any], dict[str, Tensor]]
BALANCE = ".e_score_correction_bias"  # added to the router's scores where experts are chosen


def whole(name: str, tensor: Tensor, config: Any) -> dict[str, Tensor]:
    """As it is."""
    return {name.replace(BALANCE, ".e_score_correction.bias"): tensor}


def gpt_oss(name: str, tensor: Tensor, config: Any) -> dict[str, Tensor]:
    """Experts as (E, W, 2 I), gate and up in turns, and (E, I, W): as weights of (out, in), gate and up apart."""
    stem, _, part = name.rpartition(".experts.")
    if not stem:
        return {f"{name}.weight" if name.endswith(".sinks") else name: tensor}
    what = "bias" if part.endswith("_bias") else "weight"
    laid = tensor if what == "bias" else tensor.transpose(1, 2)  # what was in the last dimension is in the second then
    if part.startswith("down"):
        return {f"{stem}.experts.down_proj.{what}": laid}
    return {f"{stem}.experts.gate_proj.{what}": laid[:, ::2], f"{stem}.experts.up_proj.{what}": laid[:, 1::2]}


def granite(name: str, tensor: Tensor, config: Any) -> dict[str, Tensor]:
    """Gate and up in one tensor, (E, 2 I, W) of experts and (2 I, W) of the shared one."""
    for inside, known in ((".block_sparse_moe.", "experts"), (".shared_mlp.", "shared_experts")):
        stem, _, part = name.partition(inside)
        if part == "input_linear.weight":
            gate, up = tensor.chunk(2, dim=-2)
            return {f"{stem}.mlp.{known}.gate_proj.weight": gate, f"{stem}.mlp.{known}.up_proj.weight": up}
    return {name: tensor}


def latent(name: str, tensor: Tensor, config: Any) -> dict[str, Tensor]:
    """DeepSeek's (H (keys + values), R), which makes keys and values of the latent ones: (H, R, keys) and
    (H, values, R)."""
    stem, _, part = name.partition(".kv_b_proj.")
    if part != "weight":
        return whole(name, tensor, config)
    keys, values = config.qk_nope_head_dim, config.v_head_dim
    heads = tensor.reshape(config.num_attention_heads, keys + values, tensor.shape[1])
    return {f"{stem}.k_b_proj.weight": heads[:, :keys].transpose(1, 2), f"{stem}.v_b_proj.weight": heads[:, keys:]}


def short_convolutions(name: str, tensor: Tensor, config: Any) -> dict[str, Tensor]:
    """LFM2's filters, (W, 1, length)."""
    return {name: tensor.squeeze(1) if name.endswith(".conv.conv.weight") else tensor}
