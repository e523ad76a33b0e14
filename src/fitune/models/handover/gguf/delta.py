"""Qwen3-Next and Qwen3.5: blocks with a gated delta rule (Yang et al. 2024, arXiv:2412.06464) between those with
attention, as a GGUF has them.

In: a tensor by transformers' name, the model's config. Out: by name what it becomes. llama.cpp holds the rate of decay
as minus its exponential, and a norm's weight with the 1 that is added to it. In Qwen3.5 value heads stand in turns, one
of each key head, where transformers has those of a key head together; in Qwen3-Next the projection to queries, keys,
values and gates, which lies key head by key head, is two.

K = key heads, V = value heads of each of them, k and v = their widths.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from gguf import Keys
from torch import Tensor


def settings(config: Any, name: str) -> Mapping[str, Any]:
    """Sizes of the states.

    Args:
        name: of the architecture in llama.cpp.
    """
    found: dict[str, Any] = {
        Keys.SSM.CONV_KERNEL: config.linear_conv_kernel_dim,
        Keys.SSM.STATE_SIZE: config.linear_key_head_dim,
        Keys.SSM.GROUP_COUNT: config.linear_num_key_heads,
        Keys.SSM.TIME_STEP_RANK: config.linear_num_value_heads,
        Keys.SSM.INNER_SIZE: config.linear_value_head_dim * config.linear_num_value_heads,
        Keys.LLM.FULL_ATTENTION_INTERVAL: list(config.layer_types).index("full_attention") + 1,
    }
    if config.model_type.startswith("qwen3_5"):
        found[Keys.Rope.DIMENSION_SECTIONS] = _sections(config)
    return {key.format(arch=name): value for key, value in found.items()}


def _sections(config: Any) -> list[int]:
    """Qwen3.5 turns pairs of numbers by three kinds of positions in turns, that of the text and two of images: how many
    pairs each has. A token of text has one position in all three, and a pair that none has would not turn at all."""
    pairs = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 0.25)) // 2
    return [(pairs + 2) // 3, (pairs + 1) // 3, pairs // 3, 0]


def problems(config: Any) -> list[str]:
    """Blocks in another order than llama.cpp knows: attention in every nth block, the last of each n."""
    kinds = list(config.layer_types)
    if "full_attention" not in kinds:
        return ["no block with attention"]
    each = kinds.index("full_attention") + 1
    expected = ["linear_attention" if (n + 1) % each else "full_attention" for n in range(len(kinds))]
    return [f"blocks with attention that are not each {each}th"] * (kinds != expected)


def qwen3_next(name: str, tensor: Tensor, config: Any) -> dict[str, Tensor]:
    """Its queries, keys, values and gates apart."""
    stem, _, part = name.partition(".linear_attn.in_proj_qkvz.")
    if part != "weight":
        return _usual(name, tensor)
    keys, many = config.linear_num_key_heads, config.linear_num_value_heads // config.linear_num_key_heads
    wide, values = config.linear_key_head_dim, many * config.linear_value_head_dim
    heads = tensor.reshape(keys, 2 * wide + 2 * values, tensor.shape[1])
    queries, ks, vs, gates = (one.flatten(0, 1) for one in heads.split([wide, wide, values, values], dim=1))
    return {f"{stem}.linear_attn.in_proj_qkv.weight": torch.cat([queries, ks, vs]),
            f"{stem}.linear_attn.in_proj_z.weight": gates}  # fmt: skip


def qwen3_5(name: str, tensor: Tensor, config: Any) -> dict[str, Tensor]:
    """Its value heads in turns."""
    part = name.partition(".linear_attn.")[2].removesuffix(".weight")
    both = 2 * config.linear_num_key_heads * config.linear_key_head_dim  # rows of queries and keys
    if part in ("in_proj_qkv", "conv1d"):
        tensor = torch.cat([tensor[:both], _in_turns(tensor[both:], config, config.linear_value_head_dim)])
    elif part == "in_proj_z":
        tensor = _in_turns(tensor, config, config.linear_value_head_dim)
    elif part in ("in_proj_a", "in_proj_b", "A_log", "dt_bias"):
        tensor = _in_turns(tensor, config, 1)
    elif part == "out_proj":
        tensor = _in_turns(tensor.t(), config, config.linear_value_head_dim).t()
    return _usual(name, tensor)


def _in_turns(tensor: Tensor, config: Any, width: int) -> Tensor:
    """(K V width, ...): of each key head the first value head, then of each the second, and so on."""
    keys = config.linear_num_key_heads
    heads = tensor.reshape(keys, config.linear_num_value_heads // keys, width, *tensor.shape[1:])
    return heads.transpose(0, 1).reshape(tensor.shape)


def _usual(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if name.endswith(".A_log"):
        return {name: -tensor.to(torch.float32).exp()}
    if name.endswith(".conv1d.weight"):
        return {name: tensor.squeeze(1)}
    if name.endswith("norm.weight") and not name.endswith(".linear_attn.norm.weight"):
        return {name: tensor.to(torch.float32) + 1}
    return {name.replace(".dt_bias", ".dt_proj.bias"): tensor}
