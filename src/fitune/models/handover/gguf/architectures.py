"""Which models llama.cpp has, and what each of them is called and needs there.

In: a transformers config. Out: its Architecture, one row of TABLE for each model_type; what llama.cpp would compute
otherwise than transformers is refused by name. The names of tensors are the `gguf` package's own map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, ExpertGatingFuncType, Keys

from fitune.core.errors import ModelError
from fitune.models.handover.gguf import apart, delta, order

Values = Mapping[str, Any]
SILU, GELU, EXACT = ("silu", "swish"), ("gelu_pytorch_tanh", "gelu_new", "gelu_fast"), ("gelu", "gelu_python")
RELU2 = ("relu2",)


@dataclass(frozen=True)
class Architecture:
    """A kind of model in llama.cpp.

    Args:
        arch: its name there.
        activations: the functions of transformers that its one stands for.
        order: of the rows of its tensors.
        more: settings that it alone has, by their keys.
        problems: what in a config it would compute otherwise.
        prefix: of transformers' names, which the map of names does not have.
        own_head: its head must be in the file, tied or not.
        window: does it look back over a window, where the config says so? Else the context ends with the window.
        apart: which of its tensors are several there, or have another form.
    """

    arch: MODEL_ARCH
    activations: tuple[str, ...] = SILU
    order: order.Order = order.kept
    more: Callable[[Any], Values] = lambda _: {}
    problems: Callable[[Any], list[str]] = lambda _: []
    prefix: str = ""
    own_head: bool = False
    window: bool = False
    apart: apart.Apart = apart.whole

    @property
    def name(self) -> str:
        """As general.architecture has it."""
        return MODEL_ARCH_NAMES[self.arch]


def head_width(config: Any) -> int:
    """Numbers of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _plain_heads(config: Any) -> list[str]:
    """For kinds whose heads share the width of the model."""
    wide = head_width(config) * config.num_attention_heads
    return [f"head_dim {head_width(config)}: its heads are {config.hidden_size} wide in all"] * (
        wide != config.hidden_size
    )


def _gemma(config: Any) -> Values:
    name = MODEL_ARCH_NAMES[MODEL_ARCH.GEMMA2 if config.model_type == "gemma2" else MODEL_ARCH.GEMMA3]
    attention, final = getattr(config, "attn_logit_softcapping", None), config.final_logit_softcapping
    return {
        Keys.Attention.SLIDING_WINDOW.format(arch=name): config.sliding_window,
        Keys.Attention.SLIDING_WINDOW_PATTERN.format(arch=name): [
            kind == "sliding_attention" for kind in config.layer_types
        ],
        **({Keys.LLM.ATTN_LOGIT_SOFTCAPPING.format(arch=name): float(attention)} if attention else {}),
        **({Keys.LLM.FINAL_LOGIT_SOFTCAPPING.format(arch=name): float(final)} if final else {}),
    }


def _gemma_scale(config: Any) -> list[str]:
    """llama.cpp scales by the width of a head, and by that of the model in the largest (27B, by its layers)."""
    largest = config.num_hidden_layers == (46 if config.model_type == "gemma2" else 62)
    expected = config.hidden_size // config.num_attention_heads if largest else head_width(config)
    same = math.isclose(config.query_pre_attn_scalar, expected)
    caps = config.model_type != "gemma2" and getattr(config, "attn_logit_softcapping", None)
    return [f"query_pre_attn_scalar {config.query_pre_attn_scalar}: it scales by {expected}"] * (not same) + [
        "attn_logit_softcapping"
    ] * bool(caps)


def _experts(config: Any) -> Values:
    name = TABLE[config.model_type].name
    count = getattr(config, "num_experts", None) or config.num_local_experts
    shared = getattr(config, "shared_expert_intermediate_size", None) or getattr(
        config, "shared_intermediate_size", None
    )
    width = getattr(config, "moe_intermediate_size", None)
    return {
        Keys.LLM.EXPERT_COUNT.format(arch=name): count,
        Keys.LLM.EXPERT_USED_COUNT.format(arch=name): config.num_experts_per_tok,
        **({Keys.LLM.EXPERT_FEED_FORWARD_LENGTH.format(arch=name): width} if width else {}),
        **({Keys.LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH.format(arch=name): shared} if shared else {}),
    }


def _every_layer_sparse(config: Any) -> list[str]:
    """llama.cpp has experts in each layer of these, and weighs the chosen ones in one way."""
    dense = list(getattr(config, "mlp_only_layers", None) or [])
    step = getattr(config, "decoder_sparse_step", 1)
    sums = config.model_type in ("qwen3_moe", "qwen3_next")
    other = getattr(config, "norm_topk_prob", sums) != sums
    return (
        [f"layers without experts: {dense}"] * bool(dense)
        + [f"decoder_sparse_step {step}"] * (step != 1)
        + [f"norm_topk_prob {not sums}"] * other
    )


def _neox(config: Any) -> Values:
    return {Keys.LLM.USE_PARALLEL_RESIDUAL.format(arch=TABLE["gpt_neox"].name): bool(config.use_parallel_residual)}


def _bloom(config: Any) -> list[str]:
    return ["apply_residual_connection_post_layernorm"] * bool(config.apply_residual_connection_post_layernorm)


def _gpt2(config: Any) -> list[str]:
    settings = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
    return [f"{name} {not usual}" for name, usual in settings.items() if getattr(config, name, usual) != usual]


def _granite(config: Any) -> Values:
    """Its four factors; the logits are divided by theirs."""
    return {
        key.format(arch=TABLE[config.model_type].name): float(getattr(config, name))
        for key, name in (
            (Keys.Attention.SCALE, "attention_multiplier"),
            (Keys.LLM.EMBEDDING_SCALE, "embedding_multiplier"),
            (Keys.LLM.RESIDUAL_SCALE, "residual_multiplier"),
            (Keys.LLM.LOGIT_SCALE, "logits_scaling"),
        )
    }


def _cohere(config: Any) -> Values:
    name = TABLE[config.model_type].name
    windows = {Keys.Attention.SLIDING_WINDOW.format(arch=name): config.sliding_window} if name == "cohere2" else {}
    return {
        Keys.LLM.LOGIT_SCALE.format(arch=name): float(config.logit_scale),
        **windows,
    }


def _every_fourth_is_global(config: Any) -> list[str]:
    """Blocks without a window, which is the last of each four there."""
    expected = ["full_attention" if (n + 1) % 4 == 0 else "sliding_attention" for n in range(config.num_hidden_layers)]
    return ["blocks with a window that are not three of each four"] * (list(config.layer_types) != expected)


def _every_fourth_without_positions(config: Any) -> list[str]:
    expected = [int((n + 1) % 4 != 0) for n in range(config.num_hidden_layers)]
    return ["blocks without positions that are not the last of each four"] * (list(config.no_rope_layers) != expected)


def _balanced(config: Any) -> Values:
    """Experts chosen by scores of their own, the first blocks without any: GLM-4.5 and DeepSeek's kinds."""
    name = TABLE[config.model_type].name
    softmax = (
        getattr(config, "scoring_func", "softmax" if config.model_type == "deepseek_v2" else "sigmoid") == "softmax"
    )
    grouped = {Keys.LLM.EXPERT_GROUP_COUNT: config.n_group, Keys.LLM.EXPERT_GROUP_USED_COUNT: config.topk_group}
    found: dict[str, Any] = {
        Keys.LLM.EXPERT_COUNT: config.n_routed_experts,
        Keys.LLM.EXPERT_USED_COUNT: config.num_experts_per_tok,
        Keys.LLM.EXPERT_FEED_FORWARD_LENGTH: config.moe_intermediate_size,
        Keys.LLM.EXPERT_SHARED_COUNT: config.n_shared_experts or 0,
        Keys.LLM.EXPERT_WEIGHTS_SCALE: float(config.routed_scaling_factor),
        Keys.LLM.EXPERT_WEIGHTS_NORM: bool(config.norm_topk_prob),
        Keys.LLM.EXPERT_GATING_FUNC: (ExpertGatingFuncType.SOFTMAX if softmax else ExpertGatingFuncType.SIGMOID).value,
        Keys.LLM.LEADING_DENSE_BLOCK_COUNT: config.first_k_dense_replace,
        **(grouped if (config.n_group or 1) > 1 else {}),
    }
    return {key.format(arch=name): value for key, value in found.items()}


def _deepseek(config: Any) -> Values:
    """Latent attention: one key-value head as wide as the latent and its positions."""
    rope, rank = config.qk_rope_head_dim, config.kv_lora_rank
    found: dict[str, Any] = {
        Keys.Attention.HEAD_COUNT_KV: 1,
        Keys.Attention.KV_LORA_RANK: rank,
        Keys.Attention.KEY_LENGTH: rank + rope,
        Keys.Attention.VALUE_LENGTH: rank,
        Keys.Attention.KEY_LENGTH_MLA: config.qk_nope_head_dim + rope,
        Keys.Attention.VALUE_LENGTH_MLA: config.v_head_dim,
        Keys.Rope.DIMENSION_COUNT: rope,
        **({Keys.Attention.Q_LORA_RANK: config.q_lora_rank} if config.q_lora_rank else {}),
    }
    every = config.rope_parameters.get("mscale_all_dim")
    if config.rope_parameters.get("rope_type") == "yarn" and every:
        found[Keys.Rope.SCALING_YARN_LOG_MUL] = 0.1 * float(every)
    name = TABLE[config.model_type].name
    return {key.format(arch=name): value for key, value in found.items()} | dict(_balanced(config))


def _gpt_oss(config: Any) -> Values:
    name = TABLE["gpt_oss"].name
    return {
        **_experts(config),
        Keys.LLM.EXPERT_FEED_FORWARD_LENGTH.format(arch=name): config.intermediate_size,
        Keys.Attention.SLIDING_WINDOW.format(arch=name): config.sliding_window,
    }


def _every_second_is_global(config: Any) -> list[str]:
    expected = ["full_attention" if n % 2 else "sliding_attention" for n in range(config.num_hidden_layers)]
    return ["blocks with a window that are not every second one"] * (list(config.layer_types) != expected)


def _granite_experts(config: Any) -> Values:
    return {**_granite(config), **_experts(config)}


def _lfm2(config: Any) -> Values:
    """Blocks of short convolutions have no heads of keys; the MLP is narrower than the config says."""
    name = TABLE["lfm2"].name
    wide = config.intermediate_size
    if config.block_auto_adjust_ff_dim:
        wide, step = int(config.block_ffn_dim_multiplier * int(2 * wide / 3)), config.block_multiple_of
        wide = step * ((wide + step - 1) // step)
    attends = [kind == "full_attention" for kind in config.layer_types]
    found: dict[str, Any] = {
        Keys.LLM.FEED_FORWARD_LENGTH: wide,
        Keys.Attention.HEAD_COUNT_KV: [config.num_key_value_heads * one for one in attends],
        Keys.Attention.LAYERNORM_RMS_EPS: float(config.norm_eps),
        Keys.ShortConv.L_CACHE: config.conv_L_cache,
    }
    return {key.format(arch=name): value for key, value in found.items()}


def _delta(config: Any) -> Values:
    found = delta.settings(config, TABLE[config.model_type].name)
    return {**found, **(_experts(config) if getattr(config, "num_experts", None) else {})}


def _set(config: Any, *names: str) -> list[str]:
    """Settings that it has no place for, where they are set."""
    return [f"{name} {value}" for name in names if (value := getattr(config, name, None))]


def _own_keys(config: Any) -> list[str]:
    """For kinds whose heads have keys of their own."""
    shared = config.num_key_value_heads != config.num_attention_heads
    return [f"{config.num_key_value_heads} heads of keys for {config.num_attention_heads} of queries"] * shared


def _no_low_rank(config: Any) -> list[str]:
    """DeepSeek-V2 without low-rank queries: it takes a model of 27 blocks alone for that one."""
    lite = config.num_hidden_layers == 27
    return ["q_lora_rank null in a model that has not 27 blocks"] * (not config.q_lora_rank and not lite) + [
        "27 blocks with a q_lora_rank"
    ] * bool(config.q_lora_rank and lite)


def _latent_problems(config: Any) -> list[str]:
    turns = getattr(config, "rope_interleave", True)
    return _no_low_rank(config) + ["rope_interleave false"] * (not turns) + _set(config, "attention_bias")


def _stablelm(config: Any) -> Values:
    return {Keys.LLM.USE_PARALLEL_RESIDUAL.format(arch=TABLE["stablelm"].name): bool(config.use_parallel_residual)}


TABLE: dict[str, Architecture] = {
    "llama": Architecture(MODEL_ARCH.LLAMA, order=order.rotary),
    "mistral": Architecture(MODEL_ARCH.LLAMA, order=order.rotary),
    "mixtral": Architecture(MODEL_ARCH.LLAMA, order=order.rotary, more=_experts),
    "qwen2": Architecture(MODEL_ARCH.QWEN2, problems=_plain_heads),
    "qwen2_moe": Architecture(
        MODEL_ARCH.QWEN2MOE, more=_experts, own_head=True, problems=lambda c: _plain_heads(c) + _every_layer_sparse(c)
    ),
    "qwen3": Architecture(MODEL_ARCH.QWEN3),
    "qwen3_moe": Architecture(MODEL_ARCH.QWEN3MOE, more=_experts, problems=_every_layer_sparse),
    "gemma": Architecture(MODEL_ARCH.GEMMA, GELU, order.shifted),
    "gemma2": Architecture(MODEL_ARCH.GEMMA2, GELU, order.shifted, _gemma, _gemma_scale, window=True),
    "gemma3_text": Architecture(MODEL_ARCH.GEMMA3, GELU, order.shifted, _gemma, _gemma_scale, window=True),
    "phi3": Architecture(MODEL_ARCH.PHI3, problems=_plain_heads),
    "glm": Architecture(MODEL_ARCH.CHATGLM, problems=_plain_heads),
    "glm4": Architecture(MODEL_ARCH.GLM4),
    "olmo2": Architecture(MODEL_ARCH.OLMO2),
    "granite": Architecture(MODEL_ARCH.GRANITE, order=order.rotary, more=_granite),
    "starcoder2": Architecture(MODEL_ARCH.STARCODER2, GELU),
    "stablelm": Architecture(
        MODEL_ARCH.STABLELM, more=_stablelm, problems=lambda c: _plain_heads(c) + _set(c, "qk_layernorm")
    ),
    "smollm3": Architecture(MODEL_ARCH.SMOLLM3, order=order.rotary, problems=_every_fourth_without_positions),
    "cohere": Architecture(MODEL_ARCH.COMMAND_R, more=_cohere, problems=lambda c: _set(c, "use_qk_norm")),
    "cohere2": Architecture(MODEL_ARCH.COHERE2, more=_cohere, problems=_every_fourth_is_global, window=True),
    "ernie4_5": Architecture(MODEL_ARCH.ERNIE4_5),
    "seed_oss": Architecture(MODEL_ARCH.SEED_OSS),
    "hunyuan_v1_dense": Architecture(MODEL_ARCH.HUNYUAN_DENSE),
    "arcee": Architecture(MODEL_ARCH.ARCEE, RELU2, order.rotary),
    "nemotron": Architecture(MODEL_ARCH.NEMOTRON, RELU2, order.shifted),
    "phi": Architecture(MODEL_ARCH.PHI2, (*GELU, *EXACT), problems=lambda c: _set(c, "qk_layernorm")),
    "olmoe": Architecture(
        MODEL_ARCH.OLMOE, more=_experts, problems=lambda c: _set(c, "clip_qkv", "norm_topk_prob") + _own_keys(c)
    ),
    "granitemoe": Architecture(MODEL_ARCH.GRANITE_MOE, order=order.rotary, more=_granite_experts, apart=apart.granite),
    "granitemoeshared": Architecture(
        MODEL_ARCH.GRANITE_MOE, order=order.rotary, more=_granite_experts, apart=apart.granite
    ),
    "glm4_moe": Architecture(MODEL_ARCH.GLM4_MOE, more=_balanced),
    "deepseek_v2": Architecture(MODEL_ARCH.DEEPSEEK2, apart=apart.latent, more=_deepseek, problems=_latent_problems),
    "deepseek_v3": Architecture(MODEL_ARCH.DEEPSEEK2, apart=apart.latent, more=_deepseek, problems=_latent_problems),
    "gpt_oss": Architecture(
        MODEL_ARCH.GPT_OSS, apart=apart.gpt_oss, more=_gpt_oss, problems=_every_second_is_global, window=True
    ),
    "qwen3_next": Architecture(
        MODEL_ARCH.QWEN3NEXT,
        apart=delta.qwen3_next,
        more=_delta,
        problems=lambda c: delta.problems(c) + _every_layer_sparse(c),
    ),
    "qwen3_5_text": Architecture(MODEL_ARCH.QWEN35, apart=delta.qwen3_5, more=_delta, problems=delta.problems),
    "qwen3_5_moe_text": Architecture(MODEL_ARCH.QWEN35MOE, apart=delta.qwen3_5, more=_delta, problems=delta.problems),
    "lfm2": Architecture(MODEL_ARCH.LFM2, apart=apart.short_convolutions, more=_lfm2),
    "gpt2": Architecture(MODEL_ARCH.GPT2, (*GELU, *EXACT), order.transposed, problems=_gpt2),
    "gpt_neox": Architecture(MODEL_ARCH.GPTNEOX, (*GELU, *EXACT), order.fused, _neox, own_head=True),
    "bloom": Architecture(MODEL_ARCH.BLOOM, (*GELU, *EXACT), order.fused, problems=_bloom, prefix="transformer."),
}


def of(config: Any) -> Architecture:
    """The row of a model.

    Raises:
        ModelError: llama.cpp has no such kind, or computes something in it otherwise.
    """
    kind = config.model_type
    found = TABLE.get(kind)
    if found is None:
        raise ModelError(
            f"no GGUF can be written of a model of type {kind!r}",
            received=kind,
            expected=", ".join(sorted(TABLE)),
            fix="serve the merged folder with transformers or vLLM: fitune merge RUN --output FOLDER",
        )
    problems = found.problems(config)
    activation = activation_of(config)
    if activation and activation not in found.activations:
        problems = [*problems, f"activation {activation}: it has {found.activations[0]}"]
    if problems:
        raise ModelError(
            f"llama.cpp would compute this {kind} otherwise than transformers does",
            received="; ".join(problems),
            expected="the settings that its kind of model has there",
        )
    return found


def activation_of(config: Any) -> str | None:
    """The activation of a model's MLPs, by its name in transformers; None: its kind has one alone."""
    names = ("hidden_act", "hidden_activation", "activation_function")
    found = [value for name in names if isinstance(value := getattr(config, name, None), str)]
    return found[-1] if found else None
