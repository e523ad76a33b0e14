"""What is known of an operation once it was looked at, and of its results, which follow from shapes.

In: operations on meta, and their arguments. Out: what a tracer asks of each of them, looked up once; and results that
are made again from sizes and strides, since for many operations torch works those out in Python. Traces of one search
ask the same a hundred times: they share what is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from fitune.memory import overrides, work
from fitune.memory.operation import Args
from fitune.memory.shadow import META
from fitune.models.kernels.target import Target

MOST = 2**15  # results that are kept: some 30 MiB
CASTS = {"aten::_to_copy", "bitsandbytes::dequantize_4bit", "aten::dequantize"}
MOVES_ITSELF = {f"aten::{name}" for name in ("as_strided_", "resize_", "resize_as_", "set_")}


class Facts:
    """Of an operation.

    makes: it gives new tensors, and nothing else that a shape does not decide. writes: it changes values of its first
    argument alone, and gives that or nothing. The others: see overrides.py.
    """

    def __init__(self, func: OpOverload) -> None:
        schema = func._schema
        self.func = func  # kept, so that no other gets its id
        self.name = schema.name
        self.mutable = schema.is_mutable
        new = all(one.alias_info is None for one in schema.returns)
        self.makes = bool(schema.returns) and not schema.is_mutable and new
        self.writes = schema.is_mutable and self.name not in MOVES_ITSELF and _gives_first(func)
        self.supposed = overrides.SUPPOSED.get(func)
        self.stand_in = overrides.STANDS_IN.get(func)
        self.inside = overrides.INSIDE.get(self.name)
        self.casts = self.name in CASTS
        self.notes_true = self.name in overrides.NOTED
        self.work = work.formula(func)


def _gives_first(func: OpOverload) -> bool:
    """Is what it writes into its first argument, which is all that it gives?"""
    schema = func._schema
    written = [one.alias_info is not None and one.alias_info.is_write for one in schema.arguments]
    return bool(written) and written[0] and sum(written) == 1 and len(schema.returns) == 1 and func.is_view is False


_FACTS: dict[int, Facts] = {}  # by id: operations hash in Python


def facts(func: OpOverload) -> Facts:
    """Of an operation, looked up once."""
    found = _FACTS.get(id(func))
    if found is None:
        found = _FACTS[id(func)] = Facts(func)
    return found


# ---- results ----


class Made:
    """New tensors, alone or in a tuple or list, as they can be made again."""

    def __init__(self, out: Any) -> None:
        self.several = type(out) if isinstance(out, (tuple, list)) else None
        self.specs = [_spec(one) for one in (out if self.several else (out,))]

    def again(self) -> Any:
        """On meta."""
        made = [
            like if spec is None else torch.empty_strided(spec[0], spec[1], dtype=spec[2], device=META)
            for like, spec in self.specs
        ]
        return made[0] if self.several is None else self.several(made)


@cache
def results(target: Target, dtype: torch.dtype) -> dict[Any, Made | bool]:
    """What operations gave where a target is planned for, by what decides it: new tensors, or that they only write
    values; False: something else. dtype: torch's default, by which some choose theirs."""
    return {}


def result(out: Any, args: Args) -> Made | bool:
    """Of an operation that makes tensors. False: they are not new."""
    return Made(out) if _are_new(out if isinstance(out, (tuple, list)) else (out,), args) else False


def _are_new(outs: Sequence[Any], args: Args) -> bool:
    """Are results whole storages of their own? Some operations (_unsafe_view) give a view undeclared."""
    given = [t for one in args for t in (one if isinstance(one, (list, tuple)) else (one,)) if isinstance(t, Tensor)]
    theirs = {tensor.untyped_storage()._cdata for tensor in given}
    return all(
        tensor.untyped_storage()._cdata not in theirs
        and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        for tensor in outs
        if isinstance(tensor, Tensor)
    )


def kind(value: Any) -> Any:
    """What decides the shape of a result, hashable."""
    if isinstance(value, Tensor):
        return value.dtype, value.size(), value.stride()
    if isinstance(value, (list, tuple)):
        return tuple([kind(one) for one in value])
    if isinstance(value, dict):
        return tuple([(name, kind(one)) for name, one in value.items()])
    return type(value), value


def _spec(value: Any) -> tuple[Any, Any]:
    """A result as it can be made again: a value, or size, stride and dtype of a tensor."""
    if isinstance(value, Tensor):
        return None, (value.size(), value.stride(), value.dtype)
    return value, None
