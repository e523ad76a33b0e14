"""What fitune attaches to a model: one record, kept as one attribute of the transformers model itself.

In: a causal LM, with or without PEFT's wrapper. Out: its `Attached`, made when it is first asked for. Nothing else of
fitune is set on a model; what belongs to single layers (rows of new tokens, a packed weight's compute dtype) is set on
those.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fitune.models.family import Family, Tower
from fitune.models.interfaces import causal_lm
from fitune.models.kernel_faults import Fault
from fitune.models.offload import Host, Waits

# how a last block works on label rows alone: not at all, giving those rows, giving those and filler behind them
ByRows = Literal["no", "rows", "filled"]
NAME = "_fitune"  # of the attribute


@dataclass
class FlatState:
    """What the attention modules of one model share: the documents (kernels/flash.py; None: not flat), a prefix per
    layer, and the label rows that a last block is to work on (kernels/label_rows.py)."""

    documents: object = None
    prefix: list[tuple[Tensor, Tensor]] | None = None
    label_rows: object = None

    def __deepcopy__(self, memo: object) -> FlatState:
        """A copied block belongs to the same model."""
        return self


@dataclass
class Alone:
    """What the layers with a state of one model share. kinds: names of their classes. documents: of the flat batch that
    goes through (kernels/flash.py); None: none does."""

    kinds: list[str]
    documents: object = None

    def __deepcopy__(self, memo: object) -> Alone:
        """A copied block belongs to the same model."""
        return self


@dataclass
class Attached:
    """What fitune knows of a model that it loaded or tuned.

    compute: dtype that its layers compute in; None: it was not prepared by fitune. family: its architecture, once
    asked for. tower: where it stands in a model that takes images too. quantizer: of its linear layers. faults:
    kernels that are wrong for these. method: name and settings of a method of fitune's own (PEFT keeps those of its
    methods itself). start: values that this method's parameters had before it was loaded. disabled: PEFT's method is
    turned off. loss_rows: label rows whose logits a loss computes at once; None: what vocabulary and device suggest.
    tile: answers that go through it side by side; 0: none; None: not tried yet. label_rows: can its last block work on
    label rows alone, and how; None: not tried yet. flat: shared by the attention modules
    of a model whose blocks hand no keywords through (BLOOM). alone: shared by its layers with a state
    (kernels/alone.py). copies: a context inside of which no weight changes, so that LoRA's are cast once for all layers
    (kernels/low_rank.py). waits: what its blocks have in main memory beside a
    GPU (offload.py). attentions: of each attention that it was switched to, what it set in which config.
    """

    compute: torch.dtype | None = None
    family: Family | None = None
    tower: Tower | None = None
    quantizer: str = "none"
    faults: list[Fault] = field(default_factory=list)
    method: dict[str, Any] | None = None
    start: dict[str, Tensor] | None = None
    disabled: bool = False
    loss_rows: int | None = None
    tile: int | None = None
    label_rows: ByRows | None = None
    flat: FlatState | None = None
    alone: Alone | None = None
    copies: Callable[[], AbstractContextManager[None]] = nullcontext
    waits: Waits = field(default_factory=lambda: Waits(Host()))
    attentions: dict[str, list[tuple[Any, str]]] = field(default_factory=dict)


def of(model: nn.Module) -> Attached:
    """The record of a model; of one that PEFT wrapped, that of the transformers model inside."""
    inner = causal_lm(model)
    found = vars(inner).get(NAME)
    if not isinstance(found, Attached):
        found = Attached()
        setattr(inner, NAME, found)
    return found


def compute_dtype(model: nn.Module) -> torch.dtype:
    """What the layers of a model compute in; of a model that was not loaded here, float32."""
    return of(model).compute or torch.float32
