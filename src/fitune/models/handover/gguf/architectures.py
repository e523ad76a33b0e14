"""Which models llama.cpp has, and what each of them is called and needs there.

In: a transformers config. Out: its Architecture, one row of TABLE for each model_type; what llama.cpp would compute
otherwise than transformers is refused by name. The names of tensors are the `gguf` package's own map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, Keys

from fitune.core.errors import ModelError
from fitune.models.handover.gguf import order

Values = Mapping[str, Any]
SILU, GELU, EXACT = ("silu", "swish"), ("gelu_pytorch_tanh", "gelu_new", "gelu_fast"), ("gelu", "gelu_python")


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
    """

    arch: MODEL_ARCH
    activations: tuple[str, ...] = SILU
    order: order.Order = order.kept
    more: Callable[[Any], Values] = lambda _: {}
    problems: Callable[[Any], list[str]] = lambda _: []
    prefix: str = ""
    own_head: bool = False
    window: bool = False

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
    shared = getattr(config, "shared_expert_intermediate_size", None)
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
    sums = config.model_type == "qwen3_moe"
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
    if activation not in found.activations:
        problems = [*problems, f"activation {activation}: it has {found.activations[0]}"]
    if problems:
        raise ModelError(
            f"llama.cpp would compute this {kind} otherwise than transformers does",
            received="; ".join(problems),
            expected="the settings that its kind of model has there",
        )
    return found


def activation_of(config: Any) -> str:
    """The activation of a model's MLPs, by its name in transformers; BLOOM has one alone."""
    names = ("hidden_act", "hidden_activation", "activation_function")
    found = [value for name in names if isinstance(value := getattr(config, name, None), str)]
    return found[-1] if found else "gelu_pytorch_tanh"
