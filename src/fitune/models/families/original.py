"""The published layouts of ChatGLM: config.json of type `chatglm`, whose weights transformers has no class for.

In: the values of such a config.json. Out: for version 1 the config of our own class, which has the published names; for
versions 2 and 3 a GlmConfig, and the tensors under transformers' names, one at a time, and back again bit for bit.
Which version it is follows from the settings: only version 1 has two rows of positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GlmConfig

from fitune.core.errors import ModelError
from fitune.models.families.chatglm_model import ChatGLMConfig

TYPE = "chatglm"
PARTS = {  # published name: transformers' name
    "embedding.word_embeddings": "model.embed_tokens",
    "encoder.final_layernorm": "model.norm",
    "encoder.layers": "model.layers",
    "output_layer": "lm_head",
    "self_attention.dense": "self_attn.o_proj",
    "mlp.dense_4h_to_h": "mlp.down_proj",
    "mlp.dense_h_to_4h": "mlp.gate_up_proj",
}
FUSED, SPLIT = "self_attention.query_key_value", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
BUFFER = "rotary_pos_emb.inv_freq"  # computed, not learned
NEEDED = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels", "padded_vocab_size")


def is_first(values: Mapping[str, object]) -> bool:
    """Is it version 1?"""
    return "inner_hidden_size" in values or bool(values.get("position_encoding_2d"))


def config_of(values: Mapping[str, Any]) -> Any:
    """The config of our class (version 1) or transformers' (2 and 3).

    Raises:
        ModelError: settings that are missing, or that change the computation in a way that is not covered.
    """
    if values.get("quantization_bit"):
        raise ModelError(
            f"this ChatGLM is packed into {values['quantization_bit']} bits by its own code",
            fix="take the original model, with --quant nf4 or int8 if it is to be small",
        )
    if is_first(values):
        drop = ("architectures", "model_type", "transformers_version", "torch_dtype", "_name_or_path")
        config = ChatGLMConfig(**{name: value for name, value in values.items() if name not in drop})
        config.dtype = values.get("torch_dtype") or values.get("dtype")
        return config
    missing = [name for name in NEEDED if name not in values]
    if missing:
        raise ModelError("config.json of a ChatGLM without its sizes", received=f"no {', '.join(missing)}")
    unusual = [
        f"{name} {values[name]}"
        for name, usual in (
            ("add_bias_linear", False), ("rmsnorm", True), ("post_layer_norm", True), ("original_rope", True),
            ("apply_residual_connection_post_layernorm", False), ("fp32_residual_connection", False),
        )
        if values.get(name, usual) != usual
    ]  # fmt: skip
    if unusual:
        raise ModelError("this ChatGLM differs from the published ones", received=", ".join(unusual))
    heads = int(values["num_attention_heads"])
    many = values.get("multi_query_attention", False)
    config = GlmConfig(
        vocab_size=values["padded_vocab_size"],
        hidden_size=values["hidden_size"],
        intermediate_size=values["ffn_hidden_size"],
        num_hidden_layers=values["num_layers"],
        num_attention_heads=heads,
        num_key_value_heads=values["multi_query_group_num"] if many else heads,
        head_dim=values["kv_channels"],
        attention_bias=bool(values.get("add_qkv_bias", False)),
        attention_dropout=values.get("attention_dropout", 0.0),
        rms_norm_eps=values.get("layernorm_epsilon", 1e-5),
        max_position_embeddings=values.get("seq_length", 8192),
        rope_parameters=_rope(values),
        tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
        pad_token_id=values.get("pad_token_id", 0),
        eos_token_id=values.get("eos_token_id", 2),
        bos_token_id=values.get("bos_token_id", 1),
    )
    config.dtype = values.get("torch_dtype") or values.get("dtype")
    return config


def _rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """rope_ratio stretches the positions of ChatGLM2-32k, and the base of ChatGLM3-32k, by their own code."""
    ratio = float(values.get("rope_ratio", 1) or 1)
    base = float(values.get("rope_theta", 10000.0))
    shared = {"partial_rotary_factor": 0.5}
    if ratio != 1 and "chatglm2" in str(values.get("_name_or_path", "")).lower():
        return {"rope_type": "linear", "factor": ratio, "rope_theta": base, **shared}
    return {"rope_type": "default", "rope_theta": base * ratio, **shared}


def tensors(found: Iterable[tuple[str, Tensor]], config: GlmConfig) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a published ChatGLM2 or 3 under transformers' names; q, k and v are views of one tensor."""
    sizes = _rows(config)
    for name, tensor in found:
        if name.endswith(BUFFER):
            continue
        name = _renamed(name.removeprefix("transformer."), PARTS)
        if FUSED not in name:
            yield name, tensor
            continue
        for part, rows in zip(SPLIT, tensor.split(sizes), strict=True):
            yield name.replace(FUSED, part), rows


def _rows(config: GlmConfig) -> list[int]:
    keys = config.num_key_value_heads * config.head_dim
    return [config.num_attention_heads * config.head_dim, keys, keys]


def _renamed(name: str, parts: Mapping[str, str]) -> str:
    for old, new in parts.items():
        name = name.replace(old, new)
    return name


def published(names: Iterable[str], read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The way back: of a GlmForCausalLM's tensors those of the published layout, bit for bit.

    Args:
        names: of the state dict.
        read: gives a tensor by name; each is read once.
    """
    back = {new: old for old, new in PARTS.items()}
    for name in names:
        if any(part in name for part in SPLIT[1:]):
            continue
        if SPLIT[0] in name:
            tensor = torch.cat([read(name.replace(SPLIT[0], part)) for part in SPLIT])
            name = name.replace(SPLIT[0], FUSED)
        else:
            tensor = read(name)
        yield f"transformer.{_renamed(name, back)}", tensor


def published_config(config: GlmConfig) -> dict[str, Any]:
    """config.json of the published layout; what only names its Python code is not in it.

    Raises:
        ModelError: this model has no such layout.
    """
    rope = config.rope_parameters
    stretched = rope["rope_type"] == "linear"
    if rope["rope_type"] not in ("default", "linear") or rope.get("partial_rotary_factor", 0.5) != 0.5:
        raise ModelError("this model's positions have no place in ChatGLM's published layout", received=str(rope))
    ratio = rope["factor"] if stretched else rope["rope_theta"] / 10000.0
    return {
        **({"_name_or_path": "THUDM/chatglm2-6b-32k"} if stretched else {}),
        "architectures": ["ChatGLMModel"],
        "model_type": TYPE,
        "add_bias_linear": False,
        "add_qkv_bias": config.attention_bias,
        "apply_query_key_layer_scaling": True,
        "apply_residual_connection_post_layernorm": False,
        "attention_dropout": config.attention_dropout,
        "attention_softmax_in_fp32": True,
        "bias_dropout_fusion": True,
        "ffn_hidden_size": config.intermediate_size,
        "fp32_residual_connection": False,
        "hidden_dropout": 0.0,
        "hidden_size": config.hidden_size,
        "kv_channels": config.head_dim,
        "layernorm_epsilon": config.rms_norm_eps,
        "multi_query_attention": config.num_key_value_heads != config.num_attention_heads,
        "multi_query_group_num": config.num_key_value_heads,
        "num_attention_heads": config.num_attention_heads,
        "num_layers": config.num_hidden_layers,
        "original_rope": True,
        "padded_vocab_size": config.vocab_size,
        "post_layer_norm": True,
        "rmsnorm": True,
        **({"rope_ratio": ratio} if ratio != 1 else {}),
        "seq_length": config.max_position_embeddings,
        "use_cache": True,
        "torch_dtype": str(config.dtype or "float32").removeprefix("torch."),
        "tie_word_embeddings": config.tie_word_embeddings,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
