"""How a method is put on a model, on paper: what it takes while it starts, and where it leaves what it makes.

In: a model of shadows, code that puts a method on it. Out: the same allocations as for real, in the phase "start": a
decomposition's copies, and on a GPU what stays in main memory (a matrix that a method makes there and moves anew in
each step) is not counted as the GPU's. Nothing here computes values.

A shadow says that it lies on a CPU. Inside `Starting` those of the model say that they lie on the GPU that is planned
for, and what code makes without naming a device lies in main memory, until it is moved.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fitune.memory.operation import Args, Kwargs, Operation
from fitune.memory.shadow import Shadow
from fitune.memory.trace import Tracer

HOST = torch.device("cpu")
GPU = torch.device("cuda", 0)
MOVES = (Tensor.to, Tensor.cpu, Tensor.cuda)


class Starting(TorchFunctionMode):
    """See the module's text.

    Args:
        tracer: sees the allocations; it is entered beside.
        apart: the model lies on a GPU, and main memory is apart from it.
    """

    def __init__(self, tracer: Tracer, *, apart: bool) -> None:
        super().__init__()
        self.tracer, self.apart = tracer, apart

    def __torch_function__(self, func: Operation, types: object, args: Args = (), kwargs: Kwargs | None = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        of = getattr(func, "__self__", None)
        if of is Tensor.data and name == "__set__":
            return _replace(func, *args)
        if func is Tensor.numpy:
            return self._numbers(args[0])
        if not self.apart:
            return func(*args, **kwargs)
        if name == "__get__" and of in (Tensor.device, Tensor.is_cuda, Tensor.is_meta):
            there = self._lies(args[0])
            return {Tensor.device: there, Tensor.is_cuda: there.type == "cuda", Tensor.is_meta: False}[of]
        if func in MOVES:
            return self._move(func, args, kwargs)
        return self._made(func, args, kwargs)

    def _lies(self, tensor: Tensor) -> torch.device:
        return GPU if self.tracer.counts(tensor) else HOST

    def _move(self, func: Operation, args: Args, kwargs: dict[str, Any]) -> Any:
        """To another device it is a copy there; else torch decides whether it is one."""
        tensor, *rest = args
        here = self._lies(tensor)
        there = HOST if func is Tensor.cpu else GPU if func is Tensor.cuda else here
        dtype = kwargs.get("dtype")
        for one in [*rest, kwargs.get("device"), kwargs.get("other")]:
            if isinstance(one, Tensor):
                there, dtype = self._lies(one), one.dtype
            elif isinstance(one, (str, torch.device)) or (isinstance(one, int) and not isinstance(one, bool)):
                there = GPU if isinstance(one, int) else torch.device(one)
            elif isinstance(one, torch.dtype):
                dtype = one
        with self._making(host=there.type != "cuda"):
            out = tensor.to(dtype or tensor.dtype, copy=bool(kwargs.get("copy")))
            return out.clone() if here.type != there.type and out is tensor else out

    def _made(self, func: Operation, args: Args, kwargs: dict[str, Any]) -> Any:
        """What is made of tensors lies where they do; without any, on the device that is named."""
        named = kwargs.get("device")
        tensors = list(_tensors([*args, *kwargs.values()]))
        if named is not None:
            kwargs["device"] = HOST
            host = torch.device(named if not isinstance(named, int) else GPU).type != "cuda"
        elif tensors:
            host = all(self._lies(one) == HOST for one in tensors)
        else:
            host = True
        with self._making(host=host):
            return func(*args, **kwargs)

    def _numbers(self, tensor: Tensor) -> Any:
        """Numbers for code outside of torch (a clustering): those of no particular model, always the same."""
        if not isinstance(tensor, Shadow) and tensor.untyped_storage()._cdata not in self.tracer.lost:
            return tensor.numpy()
        return np.random.default_rng(0).standard_normal(tuple(tensor.shape)).astype(np.float32)

    @contextmanager
    def _making(self, *, host: bool) -> Iterator[None]:
        before, self.tracer.host = self.tracer.host, host
        try:
            yield
        finally:
            self.tracer.host = before


def _tensors(values: Iterable[object]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _replace(func: Operation, tensor: Tensor, value: Tensor) -> None:
    """`tensor.data = value`: a shadow's storage is that of what it stands for."""
    func(tensor, value)
    if isinstance(tensor, Shadow):
        tensor.meta = value.meta if isinstance(value, Shadow) else value.detach().to("meta")


def put_host_apart(model: nn.Module, tracer: Tracer) -> None:
    """What stays in main memory becomes plain tensors on meta: a move of one in a step is a copy on the GPU."""
    for module in model.modules():
        stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for store in stores:
            for name, tensor in store.items():
                if isinstance(tensor, Shadow) and not tracer.counts(tensor):
                    bare, learns = tensor.meta.detach(), tensor.requires_grad
                    store[name] = nn.Parameter(bare, learns) if isinstance(tensor, nn.Parameter) else bare
