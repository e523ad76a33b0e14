"""What a piece of work allocates, storage by storage, without doing it.

In: code that runs on tensors. Out: the order of its allocations and releases, each with its size, phase, module and
operation. The tensors are shadows: they say that they lie on a CPU, so that autocast, attention and fused kernels
choose as they do there, but they hold nothing; every operation runs on the meta device, where only shapes exist. Small
tensors that code looks into (positions, bounds, masks of padding) are real, so that it decides rightly. On real tensors
the same tracer measures.

What no shape tells (memory inside a kernel, numbers that decide) stands in `overrides.py`.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as fx_config
from torch.utils._python_dispatch import TorchDispatchMode

from fitune.memory import overrides
from fitune.models.kernels.target import CPU, Target

aten = torch.ops.aten
REAL = 2**16  # elements up to which integer tensors are computed
META = torch.device("meta")

# ---- categories ----
WEIGHTS, CONSTANTS, TRAINABLE = "frozen weights", "quantization constants", "trainable weights"
GRADIENTS, STATES, ACTIVATIONS = "gradients", "optimizer states", "activations"
LOSS, PLAIN, OTHER = "logits and loss", "dequantized and cast weights", "temporaries"
CATEGORIES = (WEIGHTS, CONSTANTS, TRAINABLE, GRADIENTS, STATES, ACTIVATIONS, LOSS, PLAIN, OTHER)


@dataclass(slots=True)
class Block:
    """A storage. phase, module, op: where it was made; born, freed: at which event (None: it is still there).

    category: where that is known from the start; region: forward, loss or backward of a step, or none of them.
    """

    bytes: int
    phase: str
    region: str
    module: str
    op: str
    born: int
    freed: int | None = None
    freed_region: str = ""
    category: str = ""

    @property
    def kind(self) -> str:
        """Its category, where it is not known from the start by where it was made and how long it lived."""
        if self.category:
            return self.category
        if self.region == "loss":
            return LOSS
        kept = self.region == "forward" and self.freed_region != "forward"
        recomputed = self.region == "backward" and self.module != ""
        return ACTIVATIONS if kept or recomputed else OTHER


class Shadow(torch.Tensor):
    """A tensor that holds nothing; `meta`, on the meta device, has its shape and storage."""

    meta: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, requires_grad: bool = False) -> Shadow:
        made: Shadow = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device("cpu"),
            requires_grad=requires_grad,
        )
        made.meta = inner
        return made

    def tolist(self) -> Any:
        """A list of its shape, for code that must have one."""
        return np.zeros(tuple(self.shape), float if self.dtype.is_floating_point else int).tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Another shadow, of memory of its own."""
        if id(self) not in memo:
            made = self.detach().clone()
            kept = nn.Parameter(made, requires_grad=self.requires_grad) if isinstance(self, nn.Parameter) else made
            memo[id(self)] = kept
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Work on shadows is the tracer's; outside of it there is none."""
        raise RuntimeError(f"{func}: a shadow outside of its tracer")

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return f"Shadow({tuple(self.shape)}, {self.dtype})"


class Blind:
    """In a tracer's place, where something else measures: it sees nothing."""

    def __enter__(self) -> Blind:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def during(self, phase: str) -> Blind:
        """See Tracer."""
        return self

    def inside(self, model: nn.Module, body: nn.Module) -> Blind:
        """See Tracer."""
        return self

    def own(self, tensor: Tensor, category: str) -> None:
        """See Tracer."""

    def brief(self, size: int, op: str) -> None:
        """See Tracer."""


class _Mode(TorchDispatchMode):
    """Inside, what is looked for in a tensor without values is found everywhere."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing here is compiled: torch's guard against that would take as long as an operation on meta."""
        return False

    def __enter__(self) -> Any:
        self._patch = fx_config.patch(meta_nonzero_assume_all_nonzero=True)  # type: ignore[attr-defined]
        self._patch.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.__exit__(*error)


class Building(_Mode):
    """Inside, a model is built on meta by code that reads values: it gets those of a healthy run."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        answer = overrides.SUPPOSED.get(func)
        if answer is not None and any(isinstance(one, Tensor) and one.device == META for one in args):
            return answer(*args, **(kwargs or {}))
        return overrides.BUILDING.get(func, func)(*args, **(kwargs or {}))


ON_HOST = -1  # in a block's place: it is not on the device that is planned for
FAILED = "failed"  # a phase that no plan and no figure tells of


class Tracer(_Mode):
    """Sees every allocation of what runs inside.

    Args:
        target: whose kernels' own memory is counted.
        real: it measures: nothing is made a shadow.

    `events` are (number of a block, bytes), negative where it is freed; `blocks` by that number; `course` says from
    which event on which phase and region it was.
    """

    def __init__(self, target: Target = CPU, *, real: bool = False) -> None:
        super().__init__()
        self.target, self.real = target, real
        self.blocks: list[Block] = []
        self.events: list[tuple[int, int]] = []
        self.course: list[tuple[int, str, str]] = []
        self.phase = self.region = self.module = ""
        self.host = False  # what is made now lies in main memory beside a GPU, and is not counted
        self.lost: set[int] = set()  # storages of real tensors that a shadow was written into
        self._results: dict[Any, Any] = {}  # of operations that were asked before
        self._live: dict[int, tuple[int, Any]] = {}  # of a storage: its block, and what tells of its end
        self._open = True

    # ---- where we are ----

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Inside, allocations belong to this phase. What fails belongs to none: it is tried again in another way."""
        first = len(self.course)
        self.at(phase)
        try:
            yield
        except BaseException:
            self.course[first:] = [(at, FAILED, "") for at, _, _ in self.course[first:]]
            raise
        finally:
            self.at("")

    def at(self, phase: str, region: str = "") -> None:
        """From now on it is this phase, and region of it."""
        self.phase, self.region = phase, region
        self.course.append((len(self.events), phase, region))

    @contextmanager
    def inside(self, model: nn.Module, body: nn.Module) -> Iterator[None]:
        """Inside, allocations know which module is at work, and whether it is forward, loss or backward.

        Args:
            model: all of it.
            body: the part of it that gives the last hidden states; what comes behind it is the loss.
        """
        stack: list[str] = []

        def enter(name: str, module: nn.Module, inputs: object) -> None:
            stack.append(self.module)
            self.module = name
            if module is body:
                self.at(self.phase, "forward")

        def leave(module: nn.Module, inputs: object, output: Any) -> None:
            self.module = stack.pop() if stack else ""
            if module is body:
                self.at(self.phase, "loss")
                last = getattr(output, "last_hidden_state", None)
                if last is not None and last.requires_grad:
                    last.register_hook(backward)

        def backward(grad: Tensor) -> None:
            self.at(self.phase, "backward")

        hooks: list[Any] = []
        for name, module in model.named_modules():
            hooks.append(module.register_forward_pre_hook(partial(enter, name)))
            hooks.append(module.register_forward_hook(leave, always_call=True))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        hooks.extend(parameter.register_post_accumulate_grad_hook(self._gradient) for parameter in trained)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self.module = ""
            self.at("")

    def _gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.own(parameter.grad, GRADIENTS)

    # ---- storages ----

    def own(self, tensor: Tensor, category: str) -> Block:
        """Give the storage of a tensor its category; from now on it is counted."""
        number = self._see(tensor.meta if isinstance(tensor, Shadow) else tensor, "")
        if number == ON_HOST:
            return Block(0, self.phase, self.region, self.module, "", 0)
        self.blocks[number].category = category
        return self.blocks[number]

    def category(self, tensor: Tensor) -> str:
        """Of a tensor that is counted already."""
        known = self._live.get(tensor.untyped_storage()._cdata)
        return self.blocks[known[0]].category if known and known[0] != ON_HOST else ""

    def counts(self, tensor: Tensor) -> bool:
        """Is it counted: does it lie on the device that is planned for?"""
        inner = tensor.meta if isinstance(tensor, Shadow) else tensor
        known = self._live.get(inner.untyped_storage()._cdata) if inner.layout == torch.strided else None
        return known is not None and known[0] != ON_HOST

    def _see(self, tensor: Tensor, op: str) -> int:
        if tensor.layout == torch.sparse_coo:
            self._see(tensor._indices(), op)
            return self._see(tensor._values(), op)
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._live.get(key)
        if known is not None:
            return known[0]
        number, size = len(self.blocks), storage.nbytes()
        if self.host:
            number = ON_HOST
        else:
            self.blocks.append(Block(size, self.phase, self.region, self.module, op, len(self.events)))
            self.events.append((number, size))
        self._live[key] = (number, weakref.ref(storage, partial(self._freed, key)))
        return number

    def _freed(self, key: int, _: object) -> None:
        number, _ref = self._live.pop(key)
        self.lost.discard(key)
        if self._open and number != ON_HOST:
            self._release(number)

    def _release(self, number: int) -> None:
        block = self.blocks[number]
        block.freed, block.freed_region = len(self.events), self.region
        self.events.append((number, -block.bytes))

    def close(self) -> None:
        """From now on nothing is recorded."""
        self._open = False
        self._order_casts()

    def _order_casts(self) -> None:
        """Autocast keeps its casts in no order, and frees them so, all at once: let them end as they began."""
        edges, first = {at for at, _, _ in self.course}, 0
        while first < len(self.events):
            last = first
            while last < len(self.events) and self._ends_cast(last) and (last == first or last not in edges):
                last += 1
            if last - first > 1:
                for at, number in zip(range(first, last), sorted(n for n, _ in self.events[first:last]), strict=True):
                    self.blocks[number].freed = at
                    self.events[at] = (number, -self.blocks[number].bytes)
            first = max(last, first + 1)

    def _ends_cast(self, event: int) -> bool:
        number, _ = self.events[event]
        block = self.blocks[number]
        return block.born != event and block.op == "aten::_to_copy" and block.category in ("", PLAIN)

    # ---- operations ----

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        found = _Tensors()
        inner = [found.unwrap(one) for one in args]
        inner_kwargs = {name: found.unwrap(one) for name, one in kwargs.items()}
        if not found.shadows and (self.real or found.reals or not _becomes_shadow(func, args, kwargs)):
            from_outside = {
                t.untyped_storage()._cdata for t in found.reals.values() if t.layout == torch.strided
            } - self._live.keys()
            out = func(*args, **kwargs)
            self._count(func, args, kwargs, out, from_outside)
            return out
        if func in overrides.SUPPOSED:
            known = overrides.true_of(inner[0])
            return overrides.SUPPOSED[func](*args, **kwargs) if known is None else known > 0
        if found.reals:
            if func._schema.is_mutable and isinstance(args[0], Tensor) and not isinstance(args[0], Shadow):
                self.lost.add(args[0].untyped_storage()._cdata)
            inner, inner_kwargs = [found.to_meta(one) for one in inner], found.to_meta(inner_kwargs)
        if "device" in inner_kwargs or not found.shadows:
            inner_kwargs["device"] = META
        out = self._on_meta(func, inner, inner_kwargs)
        overrides.note_true(func, inner, out)
        self._count(func, inner, inner_kwargs, out)
        return found.wrap(out)

    def _on_meta(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The operation on meta. What it gives depends on shapes alone, so of each kind it is asked for once: blocks
        repeat, and for many operations torch works shapes out in Python."""
        key = (func, _key(args), _key(kwargs)) if _makes_new(func) else None
        known = self._results.get(key) if key is not None else None
        if known:
            made = [like if spec is None else torch.empty_strided(*spec[:2], dtype=spec[2], device=META)
                    for like, spec in known[1]]  # fmt: skip
            return made[0] if known[0] is None else known[0](made)
        if func is aten.nonzero.default and (true := overrides.true_of(args[0])) is not None:
            return args[0].new_empty((true, args[0].ndim), dtype=torch.long)
        stand_in = overrides.STANDS_IN.get(func)
        out = stand_in(self.target, *args, **kwargs) if stand_in else func(*args, **kwargs)
        if key is not None and known is None:
            kind = type(out) if isinstance(out, (tuple, list)) else None
            outs = out if kind else (out,)
            again = _are_new(outs, args)
            self._results[key] = (kind, [_spec(one) for one in outs]) if again else False
        return out

    def _count(
        self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any, outside: Set[int] = frozenset()
    ) -> None:
        """Args: outside: storages that torch did not allocate, such as numpy's."""
        name = func._schema.name
        own = overrides.INSIDE.get(name)
        if own is not None:
            self._inside_kernel(own(self.target, args, kwargs, out), name)
        for one in out if isinstance(out, (tuple, list)) else (out,):
            if not isinstance(one, Tensor):
                continue
            if not outside or one.layout != torch.strided or one.untyped_storage()._cdata not in outside:
                self._see(one, name)
        if name in CASTS and args and isinstance(args[0], Tensor) and isinstance(out, Tensor):
            self._cast(args[0], out)

    def _cast(self, source: Tensor, out: Tensor) -> None:
        """A weight made plain, or cast, for a product."""
        known = self._live.get(source.untyped_storage()._cdata)
        there = self._live[out.untyped_storage()._cdata][0]
        if known is None or ON_HOST in (known[0], there):
            return
        if self.blocks[known[0]].category not in (WEIGHTS, TRAINABLE):
            return
        made = self.blocks[there]
        made.category = made.category or PLAIN

    def brief(self, size: int, op: str) -> None:
        """Memory that something takes and gives back, where only its size is known."""
        self._inside_kernel([size], op)

    def _inside_kernel(self, sizes: Sequence[int], op: str) -> None:
        """Memory that a kernel takes for itself, beside its outputs, and gives back."""
        first = len(self.blocks)
        for size in sizes:
            if size:
                number = len(self.blocks)
                self.blocks.append(Block(size, self.phase, self.region, self.module, op, len(self.events)))
                self.blocks[number].category = OTHER
                self.events.append((number, size))
        for number in range(first, len(self.blocks)):
            self._release(number)


@cache
def _makes_new(func: Any) -> bool:
    """Does an operation give new tensors, and nothing else that a shape does not decide?"""
    schema = func._schema
    return bool(schema.returns) and not schema.is_mutable and all(one.alias_info is None for one in schema.returns)


def _are_new(outs: Sequence[Any], args: Sequence[Any]) -> bool:
    """Are results whole storages of their own? Some operations (_unsafe_view) do not say that they give a view."""
    given = [t for one in args for t in (one if isinstance(one, (list, tuple)) else (one,)) if isinstance(t, Tensor)]
    theirs = {tensor.untyped_storage()._cdata for tensor in given}
    return all(
        tensor.untyped_storage()._cdata not in theirs
        and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        for tensor in outs
        if isinstance(tensor, Tensor)
    )


def _key(value: Any) -> Any:
    """What decides the shape of a result, hashable."""
    if isinstance(value, Tensor):
        return value.dtype, value.size(), value.stride()
    if isinstance(value, (list, tuple)):
        return tuple([_key(one) for one in value])
    if isinstance(value, Mapping):
        return tuple([(name, _key(one)) for name, one in value.items()])
    return type(value), value


def _spec(value: Any) -> tuple[Any, Any]:
    """A result as it can be made again: a value, or size, stride and dtype of a tensor."""
    if isinstance(value, Tensor):
        return None, (value.size(), value.stride(), value.dtype)
    return value, None


CASTS = {"aten::_to_copy", "bitsandbytes::dequantize_4bit", "aten::dequantize"}


class _Tensors:
    """The tensors among the arguments of one operation: shadows, and real ones."""

    def __init__(self) -> None:
        self.shadows: dict[int, Shadow] = {}  # by the id of what is inside
        self.reals: dict[int, Tensor] = {}  # by the id of their stand-in

    def unwrap(self, value: Any) -> Any:
        kind = type(value)
        if isinstance(value, Tensor):
            if isinstance(value, Shadow):
                self.shadows[id(value.meta)] = value
                return value.meta
            if value.device == META:  # beside the parameters, as PEFT keeps the numbers of its virtual tokens
                self.shadows[id(value)] = Shadow(value)
                return value
            self.reals[id(value)] = value
            return value
        if kind is list or kind is tuple:
            return kind([self.unwrap(one) for one in value])
        return value

    def to_meta(self, value: Any) -> Any:
        """Of real tensors beside shadows the shapes alone."""
        kind = type(value)
        if kind is list or kind is tuple:
            return kind([self.to_meta(one) for one in value])
        if kind is dict:
            return {name: self.to_meta(one) for name, one in value.items()}
        if isinstance(value, Tensor) and value.device != META:
            made = value.to(META)
            self.reals[id(made)] = value  # so that what is written into a real tensor is that tensor
            return made
        return value

    def wrap(self, out: Any) -> Any:
        kind = type(out)
        if isinstance(out, Tensor):
            known: Tensor | None = self.shadows.get(id(out))
            known = self.reals.get(id(out)) if known is None else known
            return Shadow(out) if known is None else known
        if kind is list or kind is tuple:
            return kind([self.wrap(one) for one in out])
        return out


# What code looks into: masks, positions, bounds, the codes of bitsandbytes. Of these small ones are computed.
LOOKED_INTO = {f"aten::{name}" for name in ("arange", "full", "linspace", "ones", "randperm", "scalar_tensor", "zeros")}


def _becomes_shadow(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Does an operation without tensors make one that is to be a shadow?"""
    schema = func._schema
    if kwargs.get("device") == META or not any(one.name == "device" for one in schema.arguments):
        return False
    dtype = kwargs.get("dtype")
    if schema.name not in LOOKED_INTO and (dtype is None or dtype.is_floating_point):
        return True
    if schema.name in ("aten::arange", "aten::linspace", "aten::randperm"):
        return max((abs(one) for one in args if isinstance(one, (int, float))), default=0) > REAL
    shape = args[0] if args and isinstance(args[0], (list, tuple)) else ()
    return math.prod(shape) > REAL


def shadows(model: nn.Module, tracer: Tracer) -> None:
    """Turn a model on meta into shadows, each counted: frozen, trainable, constants of quantized weights.

    Args:
        model: parameters and buffers on meta; tensors that share storage stay one.
        tracer: counts them.
    """
    maker = _Shadows(tracer)
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for key, tensor in store.items():
                if tensor is not None:
                    store[key] = maker.of(tensor, TRAINABLE if tensor.requires_grad else WEIGHTS)


@cache
def _kind(name: str) -> type[Shadow]:
    """Shadows of weights that bitsandbytes packed are called as those are: PEFT knows them by this name."""
    return type(name, (Shadow,), {}) if name in ("Params4bit", "Int8Params") else Shadow


def count(model: nn.Module, tracer: Tracer) -> int:
    """Count the tensors of a real model, as `shadows` does; their bytes."""
    before = len(tracer.events)
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for tensor in store.values():
                if tensor is not None:
                    tracer.own(tensor, TRAINABLE if tensor.requires_grad else WEIGHTS)
                    for beside in vars(tensor).values():
                        _count_constants(beside, tracer)
    return sum(size for _, size in tracer.events[before:])


def _count_constants(value: Any, tracer: Tracer) -> None:
    if isinstance(value, Tensor) and value.numel():
        tracer.own(value, tracer.category(value) or CONSTANTS)
    elif type(value).__name__ == "QuantState":
        for one in vars(value).values():
            _count_constants(one, tracer)


class _Shadows:
    """Shadows of tensors, each made once."""

    def __init__(self, tracer: Tracer) -> None:
        self.tracer = tracer
        self.made: dict[int, tuple[Any, Tensor]] = {}  # with the tensor itself, so that no other gets its id

    def of(self, tensor: Tensor, category: str) -> Any:
        """One tensor's; a parameter stays one, and what is remembered beside it becomes a shadow too."""
        if id(tensor) in self.made:
            return self.made[id(tensor)][0]
        small = tensor.device != META and not tensor.is_floating_point() and tensor.numel() <= REAL
        if isinstance(tensor, Shadow) or small:  # made by what was traced; code looks into small ones
            self.tracer.own(tensor, category)
            return tensor
        made: Any = _kind(type(tensor).__name__)(tensor.detach().to(META), requires_grad=tensor.requires_grad)
        self.tracer.own(made, category)
        if isinstance(tensor, nn.Parameter):
            made._is_param = True
        made.__dict__.update({name: self.constants(value) for name, value in tensor.__dict__.items()})
        self.made[id(tensor)] = made, tensor
        return made

    def constants(self, value: Any) -> Any:
        """Scales and codes beside a quantized weight: tensors, or an object of bitsandbytes that holds some."""
        if isinstance(value, Tensor):
            return self.of(value, CONSTANTS)
        if type(value).__name__ != "QuantState":
            return value
        there = copy(value)
        for name, one in vars(value).items():
            setattr(there, name, self.constants(one))
        return there
