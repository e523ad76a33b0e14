"""Linear layers whose weight a model reads itself, beside the layer's own forward: packed, it would read bytes.

Mamba multiplies by the weight of its step sizes, LongCat's router by its classifier's, Gemma 3n by matrices of a few
numbers, RWKV divides some of its weights while it answers. In: a model. Out: the last names of such layers, from the
source of its classes: `self.dt_proj.weight`, but where only its dtype, device or size is asked for.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from functools import cache

from torch import nn

THEIRS = "transformers.models."
FACTS = {"dtype", "device", "shape", "size", "numel", "ndim", "requires_grad", "is_meta"}
BEFORE = {"__init__", "_init_weights", "reset_parameters", "tie_weights"}  # functions that run on no packed weight


def read_by_itself(model: nn.Module) -> set[str]:
    """Last names of the layers whose weight the source of a model's classes reads; layers of other models may be among
    them."""
    places = {type(module).__module__ for module in model.modules()}
    return {name for place in places if place.startswith(THEIRS) for name in _of(place)}


@cache
def _of(place: str) -> frozenset[str]:
    """Of one module of transformers; nothing where it has no source."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[place]))
    except (OSError, TypeError):
        return frozenset()
    return frozenset(_read(tree))


def _read(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef) and node.name in BEFORE:
        return
    if isinstance(node, ast.Attribute) and node.attr in FACTS:
        return
    if isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.value, ast.Attribute):
        yield node.value.attr
    for child in ast.iter_child_nodes(node):
        yield from _read(child)
