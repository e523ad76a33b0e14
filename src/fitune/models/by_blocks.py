"""A model that is read block by block, so that no more of it than one block needs to be whole anywhere.

In: the files of a model. Out: the model, ready, with all that is in no block (embedding, last norm, head); its blocks
have stand-ins, one number each that passes for a tensor, until they are filled. A method is attached meanwhile: it sees
shapes, dtypes and the device. transformers' own loader reads each part, so that what it renames, joins and quantizes is
as in a whole model: it is given the model's class without the other blocks, and leaves out their tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from fitune.core.config import RunConfig
from fitune.models import attached, families, methods, quant
from fitune.models.configs import without_weights
from fitune.models.interfaces import CausalLM
from fitune.models.kernels.frozen import Frozen
from fitune.models.load import Files
from fitune.models.prepare import ready
from fitune.models.quant import experts

Look = Callable[[CausalLM], None]


@dataclass(frozen=True)
class _Block:
    """A block of stand-ins. parameters: by name in the block, with the dtypes that they had before anything was done
    to the model. buffers: the same. packed: its layers in few bits."""

    module: nn.Module
    parameters: dict[str, tuple[nn.Parameter, torch.dtype]]
    buffers: dict[str, Tensor]
    packed: dict[str, Frozen]


@dataclass
class ByBlocks:
    """A model, and what its blocks are filled from.

    Args:
        files: of the model.
        kind: its class.
        place: of its blocks.
        look: is called with each part that was read, before it becomes part of the model.
    """

    files: Files
    kind: type[nn.Module]
    place: str
    look: Look
    _blocks: list[_Block] = field(default_factory=list)
    _missing: set[str] = field(default_factory=set)
    _left: set[str] | None = None  # tensors of the files that no part has had a place for
    _wrong: list[object] = field(default_factory=list)
    _known: attached.Attached = field(default_factory=attached.Attached)  # of the model

    def begun(self) -> CausalLM:
        """The model, with stand-ins for its blocks.

        Raises:
            ModelError: it cannot be read.
        """
        aside: list[nn.Module] = []
        model: Any = self._read(None, aside)
        model.__class__ = self.kind
        there = model.get_submodule(self.place)
        for number, block in enumerate(aside):
            there[number] = block.eval()
        self.files.packed_without_values(model, f"{self.place}.")
        self._blocks = [self._with_stand_ins(block) for block in there]
        self._known = attached.of(model)
        return ready(model, self.files.precision)

    def fill(self, block: nn.Module) -> set[int]:
        """Give a block its values; ids of the parameters that have them now. One that a method made has them.

        Raises:
            ModelError: it cannot be read.
        """
        number = next((number for number, one in enumerate(self._blocks) if one.module is block), None)
        if number is None:
            return set()
        known = self._blocks[number]
        whole = self._read(number, [])
        self._known.faults += [fault for fault in attached.of(whole).faults if fault not in self._known.faults]
        part = whole.get_submodule(f"{self.place}.{number}")
        values: dict[str, Tensor] = dict(part.named_parameters())
        for name, (parameter, dtype) in known.parameters.items():
            read = values[name].data
            # where a method or the precision asked for another dtype, the stand-in has it
            parameter.data = read if parameter.dtype == dtype else read.to(parameter.dtype)
        for name, layer in known.packed.items():
            quant.take_over(layer, cast(Frozen, part.get_submodule(name)))
        fresh = dict(part.named_buffers())
        for module in block.modules():
            for leaf, buffer in module._buffers.items():
                known_as = next((name for name, one in known.buffers.items() if one is buffer), None)
                if known_as is not None:
                    module._buffers[leaf] = fresh[known_as]
        return {id(parameter) for parameter, _ in known.parameters.values()}  # none of few bits is trained

    def check(self) -> None:
        """Had each tensor of the model a file, and each of the files a place? Once all blocks are filled.

        Raises:
            ModelError: some had not.
        """
        found = {"missing_keys": self._missing, "unexpected_keys": self._left or (), "mismatched_keys": self._wrong}
        self.files.strict(found)

    def _read(self, keep: int | None, aside: list[nn.Module]) -> CausalLM:
        model, info = self.files.read(_part_of(self.kind, self.place, keep, aside))
        self._missing |= set(info["missing_keys"])
        left = set(info["unexpected_keys"])
        self._left = left if self._left is None else self._left & left
        self._wrong += info.get("mismatched_keys") or ()
        self.look(model)
        return model

    def _with_stand_ins(self, block: nn.Module) -> _Block:
        device, packed = torch.device(self.files.device), dict(quant.layers(block))
        for module in block.modules():
            for leaf, one in module._parameters.items():
                if one is not None:
                    module._parameters[leaf] = made = nn.Parameter(_stand_in(one, device), requires_grad=False)
                    vars(made).update(vars(one))  # how it is packed
        weights = {id(layer.weight) for layer in packed.values()}
        plain = {name: (p, p.dtype) for name, p in block.named_parameters() if id(p) not in weights}
        return _Block(block, plain, dict(block.named_buffers()), packed)


def _stand_in(tensor: Tensor, device: torch.device) -> Tensor:
    """One zero that passes for so many."""
    return torch.zeros((), dtype=tensor.dtype, device=device).expand(tensor.shape)


def _part_of(kind: type[nn.Module], place: str, keep: int | None, aside: list[nn.Module]) -> type[nn.Module]:
    """A model's class whose objects have one block and nothing else; None: all but the blocks, which are put aside."""

    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, *args, **kwargs)
        blocks = self.get_submodule(place)
        for number, block in enumerate(blocks):
            if number != keep:
                aside.append(block)
                blocks[number] = nn.Identity()
        if keep is not None:
            _without_parameters(self, set(blocks[keep].modules()))
            self.all_tied_weights_keys = {}

    return type(kind.__name__, (kind,), {"__init__": made, "__module__": kind.__module__})


def _without_parameters(model: nn.Module, kept: set[nn.Module]) -> None:
    """Take away the parameters of all modules but these; the loader has nothing to do with them then."""
    for module in model.modules():
        own = [leaf for leaf, parameter in module._parameters.items() if parameter is not None]
        if module not in kept and own:
            for leaf in own:
                module._parameters[leaf] = None
            module._is_hf_initialized = True  # type: ignore[assignment]  # transformers' mark: nothing is to be drawn


def able(config: RunConfig, model: CausalLM, quantizer: str) -> bool:
    """Can a run read its model block by block? Not experts in few bits, nor what others packed.

    Args:
        config: names the method, and what it goes on from.
        model: on meta.
        quantizer: of its linear layers.
    """
    place = families.of(model).blocks
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    shares = any(name.startswith(f"{place}.") for name in (*tied, *tied.values()))
    on_blocks = config.adapter is not None and config.method != "lora"  # it has values for tensors of the base
    fused = [*experts.parameters(model), *experts.stacks(model)]
    plain = quantizer == "none" or (quantizer in quant.NAMES and not fused)
    return plain and not (shares or on_blocks or methods.find(config.method).reads_weights(config))


def opened(files: Files, config: RunConfig, look: Look) -> ByBlocks | None:
    """The model of these files, to be read by blocks; None where a run cannot do that.

    Args:
        files: of the model.
        config: of the run.
        look: is called with each part that was read.
    """
    empty = without_weights(files.config)
    return (
        ByBlocks(files, type(empty), families.of(empty).blocks, look)
        if able(config, empty, files.options.name)
        else None
    )
