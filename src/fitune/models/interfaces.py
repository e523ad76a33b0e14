"""The types that fitune works with: transformers' and PEFT's classes have none that a checker could use.

`CausalLM` stands for whatever transformers' causal LMs, and PEFT's wrappers around them, have in common. It is never
made: no model is an instance of it at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, cast

from torch import Tensor, nn


class Config(Protocol):
    """What every config.json that transformers reads has; families add their own settings, read by `getattr`."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    _attn_implementation: str

    def to_dict(self) -> dict[str, Any]:
        """The settings as config.json has them."""

    def save_pretrained(self, save_directory: str) -> None:
        """Write config.json into a folder."""


class Decoder(nn.Module):
    """A causal language model without its head. Only ChatGLM's makes positions from the ids: ask `hasattr` first."""

    flat_positions: Callable[[Tensor, Sequence[int], int], Tensor]


class Layer(nn.Module):
    """A linear layer or an embedding, plain or quantized, that carries what fitune set on it."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    new_rows: nn.Parameter
    new_ids: Tensor
    new_rows_on: bool
    new_scale: float
    rows_before: int
    casts: bool  # an embedding that gives another dtype than it keeps


class CausalLM(nn.Module):
    """A causal language model of transformers; with PEFT's wrapper around it, too."""

    config: Config
    base_model: Decoder
    generation_config: object
    supports_gradient_checkpointing: bool
    get_input_embeddings: Callable[[], nn.Embedding]
    get_output_embeddings: Callable[[], nn.Linear]
    resize_token_embeddings: Callable[..., nn.Embedding]
    set_attn_implementation: Callable[[str], None]
    gradient_checkpointing_enable: Callable[..., None]
    disable_input_require_grads: Callable[[], None]
    generate: Callable[..., Tensor]
    _weight_conversions: list[object] | None
    save_pretrained: Callable[..., None]


class Peft(CausalLM):
    """PEFT's wrapper: what fitune uses of it."""

    active_adapter: str
    active_peft_config: Any
    peft_config: Mapping[str, Any]
    prompt_encoder: Mapping[str, Any]
    prompt_tokens: Mapping[str, Tensor]
    get_base_model: Callable[[], CausalLM]
    load_adapter: Callable[..., object]
    add_adapter: Callable[..., object]
    set_adapter: Callable[[str], None]
    disable_adapter: Callable[[], AbstractContextManager[None]]
    _is_prompt_learning: bool


def decoder(inner: CausalLM) -> Decoder:
    """A transformers model without its head; Llama 4's class says by a wrong name where that stands."""
    found: Any = inner.base_model
    return cast(Decoder, inner.get_submodule("model") if found is inner else found)


def peft_of(model: nn.Module) -> Peft | None:
    """PEFT's wrapper, typed; None: the model has none."""
    return cast(Peft, model) if hasattr(model, "get_base_model") else None


def causal_lm(model: nn.Module) -> CausalLM:
    """The transformers model inside PEFT's wrapper; a model without one is that itself."""
    wrapper = peft_of(model)
    return cast(CausalLM, model) if wrapper is None else wrapper.get_base_model()
