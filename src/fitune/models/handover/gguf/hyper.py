"""Sizes and settings of a model, as a GGUF has them.

In: a transformers config. Out: metadata by key, and for positions that are stretched frequency by frequency the tensors
that do it. What llama.cpp has no place for is refused.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from gguf import Keys, RopeScalingType
from torch import Tensor

from fitune.core.errors import ModelError
from fitune.models.handover.gguf.architectures import Architecture, head_width

BLOOM_LENGTH = 2048  # of its rows in training; its config does not say it
STRETCHED = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"


def context(config: Any, architecture: Architecture) -> int:
    """The most tokens that llama.cpp computes as transformers does: no more than the window that it does not have."""
    named = getattr(config, "max_position_embeddings", None) or getattr(config, "seq_length", None)
    longest = int(named or BLOOM_LENGTH)
    window = None if architecture.window else getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    return min(longest, int(window)) if window else longest


def metadata(config: Any, architecture: Architecture) -> dict[str, Any]:
    """Keys and values.

    Raises:
        ModelError: positions of a kind that llama.cpp has not.
    """
    name = architecture.name
    heads = config.num_attention_heads
    wide = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
    found: dict[str, Any] = {
        Keys.LLM.BLOCK_COUNT: config.num_hidden_layers,
        Keys.LLM.CONTEXT_LENGTH: context(config, architecture),
        Keys.LLM.EMBEDDING_LENGTH: config.hidden_size,
        Keys.LLM.FEED_FORWARD_LENGTH: wide,
        Keys.LLM.VOCAB_SIZE: config.vocab_size,
        Keys.Attention.HEAD_COUNT: heads,
        Keys.Attention.HEAD_COUNT_KV: getattr(config, "num_key_value_heads", None) or heads,
    }
    for key, names in (
        (Keys.Attention.LAYERNORM_RMS_EPS, ("rms_norm_eps",)),
        (Keys.Attention.LAYERNORM_EPS, ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")),
    ):
        given = [getattr(config, one) for one in names if getattr(config, one, None) is not None]
        found |= {key: float(given[0])} if given else {}
    ropes = getattr(config, "rope_parameters", None)
    if ropes:
        width = head_width(config)
        found |= {Keys.Attention.KEY_LENGTH: width, Keys.Attention.VALUE_LENGTH: width}
        found |= _rope(config, ropes, width)
    return {key.format(arch=name): value for key, value in found.items()} | dict(architecture.more(config))


def main_rope(config: Any) -> dict[str, Any]:
    """The settings of the positions; of a model with two kinds of layers those of its global ones."""
    ropes = config.rope_parameters
    return dict(ropes.get("full_attention", ropes))


def _rope(config: Any, ropes: dict[str, Any], width: int) -> dict[str, Any]:
    """Base, width and stretch of the positions."""
    rope = main_rope(config)
    kind = rope.get("rope_type", "default")
    part = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    found: dict[str, Any] = {
        Keys.Rope.FREQ_BASE: float(rope["rope_theta"]),
        Keys.Rope.DIMENSION_COUNT: int(width * part),
    }
    if (local := ropes.get("sliding_attention")) is not None:
        found[Keys.Rope.FREQ_BASE_SWA] = float(local["rope_theta"])
        if local.get("rope_type", "default") != "default":
            raise _no_place(f"{local['rope_type']} in layers with a window")
    if kind == "linear":
        return found | {
            Keys.Rope.SCALING_TYPE: RopeScalingType.LINEAR.value,
            Keys.Rope.SCALING_FACTOR: float(rope["factor"]),
        }
    if kind == "yarn":
        return found | _yarn(rope, latent=hasattr(config, "kv_lora_rank"), rounded=config.model_type == "gpt_oss")
    if kind == "longrope":
        return found | _long(config, rope)
    if kind not in ("default", "llama3"):
        raise _no_place(str(kind))
    return found


def _no_place(kind: str) -> ModelError:
    return ModelError(
        "this model's positions are stretched in a way that llama.cpp has not",
        received=kind,
        expected="default, linear, yarn, llama3 or longrope",
    )


def _unrounded(rope: dict[str, Any]) -> bool:
    """YaRN whose blend begins and ends between two frequencies; llama.cpp rounds both."""
    return rope.get("rope_type") == "yarn" and rope.get("truncate", True) is False


def _yarn(rope: dict[str, Any], *, latent: bool, rounded: bool) -> dict[str, Any]:
    """YaRN; llama.cpp's own factor of the attention is 1 + 0.1 ln(factor), and attn_factor multiplies it. (It reads
    yarn_attn_factor too, and overwrites it.)"""
    factor = float(rope["factor"])
    own = 0.1 * math.log(factor) + 1.0
    mscale, every = rope.get("mscale"), rope.get("mscale_all_dim")
    if mscale and every and (not latent or mscale != every):
        raise _no_place("yarn with mscale and mscale_all_dim")
    given = rope.get("attention_factor")
    if _unrounded(rope) and not rounded:
        raise _no_place("yarn with truncate false")
    return {
        Keys.Rope.SCALING_TYPE: RopeScalingType.YARN.value,
        Keys.Rope.SCALING_FACTOR: factor,
        Keys.Rope.SCALING_ORIG_CTX_LEN: int(rope["original_max_position_embeddings"]),
        Keys.Rope.SCALING_YARN_BETA_FAST: float(rope.get("beta_fast") or 32),
        Keys.Rope.SCALING_YARN_BETA_SLOW: float(rope.get("beta_slow") or 1),
        **({Keys.Rope.SCALING_ATTN_FACTOR: float(given) / own} if given is not None else {}),
    }


def _long(config: Any, rope: dict[str, Any]) -> dict[str, Any]:
    """LongRoPE: its factors are tensors."""
    before = int(rope["original_max_position_embeddings"])
    factor = config.max_position_embeddings / before
    scale = math.sqrt(1 + math.log(factor) / math.log(before)) if factor > 1 else 1.0
    return {
        Keys.Rope.SCALING_TYPE: RopeScalingType.LONGROPE.value,
        Keys.Rope.SCALING_ORIG_CTX_LEN: before,
        Keys.Rope.SCALING_ATTN_FACTOR: float(rope.get("attention_factor") or scale),
    }


def notes(config: Any, architecture: Architecture) -> list[str]:
    """What a user should know of the length of rows."""
    longest = int(getattr(config, "max_position_embeddings", None) or 0)
    kept = context(config, architecture)
    found = [f"its context ends after {kept:,} tokens: llama.cpp has no window for it"] * (kept < longest)
    if getattr(config, "rope_parameters", None) and main_rope(config).get("rope_type") == "longrope":
        before = int(main_rope(config)["original_max_position_embeddings"])
        found.append(
            f"opened with a context of more than {before:,} tokens, llama.cpp stretches the positions of short texts "
            "too, as transformers does not"
        )
    if getattr(config, "rope_parameters", None) and _unrounded(main_rope(config)):
        found.append(
            "llama.cpp rounds the frequencies where this model's positions begin and end to be stretched, as "
            "transformers does not: logits differ a little, with every GGUF of this kind"
        )
    return found


def tensors(config: Any) -> dict[str, Tensor]:
    """Factors that each frequency is divided by, where they are not one number."""
    if not getattr(config, "rope_parameters", None):
        return {}
    rope = main_rope(config)
    kind = rope.get("rope_type", "default")
    if kind == "longrope":
        return {
            LONG: torch.tensor(rope["long_factor"], dtype=torch.float32),
            SHORT: torch.tensor(rope["short_factor"], dtype=torch.float32),
        }
    if kind != "llama3":
        return {}
    width = head_width(config)
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    return {STRETCHED: (plain / _llama3(plain, rope)).to(torch.float32)}


def _llama3(plain: Tensor, rope: dict[str, Any]) -> Tensor:
    """Llama 3.1's frequencies: the slow ones divided by the factor, the fast ones kept, those between blended."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * plain / (2 * math.pi)  # in the rows of the first training
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    found: Tensor = (1 - blend) * plain / rope["factor"] + blend * plain
    return found
