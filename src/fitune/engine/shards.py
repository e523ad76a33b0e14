"""A model whose blocks are shared out: each process keeps its part of their weights, gradients and states.

In: a model, the same in every process, whole or with blocks that are read here, one after the other (`Unread`). Out:
the same steps, on shards. torch's FSDP2 (`fully_shard`, a group for each block; Zhao et al. 2023, arXiv:2304.11277)
gathers the weights of a block before its forward and its backward pass, and gives each process its part of the sum of
their gradients; frozen weights travel in the dtype that they are kept in. What is not in a block (embedding, last norm,
head) is whole in every process. The optimizer works on plain tensors that share their memory with the shards, so any
one whose update of a number needs nothing of the others can be used.

All processes must go through the model equally often: those that have fewer micro-batches take some for nothing
(`idle`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from fitune.core.errors import TrainingError
from fitune.core.records import Batch
from fitune.data.batches import split
from fitune.engine import optim
from fitune.engine.parallel import World
from fitune.engine.step import last_block_is_ready
from fitune.models import adapters, attached, families, quant
from fitune.models.interfaces import causal_lm, peft_of
from fitune.models.parts import trainable
from fitune.models.tensors import same_bits
from fitune.models.weights import safe
from fitune.models.weights.safe import Late

ELEMENTWISE = ("adamw", "adamw-foreach", "sgd", "lion")  # optimizers that update each number by itself


class _WithoutGradient(TorchFunctionMode):
    """Inside, nobody asks for gradients of packed bytes, which have none: torch before 2.12 does so of every shard that
    it makes, and takes it back on the next line."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is Tensor.requires_grad_ and not args[0].is_floating_point():
            return args[0]
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Saved:
    """What a checkpoint has, whole, in main memory: what is trained, the optimizer's states, its other values."""

    trained: Mapping[str, Tensor]
    states: Mapping[str, Tensor]
    scalars: Mapping[str, object]


class Unread(Protocol):
    """Blocks whose values are still in files (models/by_blocks.py)."""

    def fill(self, block: nn.Module) -> set[int]:
        """Give a block its values; ids of the parameters that have those of the files."""


@dataclass
class Shards:
    """The shards of a model.

    Args:
        model: is shared out, and stays so. What process 0 trains, all have afterwards.
        world: the processes.
        unread: of its blocks; None: they are whole.
    """

    model: nn.Module
    world: World
    unread: Unread | None = None
    local: dict[str, nn.Parameter] = field(default_factory=dict)  # what the optimizer of this process updates

    def __post_init__(self) -> None:
        attached.of(self.model).copies = nullcontext
        inner = causal_lm(self.model)
        *others, last = families.of(inner).block_list(inner)
        blocks = [last, *others]
        known = self._filled(last)
        last_block_is_ready(self.model)  # tried on a model of one block, which must not be taken for the root of all
        for block in blocks:
            self._cut(block, known if block is last else self._filled(block))
        outside = {p for p in inner.base_model.parameters() if not isinstance(p, DTensor)}
        fully_shard(inner.base_model, mesh=self.mesh, ignored_params=outside)
        for whole in (*blocks, inner.base_model):
            module = cast(FSDPModule, whole)
            module.set_gradient_divide_factor(1.0)  # the loss is divided by the weight of the whole step
            module.set_force_sum_reduction_for_comms(True)
            if self.mesh.device_type == "cpu":
                # no block is gathered while another computes on the same cores: what that takes would depend on time
                module.set_modules_to_backward_prefetch([module])
        for parameter in self.outside:
            self.world.broadcast(parameter.data)
        self.local = {
            name: nn.Parameter(p.to_local().detach()) if isinstance(p, DTensor) else p
            for name, p in trainable(self.model).items()
        }

    def _filled(self, block: nn.Module) -> set[int]:
        return set() if self.unread is None else self.unread.fill(block)

    def _cut(self, block: nn.Module, known: set[int]) -> None:
        """Keep a part of a block that is whole. known: ids of what all processes have from the same files."""
        for _, layer in quant.layers(block):
            quant.keep_apart(layer)
        packed: list[tuple[Any, int]] = [(layer, quant.numel(layer.weight)) for _, layer in quant.packed(block)]
        parameters = list(block.parameters())
        for parameter in parameters:
            if parameter.requires_grad and id(parameter) not in known:
                self.world.broadcast(parameter.data)
        with _WithoutGradient():
            fully_shard(block, mesh=self.mesh, reshard_after_forward=True)
        for layer, count in packed:
            layer.weight.stands_for = count
        for parameter in parameters:  # before the next block's parts are made
            parameter.data = parameter.data.new_empty(0)

    @cached_property
    def mesh(self) -> DeviceMesh:
        """All processes, in one row."""
        return init_device_mesh(next(causal_lm(self.model).parameters()).device.type, (self.world.size,))

    @property
    def outside(self) -> list[nn.Parameter]:
        """What is trained and whole in every process."""
        return [p for p in trainable(self.model).values() if not isinstance(p, DTensor)]

    # ---- a step ----

    def idle(self, mine: Sequence[Batch], step: Sequence[Batch], most: int) -> list[Batch]:
        """What this process takes through the model for nothing, so that it does so as often as the others.

        Args:
            mine: its micro-batches of a step.
            step: those of all.
            most: how many the process with most has.
        """
        row = split(step[0], len(step[0].rows))[0]
        return [row] * (most - len(mine))

    def gradients(self) -> list[nn.Parameter]:
        """The optimizer's tensors, with the gradients of the step that was made."""
        for name, parameter in trainable(self.model).items():
            if isinstance(parameter, DTensor):
                mine = self.local[name]
                mine.data = parameter.to_local().detach()  # FSDP may have moved it before its first step
                mine.grad = None if parameter.grad is None else cast(DTensor, parameter.grad).to_local()
                parameter.grad = None
        return list(self.local.values())

    def norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Of all gradients, float64, the same in every process."""
        whole = {id(p) for p in self.outside}
        squares = [(id(p) in whole, p.grad.double().square().sum()) for p in parameters if p.grad is not None]
        zero = torch.zeros((), dtype=torch.float64)
        shards = sum((s.cpu() for outside, s in squares if not outside), zero)
        shards = self.world.added(shards[None].clone())[0]
        return (shards + sum((s.cpu() for outside, s in squares if outside), zero)).sqrt()

    def drop(self) -> None:
        """Forget all gradients."""
        for parameter in (*self.local.values(), *trainable(self.model).values()):
            parameter.grad = None

    # ---- where a run stands ----

    def begin(
        self,
        make: Callable[[Mapping[str, nn.Parameter]], torch.optim.Optimizer],
        progress: Mapping[str, Any],
        saved: Saved | None = None,
    ) -> tuple[torch.optim.Optimizer, dict[str, Any]]:
        """From where process 0 stands; it alone has what is saved.

        Args:
            make: the run's optimizer of some tensors.
            progress: numbers; JSON.
            saved: of a checkpoint; None: the run begins, or this is not process 0.

        Returns:
            The optimizer of the shards, with its states, and the progress of process 0.

        Raises:
            TrainingError: the shards have other bits than what is saved.
        """
        states, scalars = ({}, {}) if saved is None else (saved.states, saved.scalars)
        forms = {name: [str(one.dtype).removeprefix("torch."), list(one.shape)] for name, one in states.items()}
        how = {"states": forms, "scalars": scalars, "progress": dict(progress), "again": saved is not None}
        begun = self.world.decided(how)
        if begun["again"]:
            self.put({} if saved is None else saved.trained)
        made = make(self.local)
        mine = {
            name: self._dealt(name.rpartition("|")[0], states.get(name), torch.Size(shape), getattr(torch, dtype))
            for name, (dtype, shape) in begun["states"].items()
        }
        optim.load_state(made, self.local, mine, begun["scalars"])
        if begun["again"]:
            self._check_dealt(made, saved)
        progress_: dict[str, Any] = begun["progress"]
        return made, progress_

    def _check_dealt(self, made: torch.optim.Optimizer, saved: Saved | None) -> None:
        """Collect what was dealt out, a tensor at a time; process 0 compares it with what is saved."""
        trained, states, _ = self.contents(made)
        stored = {} if saved is None else {**saved.trained, **saved.states}
        wrong = []
        for name, late in (*trained.items(), *states.items()):
            whole = late.make()
            if whole is not None and not (name in stored and same_bits(whole, stored[name].cpu())):
                wrong.append(name)
        if wrong:
            raise TrainingError(
                f"{len(wrong)} tensors of the shards are not those of the checkpoint",
                received=", ".join(wrong[:3]),
                fix="this is an error of fitune: please report it",
            )

    def _dealt(self, name: str, whole: Tensor | None, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """This process's part of a tensor of process 0 that is as large as the named parameter; the tensor itself,
        where that is in no block, or where it is of another size."""
        parameter = trainable(self.model)[name]
        if isinstance(parameter, DTensor) and shape == parameter.shape:
            mine = torch.empty(parameter.to_local().shape, dtype=dtype)
            self.world.dealt(whole, mine)
            return mine
        whole = torch.empty(shape, dtype=dtype) if whole is None else whole
        self.world.broadcast(whole)
        return whole

    # ---- whole tensors ----

    def late(self, name: str, mine: Tensor) -> Late:
        """A tensor of which this process has a part, or all of it, whole for process 0 once all processes make it."""
        parameter = trainable(self.model)[name]
        apart = isinstance(parameter, DTensor) and mine.shape == parameter.to_local().shape

        def make() -> Tensor | None:
            if apart:
                return self.world.collected(mine.detach(), parameter.shape)
            return mine.detach().cpu() if self.world.rank == 0 else None

        return Late(mine.dtype, parameter.shape if apart else mine.shape, make)

    def contents(self, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Late], dict[str, Late], Any]:
        """What a checkpoint holds: what is trained, and the optimizer's states, and its other values. Every process
        makes the tensors, in the same order (`attend`); process 0 gets them, one at a time."""
        trained = {name: self.late(name, p) for name, p in self.local.items()}
        tensors, scalars = optim.state_tensors(optimizer, self.local)
        states = {name: self.late(name.rpartition("|")[0], one) for name, one in tensors.items()}
        return trained, states, scalars

    @contextmanager
    def saving(self) -> Iterator[dict[str, Late]]:
        """Inside, process 0 can save what was trained, and read it back: it makes the tensors of fitune's own methods
        one at a time; PEFT's, which are small beside a model, are whole in it, and none are given."""
        if peft_of(self.model) is None:
            yield self._own()
            return
        kept = []
        for module, leaf, name in self._places():
            whole = self.late(name, self.local[name]).make()
            if whole is not None:
                kept.append((module, leaf, module._parameters[leaf]))
                module._parameters[leaf] = nn.Parameter(whole)
        try:
            yield {}
        finally:
            for module, leaf, parameter in kept:
                module._parameters[leaf] = parameter

    def _own(self) -> dict[str, Late]:
        return {name: self.late(name, self.local[name]) for name in adapters.trained_names(self.model)}

    def _places(self) -> list[tuple[nn.Module, str, str]]:
        """Each trained tensor of a block: its module, and its name in that and in the model."""
        parts = [(name.rpartition("."), name) for name, p in trainable(self.model).items() if isinstance(p, DTensor)]
        return [(self.model.get_submodule(parent), leaf, name) for (parent, _, leaf), name in parts]

    def attend_saving(self) -> None:
        """What the other processes do while process 0 saves: it writes, and reads back."""
        if peft_of(self.model) is None:
            for _ in ("written", "compared"):
                attend(self._own())
        else:
            with self.saving():
                pass

    @torch.no_grad()
    def put(self, whole: Mapping[str, Tensor]) -> None:
        """Give what is trained these values, which process 0 has; each process gets its part."""
        for name, parameter in trainable(self.model).items():
            mine = self.local[name].data
            if isinstance(parameter, DTensor):
                self.world.dealt(whole.get(name), mine)
                continue
            if self.world.rank == 0:
                mine.copy_(whole[name])
            self.world.broadcast(mine)


def attend(tensors: Mapping[str, Late]) -> None:
    """Make tensors that process 0 writes, in its order."""
    for _, one in safe.in_order(tensors):
        one.make()


@contextmanager
def gathered(model: nn.Module, module: nn.Module) -> Iterator[None]:
    """Inside, the block of a model in shards that a module belongs to is whole; what is written into it is lost. All
    processes must ask."""
    blocks = [one for one in model.modules() if isinstance(one, FSDPModule) and module in set(one.modules())]
    for block in blocks[-1:]:  # the innermost
        block.unshard()
    try:
        yield
    finally:
        for block in blocks[-1:]:
            block.reshard()
