"""Weights that a model's own code reads, by its source: linear layers, and parameters of experts.

Of a linear layer that is read beside its own forward, code would get bytes, were it packed: Mamba multiplies by the
weight of its step sizes, LongCat's router by its classifier's, Gemma 3n by matrices of a few numbers, RWKV divides some
of its weights while it answers. In: a model. Out: the last names of such layers, from the source of its classes:
`self.dt_proj.weight`, but where only its dtype, device or size is asked for. Of a class of experts: whether a stack
(kernels/experts.py) can stand for a parameter that its code reads.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterator
from functools import cache

from torch import nn

from fitune.models.kernels.read_as_tensor import ATTRIBUTES

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


# ---- parameters of experts that are not behind transformers' interface ----

TORCH = {"torch", "F", "nn"}  # what functions of torch are reached by
PRODUCTS = {"bmm", "matmul", "mm"}


def takes_stack(kind: type, name: str) -> bool:
    """May a stack stand in the place of this parameter of a class? Its code indexes it, asks for its shape, or gives it
    to a function of torch, and does nothing else with it."""
    uses = [_is_known(node, parents) for node, parents in _uses(kind, name)]
    return bool(uses) and all(uses)


def is_turned(kind: type, name: str) -> bool:
    """Is the parameter (experts, in, out): rows are multiplied by it as it is?"""
    return any(_multiplies(parents) for _, parents in _uses(kind, name))


def _is_known(node: ast.AST, parents: list[ast.AST]) -> bool:
    above = parents[-1]
    if isinstance(above, ast.Attribute):
        return above.attr in ATTRIBUTES
    if isinstance(above, ast.Call):
        root = above.func
        while isinstance(root, ast.Attribute):
            root = root.value
        return isinstance(root, ast.Name) and root.id in TORCH
    if isinstance(above, ast.BinOp):
        return isinstance(above.op, ast.MatMult) and above.right is node
    return isinstance(above, ast.Compare) or (isinstance(above, ast.Subscript) and above.value is node)


def _multiplies(parents: list[ast.AST]) -> bool:
    above = parents[-2] if isinstance(parents[-1], ast.Subscript) else parents[-1]
    if isinstance(above, ast.BinOp):
        return isinstance(above.op, ast.MatMult)
    return isinstance(above, ast.Call) and isinstance(above.func, ast.Attribute) and above.func.attr in PRODUCTS


@cache
def _uses(kind: type, name: str) -> tuple[tuple[ast.AST, list[ast.AST]], ...]:
    """Where the source of a class reads `self.name`, with all that it stands in; nothing where it has no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):
        return ()
    return tuple(_places(tree, [], name))


def _places(node: ast.AST, parents: list[ast.AST], name: str) -> Iterator[tuple[ast.AST, list[ast.AST]]]:
    if isinstance(node, ast.FunctionDef) and node.name in BEFORE:
        return
    if isinstance(node, ast.Attribute) and node.attr == name and getattr(node.value, "id", None) == "self":
        yield node, parents
    for child in ast.iter_child_nodes(node):
        yield from _places(child, [*parents, node], name)
