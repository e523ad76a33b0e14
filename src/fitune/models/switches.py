"""What is switched on a model for a while, and put back: its attention, its mode, the dtype that it computes in.

In: a model. Out: contexts; when one ends, also by an error, the model is as it was before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from fitune.core.errors import ModelError
from fitune.models import determinism
from fitune.models.attached import FlatState, compute_dtype, of
from fitune.models.interfaces import CausalLM, causal_lm
from fitune.models.kernels.attention import FLAT

SDPA = "sdpa"
Prefix = Sequence[tuple[Tensor, Tensor]]  # of each layer keys and values


@contextmanager
def attention(
    model: nn.Module,
    name: str,
    documents: object = None,
    prefix: Prefix | None = None,
    label_rows: object = None,
) -> Iterator[None]:
    """Inside, the model's attention is another; a block whose activations are recomputed finds it again.

    Args:
        model: with or without a method's wrapper.
        name: FLAT for flat batches, SDPA for rows; a model whose scores SDPA cannot compute takes transformers' own
            code ("eager").
        documents, prefix, label_rows: of a flat batch, for models whose blocks hand no keywords through (BLOOM), and
            for layers with a state.

    Raises:
        ModelError: the model keeps its own attention, and that knows no flat batches.
    """
    inner = causal_lm(model)
    flat, alone = of(inner).flat, of(inner).alone
    before = inner.config._attn_implementation
    kept = None if flat is None else (flat.documents, flat.prefix, flat.label_rows)
    kept_alone = None if alone is None else alone.documents
    try:
        if alone is not None:
            alone.documents = documents if name == FLAT else None
        _switch(inner, flat, name, documents, prefix)
        if flat is not None:
            flat.label_rows = label_rows
        yield
    finally:
        if alone is not None:
            alone.documents = kept_alone
        if flat is not None and kept is not None:
            flat.documents, flat.prefix, flat.label_rows = kept
            inner.config._attn_implementation = before
        else:
            _set(inner, before)


def _switch(inner: CausalLM, flat: FlatState | None, name: str, documents: object, prefix: Prefix | None) -> None:
    if flat is not None:
        flat.documents, flat.prefix = documents, None if prefix is None else list(prefix)
        inner.config._attn_implementation = FLAT if name == FLAT else "eager"
        return
    if name == SDPA and has_own_attention(type(inner)):
        return  # rows go through it as they are
    if name == SDPA:
        name = for_rows(inner)
    _set(inner, name)
    if inner.config._attn_implementation != name:  # some models only warn
        raise ModelError(f"{type(inner).__name__}: its attention cannot be replaced", expected=f"attention {name!r}")


def _set(inner: CausalLM, name: str) -> None:
    """Switch the attention, once by transformers, which goes through all modules for it; from then on by what that has
    set in the configs. A step switches twice."""
    if inner.config._attn_implementation == name or has_own_attention(type(inner)):
        return
    known = of(inner).attentions
    if name in known and known[name][0][0] is inner.config:
        for config, value in known[name]:
            config._attn_implementation = value  # and in the configs below it, which come after it
        return
    inner.set_attn_implementation(name)
    if inner.config._attn_implementation == name:
        models = (module.config for module in inner.modules() if isinstance(module, PreTrainedModel))
        configs = {id(config): config for model in models for config in _with_inner(model)}
        known[name] = [(config, config._attn_implementation) for config in configs.values()]


def for_rows(inner: CausalLM) -> str:
    """SDPA, or transformers' own code where SDPA cannot compute the scores. Classes of models name no SDPA then;
    Gemma 2's of transformers 5.17 does, and its scores are left unbent without a word."""
    bent = getattr(inner.config, "attn_logit_softcapping", None) is not None
    return SDPA if getattr(type(inner), "_supports_sdpa", True) and not bent else "eager"


def written_out(inner: CausalLM) -> None:
    """Give a model whose scores SDPA cannot compute the attention that can, for all that calls it as it is."""
    if inner.config._attn_implementation == SDPA:
        _set(inner, for_rows(inner))


def has_own_attention(kind: type) -> bool:
    """Is the attention of a class of models written into its blocks, so that no other can be put in its place? Then it
    has no flat batches; rows go through as they are."""
    asked = getattr(kind, "_can_set_attn_implementation", None)
    return asked is not None and not asked()


def _with_inner(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """A config, and those that stand in it."""
    yield config
    for key in config.sub_configs:
        inner = getattr(config, key, None)
        if inner is not None:
            yield from _with_inner(inner)


@contextmanager
def rows_attention(model: nn.Module) -> Iterator[None]:
    """Inside, SDPA; a model whose attention cannot be replaced keeps its own."""
    with ExitStack() as stack:
        with suppress(ModelError):
            stack.enter_context(attention(model, SDPA))
        yield


def recomputed(model: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For activation checkpointing: contexts of a block's forward pass (it is there already) and of its recomputation
    in the backward pass, when the attention may have been switched back."""
    inner = causal_lm(model)
    flat, alone = of(inner).flat, of(inner).alone
    handed = (None, None, None) if flat is None else (flat.documents, flat.prefix, flat.label_rows)
    handed = handed if alone is None else (alone.documents, None, None)
    return nullcontext(), attention(inner, inner.config._attn_implementation, *handed)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode; afterwards each of its modules is in the mode that it was in."""
    with _mode(model, training=False):
        yield


@contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in training mode; afterwards each of its modules is in the mode that it was in."""
    with _mode(model, training=True):
        yield


@contextmanager
def _mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


@contextmanager
def computing(model: nn.Module) -> Iterator[None]:
    """Inside, layers compute in the model's precision, whatever their weights are kept in."""
    dtype, device = compute_dtype(model), next(model.parameters()).device
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
    with determinism.kernels(device), autocast, of(model).copies():
        yield
