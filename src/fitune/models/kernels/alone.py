"""Layers that carry something from token to token past attention, one document after the other in a flat batch.

In: a model. Out: the same; each module of its blocks with a convolution, a recurrent state or a choice among all keys
runs on each document alone when the batch is flat, so that nothing crosses a bound: state space layers, linear
attention, short convolutions, recurrent units, token shifts, indexers. All else of a block works on all tokens at once.
The modules stay what they are, with their names and weights: each instance gets a class of its own that is made of its
class. Whether that is right for a model is shown by the leak probe, as for every layout.

Shapes: T = tokens of all documents, L = of one, W = width.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fitune.models import attached
from fitune.models.attached import Alone
from fitune.models.family import Family
from fitune.models.interfaces import CausalLM
from fitune.models.kernels.flash import Documents
from fitune.models.kernels.label_rows import KEYWORD

# classes of layers with a state, of which not all have a convolution, without the name of their model before it
STATEFUL = re.compile(r"Mamba|Delta(Net|Attention)|Lightning|Recurrent|RgLru|LinearAttention")
# children that look at all keys, or carry the state; and a token shift, by its parameters
PARTS = re.compile(r"indexer|compressor|mlstm_backend|time_mix_\w+")
BOUNDS = ("cu_seq_lens_q", "documents", KEYWORD)  # keywords about the whole batch


class OneByOne(nn.Module):
    """What a module's own class is mixed with."""

    fitune_alone: Alone

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What its own forward gives, documents side by side.

        Raises:
            NotImplementedError: a document begins with rows of another one.
        """
        there = self.fitune_alone.documents
        if not isinstance(there, Documents):
            return super().forward(*args, **kwargs)
        if there.shared is not None:
            raise NotImplementedError("a layer with a state works on whole documents")
        bounds, outs = there.bounds.tolist(), []
        given = {name: value for name, value in kwargs.items() if name not in BOUNDS}
        for first, end in pairwise(bounds):
            here = slice(first, end)
            own = {} if not self.fitune_attends else {"cu_seq_lens_q": torch.tensor([0, end - first])}
            cut = {name: _part(value, here, bounds[-1]) for name, value in given.items()}
            outs.append(super().forward(*(_part(value, here, bounds[-1]) for value in args), **cut, **own))
        return _joined(outs)

    fitune_attends = False


def put_into(model: CausalLM, family: Family) -> None:
    """Make a model's layers with a state run on each document alone in a flat batch, once."""
    known = attached.of(model)
    found = list(stateful(model, family))
    if known.alone is not None or not found:
        return
    known.alone = Alone(sorted({type(module).__name__ for module in found}))
    for module in found:
        attends = any(hasattr(one, "is_causal") for one in module.modules())
        module.__class__ = _class(type(module))
        module.fitune_alone, module.fitune_attends = known.alone, attends  # type: ignore[assignment]  # torch takes attributes for modules


def stateful(model: CausalLM, family: Family) -> Iterator[nn.Module]:
    """The modules right below the blocks, of which a part carries something from token to token past attention."""
    owner = re.sub(r"(ForCausalLM|LMHeadModel)$", "", type(model).__name__)
    for block in family.block_list(model):
        for child in block.children():
            if any(_carries(module, owner) for module in child.modules()):
                yield child


def _carries(module: nn.Module, owner: str) -> bool:
    names = [name for name, _ in (*module.named_children(), *module.named_parameters(recurse=False))]
    convolves = any(isinstance(child, nn.Conv1d) for child in module.children())
    named = STATEFUL.search(type(module).__name__.removeprefix(owner)) is not None
    return convolves or named or any(PARTS.fullmatch(name) for name in names)


_MADE: dict[type, type] = {}


def _class(kind: type) -> type:
    if kind not in _MADE:
        _MADE[kind] = type(kind.__name__, (OneByOne, kind), {})
    return _MADE[kind]


def _part(value: Any, here: slice, total: int) -> Any:
    """Of what a module is called with, what belongs to one document."""
    if isinstance(value, tuple):
        return tuple(_part(one, here, total) for one in value)
    if isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == 1 and value.shape[1] == total:
        return value[:, here]
    return value


def _joined(outs: list[Any]) -> Any:
    """(1, L, W) of each document to (1, T, W); what else a module gives is of nobody's use: the last one's."""
    if isinstance(outs[0], tuple):
        first = _joined([out[0] for out in outs])
        return (first, *outs[-1][1:])
    return torch.cat(outs, dim=1)
