"""What a piece of work allocates, storage by storage, without doing it.

In: code that runs on tensors. Out: the order of its allocations and releases, each with its size, phase, module and
operation. The tensors are shadows: they say that they lie on a CPU, so that autocast, attention and fused kernels
choose as they do there, but they hold nothing; every operation runs on the meta device, where only shapes exist. Small
tensors that code looks into (positions, bounds, masks of padding) are real, so that it decides rightly. On real tensors
the same tracer measures.

What no shape decides (memory inside a kernel, the values of a mask) stands in `overrides.py`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx.experimental import _config as fx_config
from torch.utils._python_dispatch import TorchDispatchMode

from fitune.memory import known, overrides
from fitune.memory.known import Facts, facts, kind
from fitune.memory.operation import Args, Kwargs
from fitune.memory.shadow import META, Arguments, Shadow, becomes_shadow
from fitune.memory.storage import GRADIENTS, OTHER, PLAIN, TRAINABLE, WEIGHTS, Block
from fitune.models.kernels.loss import looks_on
from fitune.models.kernels.target import CPU, Target

aten = torch.ops.aten


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
        self._patch = fx_config.patch(meta_nonzero_assume_all_nonzero=True)  # type: ignore[attr-defined]  # not typed
        self._patch.__enter__()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._patch.__exit__(*error)


class Building(_Mode):
    """Inside, a model is built on meta by code that reads values: it gets those of a healthy run."""

    def __torch_dispatch__(self, func: OpOverload, types: object, args: Args = (), kwargs: Kwargs | None = None) -> Any:
        answer = overrides.SUPPOSED.get(func)
        if answer is not None and any(isinstance(one, Tensor) and one.device == META for one in args):
            return answer(*args, **(kwargs or {}))
        return overrides.BUILDING.get(func, func)(*args, **(kwargs or {}))


HOLDS = (Tensor, list, tuple)  # what may be or hold a tensor among the arguments of an operation
ON_HOST = -1  # in a block's place: it is not on the device that is planned for
STEP = "step"  # the phase of a forward and a backward pass
FAILED = "failed"  # a phase that no plan and no figure covers


class Tracer(_Mode):
    """Sees every allocation of what runs inside.

    Args:
        target: whose kernels' own memory is counted.
        real: it measures: nothing is made a shadow.

    `events` are (number of a block, bytes), negative where it is freed; `blocks` by that number; `course` says from
    which event on which phase and region it was. `once`, `again`: floating-point operations of the steps; the second of
    blocks that are recomputed, which is when a module runs in the backward pass.
    """

    def __init__(self, target: Target = CPU, *, real: bool = False) -> None:
        super().__init__()
        self.target, self.real = target, real
        self.blocks: list[Block] = []
        self.events: list[tuple[int, int]] = []
        self.course: list[tuple[int, str, str]] = []
        self.phase = self.region = self.module = ""
        self.host = False  # what is made now lies in main memory beside a GPU, and is not counted
        self.once = self.again = 0
        self.host_most = 0  # bytes of activations that wait there, at most (host.py)
        self.lost: set[int] = set()  # storages of real tensors that a shadow was written into
        self._results = known.results(target, torch.get_default_dtype())
        if len(self._results) > known.MOST:
            self._results.clear()
        self._live: dict[int, tuple[int, object]] = {}  # of a storage: its block, and what reports its end
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
            hooks.append(module.register_forward_pre_hook(looks_on(partial(enter, name))))
            hooks.append(module.register_forward_hook(looks_on(leave), always_call=True))
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

    def __torch_dispatch__(self, func: OpOverload, types: object, args: Args = (), kwargs: Kwargs | None = None) -> Any:
        with torch._C.DisableTorchFunction():  # what is looked at here is no call of the code that is traced
            return self._operation(func, args, kwargs or {})

    def _operation(self, func: OpOverload, args: Args, kwargs: Kwargs) -> Any:
        found, of = Arguments(), facts(func)
        out = self._ran(func, of, found, args, kwargs)
        if of.work is not None and self.phase == STEP:
            work = of.work(*args, **kwargs, out_val=out)
            if self.region == "backward" and self.module:
                self.again += work
            else:
                self.once += work
        return out

    def _ran(self, func: OpOverload, of: Facts, found: Arguments, args: Args, kwargs: Kwargs) -> Any:
        inner = [found.unwrap(one) if isinstance(one, HOLDS) else one for one in args]
        inner_kwargs = {name: found.unwrap(one) for name, one in kwargs.items()} if kwargs else {}
        if not found.shadows and (self.real or found.reals or not becomes_shadow(func, args, kwargs)):
            from_outside = {
                t.untyped_storage()._cdata for t in found.reals.values() if t.layout == torch.strided
            } - self._live.keys()
            out = func(*args, **kwargs)
            self._count(of, args, kwargs, out, from_outside)
            return out
        if of.supposed is not None:
            true = overrides.true_of(inner[0])
            return of.supposed(*args, **kwargs) if true is None else true > 0
        if found.reals:
            if of.mutable and isinstance(args[0], Tensor) and not isinstance(args[0], Shadow):
                self.lost.add(args[0].untyped_storage()._cdata)
            inner, inner_kwargs = [found.to_meta(one) for one in inner], found.to_meta(inner_kwargs)
        if "device" in inner_kwargs or not found.shadows:
            inner_kwargs["device"] = META
        out = self._on_meta(func, of, inner, inner_kwargs)
        if of.notes_true:
            overrides.note_true(of.name, inner, out)
        self._count(of, inner, inner_kwargs, out)
        return found.wrap(out)

    def _on_meta(self, func: OpOverload, of: Facts, args: Args, kwargs: Kwargs) -> Any:
        """The operation on meta. What it gives depends on shapes alone, so of each kind it is asked for once: blocks
        repeat, and for many operations torch works shapes out in Python."""
        if func is aten.nonzero.default and (true := overrides.true_of(args[0])) is not None:
            return args[0].new_empty((true, args[0].ndim), dtype=torch.long)
        key = (id(func), kind(args), kind(kwargs)) if of.makes or of.writes else None
        there = self._results.get(key) if key is not None else None
        if there:
            return args[0] if there is True else there.again()
        out = of.stand_in(self.target, *args, **kwargs) if of.stand_in else func(*args, **kwargs)
        if key is not None and there is None:
            # where it writes, shapes were checked, and on meta there is nothing that could be written
            same = of.writes and out is args[0] and (id(func), kind(args), kind(kwargs)) == key
            self._results[key] = same if of.writes else known.result(out, args)
        return out

    def _count(self, of: Facts, args: Args, kwargs: Kwargs, out: Any, outside: Set[int] = frozenset()) -> None:
        """Args: outside: storages that torch did not allocate, such as numpy's."""
        if of.inside is not None:
            self._inside_kernel(of.inside(self.target, args, kwargs, out), of.name)
        for one in out if isinstance(out, (tuple, list)) else (out,):
            if not isinstance(one, Tensor):
                continue
            if not outside or one.layout != torch.strided or one.untyped_storage()._cdata not in outside:
                self._see(one, of.name)
        if of.casts and args and isinstance(args[0], Tensor) and isinstance(out, Tensor):
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
