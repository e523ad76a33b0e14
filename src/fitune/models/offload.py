"""Activations that wait in main memory beside a GPU until the backward pass needs them.

In: a block's forward pass. Out: the same result; what autograd saves of it is copied to main memory, and the GPU's copy
is freed with its last other user. In the backward pass it is copied back when it is first needed. A storage is copied
whole and once, whatever views of it were saved, and comes back with the same strides, so that no bit differs. Weights
stay where they are. Copies go in the stream of the computation, through pinned memory: simple, and not hidden behind
the work.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Set
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]
Run = Callable[..., Any]
Checkpoint = Callable[..., Any]  # runs a function of tensors so that they are recomputed: (run, *inputs)


class Host:
    """Main memory. A plan puts another in its place, which counts."""

    def storage(self, tensor: Tensor) -> torch.UntypedStorage:
        """What a tensor is a view of."""
        return tensor.untyped_storage()

    def put(self, flat: Tensor) -> Any:
        """A copy of (N,) there."""
        kept = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=flat.is_cuda)
        return kept.copy_(flat, non_blocking=flat.is_cuda)

    def get(self, kept: Any, like: Tensor) -> Tensor:
        """(N,) back on the device of `like`, an empty tensor of the same dtype."""
        back: Tensor = kept.to(like.device, non_blocking=like.is_cuda)
        return back


class _Waiting:
    """A storage whose numbers wait; once it is back, it stays until nothing needs it any more."""

    def __init__(self, host: Host, flat: Tensor) -> None:
        self.host, self.kept = host, host.put(flat)
        self.like = flat.new_empty(0)
        self.there: Tensor | None = None

    def back(self) -> Tensor:
        if self.there is None:
            self.there, self.kept = self.host.get(self.kept, self.like), None
        return self.there


class Waits:
    """What the blocks of one model have in main memory.

    Args:
        host: where it waits.
    """

    def __init__(self, host: Host) -> None:
        self.host = host
        self._known: dict[tuple[int, int, torch.dtype], tuple[object, weakref.ref[_Waiting]]] = {}

    def run(self, block: nn.Module, inner: Checkpoint | None, run: Run, *inputs: Any) -> Any:
        """A block's forward pass.

        Args:
            block: whose weights stay where they are.
            inner: recomputes it, so that its inputs alone wait; None: it is kept.
            run: the forward pass.
            inputs: of it.
        """
        weights = _shapes(block)
        with torch.autograd.graph.saved_tensors_hooks(partial(self._pack, weights), _unpack):
            return run(*inputs) if inner is None else inner(run, *inputs)

    def _pack(self, weights: Set[Shape], tensor: Tensor) -> Any:
        shape = tuple(tensor.shape)
        stays = not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.numel() == 0
        if stays or shape in weights or shape[::-1] in weights:
            return tensor
        return self._of(tensor), shape, tensor.stride(), tensor.storage_offset()

    def _of(self, tensor: Tensor) -> _Waiting:
        """The storage of a tensor, put away once for all that is saved of it."""
        storage = self.host.storage(tensor)
        key = storage._cdata, tensor._version, tensor.dtype  # what was written into is another
        there = self._known[key][1]() if key in self._known else None
        if there is not None:
            return there
        with torch.no_grad():
            whole = tensor.detach().as_strided((storage.nbytes() // tensor.itemsize,), (1,), 0)
            made = _Waiting(self.host, whole)
        gone = weakref.ref(storage, partial(self._forget, key))  # another storage may come to lie at its address
        self._known[key] = gone, weakref.ref(made)
        return made

    def _forget(self, key: tuple[int, int, torch.dtype], _: object) -> None:
        self._known.pop(key, None)


def _shapes(block: nn.Module) -> frozenset[Shape]:
    """Of the weights of a block: what is saved in one of these shapes is one of them, or a cast copy of one."""
    return frozenset(tuple(tensor.shape) for tensor in (*block.parameters(), *block.buffers()))


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    waiting, shape, stride, offset = packed
    back: Tensor = waiting.back()
    return back.as_strided(shape, stride, offset)
