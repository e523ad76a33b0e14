"""Are the kernels that work on packed 4-bit weights right, for the layers of this model, on this machine?

In: a packed layer. Out: the way its weight is made plain and whether its fused product is used, and a Fault for each
kernel that is not what the layer's own numbers and scales stand for. bitsandbytes 0.50.2 is wrong on CPUs with AVX512
for 4-bit weights whose rows are a multiple of 16 and not of their block. Each load of a model checks one layer of each
shape, dtype and setting (`check`); what is first needed later, in another dtype, is checked then.

Shapes: x (N, in), weight (out, in).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from fitune.models.kernel_faults import Fault, Kind
from fitune.models.kernels.frozen import Frozen

FUSED = {"cuda"}  # devices on which bitsandbytes' own product is used, not only its packed weights
ROWS = (1, 16)  # of a product that is tried: one row has a kernel of its own

Key = tuple[Kind, str, torch.dtype]  # of layers, their device, and what they compute in
Way = Callable[[Frozen, torch.dtype], Tensor]  # a packed layer and a dtype to its weight


class Checked(Frozen):
    """A packed layer whose kernels are tried before they are used."""

    def kind(self) -> Kind:
        """Shape and settings."""
        raise NotImplementedError

    def ways(self) -> list[tuple[str, Way]]:
        """To its plain weight, the last one exact by construction."""
        raise NotImplementedError

    def watched(self) -> list[tuple[str, Way]]:
        """Kernels that are not used here, but by transformers and PEFT."""
        raise NotImplementedError

    def weight_error(self, way: Way, dtype: torch.dtype) -> float | None:
        """How far off a way is, relative to the exact weight's norm; None: no more than rounding explains."""
        raise NotImplementedError

    def fused_product(self, x: Tensor) -> Tensor:
        """(N, in) to (N, out) by the kernel that takes packed weights."""
        raise NotImplementedError


_ways: dict[Key, Way] = {}
_fused: dict[Key, bool] = {}


def key(layer: Checked, dtype: torch.dtype) -> Key:
    """What layers have in common for which a kernel is right or wrong together."""
    return layer.kind(), str(layer.weight.device), dtype


def check(layers: Iterable[Frozen], dtype: torch.dtype) -> list[Fault]:
    """Try what computes with these layers, one of each kind, whatever was found before.

    Args:
        layers: packed, with values. Those that have no kernels of bitsandbytes (int8) are passed by.
        dtype: what they compute in.
    """
    tried = [layer for layer in layers if isinstance(layer, Checked) and layer.weight.device.type != "meta"]
    kinds = {key(layer, dtype): layer for layer in tried}
    fresh = {key_[:2] for key_ in kinds}
    for known in (_ways, _fused):
        for stale in [key_ for key_ in known if key_[:2] in fresh]:  # in the other dtypes they are tried when needed
            del known[stale]
    return [fault for layer in kinds.values() for fault in _tried(layer, dtype)]


def plain(layer: Checked, dtype: torch.dtype) -> Tensor:
    """The weight of a layer, by a way that was found right; the first, where there are no values to try them on."""
    if layer.weight.device.type == "meta" or hasattr(layer.weight, "meta"):  # the latter: a shadow of a plan
        return layer.ways()[0][1](layer, dtype)
    if key(layer, dtype) not in _ways:
        _tried_weight(layer, dtype)
    return _ways[key(layer, dtype)](layer, dtype)


def fused(layer: Checked, x: Tensor) -> bool:
    """Is bitsandbytes' product of x and this layer used?"""
    if x.device.type not in FUSED:
        return False
    if key(layer, x.dtype) not in _fused:
        _tried_product(layer, x.dtype)
    return _fused[key(layer, x.dtype)]


@torch.no_grad()
def _tried(layer: Checked, dtype: torch.dtype) -> list[Fault]:
    faults = _tried_weight(layer, dtype)
    return [*faults, *(_tried_product(layer, dtype) if layer.weight.device.type in FUSED else [])]


def _tried_weight(layer: Checked, dtype: torch.dtype) -> list[Fault]:
    """The first way that gives the exact weight is kept; the last one is exact by construction."""
    errors = {}
    *ways, (last, exact) = layer.ways()
    for name, way in ways:
        error = layer.weight_error(way, dtype)
        if error is None:
            last, exact = name, way
            break
        errors[name] = error
    _ways[key(layer, dtype)] = exact
    others = {name: error for name, way in layer.watched() if (error := layer.weight_error(way, dtype)) is not None}
    return [_fault(layer, dtype, name, error, last) for name, error in {**others, **errors}.items()]


def _fault(layer: Checked, dtype: torch.dtype, kernel: str, error: float, instead: str) -> Fault:
    name = str(dtype).removeprefix("torch.")
    return Fault(layer.kind(), name, layer.weight.device.type, kernel, error, instead)


def _tried_product(layer: Checked, dtype: torch.dtype) -> list[Fault]:
    """Against the exact product in float64: not much further off than the reference in this dtype is."""
    weight = plain(layer, torch.float32)
    rounded = weight.to(dtype)
    generator = torch.Generator().manual_seed(0)
    errors = []
    for rows in ROWS:
        x = torch.randn(rows, weight.shape[1], generator=generator).to(layer.weight.device, dtype)
        exact = F.linear(x.double(), weight.double())
        allowed = 2 * off(F.linear(x, rounded), exact) + 8 * torch.finfo(dtype).eps
        try:
            errors.append((off(layer.fused_product(x), exact), allowed))
        except Exception:  # a kernel that is not there is as little use as one that is wrong
            errors.append((float("inf"), allowed))
    _fused[key(layer, dtype)] = all(error <= allowed for error, allowed in errors)
    if _fused[key(layer, dtype)]:
        return []
    worst = max(error for error, _ in errors)
    return [_fault(layer, dtype, "bitsandbytes' product", worst, "the product with the plain weight")]


def off(got: Tensor, exact: Tensor) -> float:
    """||got - exact|| / ||exact||; infinite where something is not finite."""
    error = float((got.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-300))
    return error if error == error else float("inf")
