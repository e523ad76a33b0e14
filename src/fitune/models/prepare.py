"""What is done to a model before it runs: flat batches, its precision, activation checkpointing.

In: a transformers model. Out: the same, all of it frozen, in eval mode.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fitune.core.blocks import Blocks, chosen
from fitune.core.errors import ModelError
from fitune.models import adapters, attached, families
from fitune.models.family import Family
from fitune.models.interfaces import CausalLM, causal_lm
from fitune.models.kernels import alone
from fitune.models.kernels.frozen import keep_stored
from fitune.models.kernels.gated import lean_mlps
from fitune.models.kernels.norm import replace_norms
from fitune.models.kernels.plain import keep_less
from fitune.models.kernels.rotary import turn_in_one
from fitune.models.offload import Checkpoint, Run
from fitune.models.precision import DTYPES
from fitune.models.switches import recomputed, written_out


def ready(model: CausalLM, precision: str = "fp32", adapter: str | Path | None = None) -> CausalLM:
    """A transformers model prepared for flat batches and for its precision, with an adapter if there is one.

    Raises:
        ModelError: the adapter cannot be used.
    """
    attached.of(model).compute = compute = DTYPES[precision]
    if compute == torch.float32:
        keep_stored(model, compute)
    replace_norms(model, compute)
    lean_mlps(model)
    keep_less(model)
    turn_in_one(model)
    written_out(model)
    if model.config.model_type in families.TABLE:
        families.TABLE[model.config.model_type].make_flat(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with suppress(ModelError):  # whoever needs it gets the error
        alone.put_into(model, families.of(model))
    if adapter is not None:
        model = adapters.put(model, Path(adapter))
    return model.eval()


def checkpoint_blocks(model: nn.Module, family: Family, recomputed_: Blocks, waiting: Blocks = False) -> None:
    """Activation checkpointing: blocks keep nothing inside, and compute it again in the backward pass; or they keep
    what they have in main memory.

    Args:
        model: with its method attached.
        family: names its blocks.
        recomputed_: which of them, as in core/blocks.py.
        waiting: whose activations wait in main memory beside a GPU; of those that are recomputed, the inputs.

    Raises:
        ModelError: the model's blocks cannot do it.
        ConfigError: it has no such blocks.
    """
    inner = causal_lm(model)
    blocks = list(family.block_list(inner))
    again, away = chosen(recomputed_, len(blocks)), chosen(waiting, len(blocks))
    if not again and not away:
        for block in blocks:
            block.gradient_checkpointing = False  # type: ignore[assignment]  # an attribute that torch takes for a module
        return
    if not inner.supports_gradient_checkpointing:
        raise ModelError(
            f"{type(inner).__name__}: cannot checkpoint activations", fix="leave out --checkpointing and --offload"
        )
    settings = {"use_reentrant": False, "context_fn": partial(recomputed, inner)}
    inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    # it lets what embeddings give require a gradient, for checkpointing that is reentrant; here that would take the
    # backward pass through a frozen prefix
    inner.disable_input_require_grads()
    for number, block in enumerate(blocks):
        how: Any = block  # attributes that torch takes for tensors or modules
        how.gradient_checkpointing = number in again or number in away
        if number in away:
            inside = how._gradient_checkpointing_func if number in again else None
            how._gradient_checkpointing_func = partial(_wait, inner, block, inside)


def _wait(inner: CausalLM, block: nn.Module, inside: Checkpoint | None, run: Run, *inputs: Any) -> Any:
    return attached.of(inner).waits.run(block, inside, run, *inputs)
