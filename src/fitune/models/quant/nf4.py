"""4-bit weights by bitsandbytes: NormalFloat (QLoRA, Dettmers et al. 2023, arXiv:2305.14314), or a float of 4 bits.

A weight becomes the nearest of 16 values, scaled by the largest of its block of 64. NormalFloat's values are quantiles
of the normal distribution, so that each is used equally often. With double quantization the scales, less their mean,
become 8 bits in blocks of 256. `reference` and `plain` say the same in a few lines, for tests and for readers.

bitsandbytes' own layer packs its weight anew for CPUs with AVX512-BF16 when it first evaluates: later training loses
gradient, merging gives garbage, and the state dict changes. Here there is one path, and the weight is never packed.
Its kernel is wrong on CPUs with AVX512 where a row is a multiple of 16 and not of the block: see `by_blocks`, trust.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from fitune.core.options import QuantOptions
from fitune.models.kernel_faults import Kind
from fitune.models.kernels.experts import Stack
from fitune.models.kernels.frozen import Frozen
from fitune.models.quant import trust
from fitune.models.quant.base import Quantizer, sizes

BLOCK = 64
OFFSET = 0.9677083  # 1 - (1/32 + 1/30) / 2: the outermost quantile, where the normal distribution is still finite
STORAGE = {"uint8": torch.uint8, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def quantiles() -> Tensor:
    """(16,): NormalFloat's values, from -1 to 1: 8 quantiles of each half, zero once."""
    upper = torch.special.ndtri(torch.linspace(OFFSET, 0.5, 9, dtype=torch.float64))[:-1]
    lower = -torch.special.ndtri(torch.linspace(OFFSET, 0.5, 8, dtype=torch.float64))[:-1]
    values = torch.cat([lower, torch.zeros(1, dtype=torch.float64), upper]).sort().values
    return (values / values.max()).float()


def reference(weight: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of the nearest values, and the scale of each block.

    Args:
        weight: any shape; the last block may be shorter.
        values: (16,), as `quantiles` gives them.

    Returns:
        (blocks, BLOCK) uint8, zeros behind the end counted as such, and (blocks,).
    """
    flat = weight.float().flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(dim=1)
    unit = blocks / torch.where(scales == 0, torch.ones_like(scales), scales)[:, None]
    borders = (values[1:] + values[:-1]) / 2
    return torch.bucketize(unit, borders).to(torch.uint8), scales


def plain(numbers: Tensor, scales: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    """The weight that numbers and scales stand for, in its shape."""
    return (values[numbers.long()] * scales[:, None]).flatten()[: shape.numel()].view(shape)


def single_scales(numbers: Tensor, code: Tensor, outer: Tensor, mean: Tensor, block: int = 256) -> Tensor:
    """The scales behind double quantization: `code[number] x outer scale of its block + mean`."""
    return code[numbers.long()] * outer.repeat_interleave(block)[: len(numbers)] + mean


# ---- packed layers to plain weights ----


def _packing(layer: Any) -> Any:
    """How a weight is packed: bitsandbytes keeps that at the weight, or at the layer, where the weight is gathered."""
    return getattr(layer.weight, "quant_state", None) or layer.quant_state


PIECE = 2**16  # weights that the exact way looks up at once


def by_kernel(layer: Frozen, dtype: torch.dtype, shape: torch.Size | None = None) -> Tensor:
    """bitsandbytes' kernel, as it calls it, or on the same weights in another shape; no float32 copy is made."""
    state = copy(_packing(layer))
    state.dtype, state.shape = dtype, shape or state.shape
    weight: Tensor = bnb.functional.dequantize_4bit(layer.weight.data, state)
    return weight


def by_blocks(layer: Frozen, dtype: torch.dtype) -> Tensor:
    """The same kernel on rows of one block each: where a block's scale stands depends on no row's length then."""
    state = _packing(layer)
    blocks, rest = divmod(state.shape.numel(), state.blocksize)
    if rest:
        return exact(layer, dtype)
    return by_kernel(layer, dtype, torch.Size((blocks, state.blocksize))).view(state.shape)


def exact(layer: Frozen, dtype: torch.dtype) -> Tensor:
    """What the numbers and scales stand for, looked up by torch alone; some eight times slower than a kernel."""
    state = _packing(layer)
    made = torch.empty(state.shape.numel(), dtype=dtype, device=layer.weight.device)
    for start, values, _ in _looked_up(layer):
        made[start : start + len(values)] = values
    return made.view(state.shape)


def _looked_up(layer: Frozen) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(where it begins, weights, the scale of each) a piece at a time, in float32."""
    state, packed = _packing(layer), layer.weight.data.reshape(-1).view(torch.uint8)
    count, block = state.shape.numel(), state.blocksize
    code = state.code.float()
    pairs = torch.stack([code.repeat_interleave(16), code.repeat(16)], dim=1)  # of a byte the high half comes first
    scales = state.absmax
    if state.nested:
        outer = state.state2
        scales = single_scales(state.absmax, outer.code, outer.absmax, state.offset, outer.blocksize)
    step = max(1, PIECE // block)
    for first in range(0, len(scales), step):
        start, end = first * block, min(count, (first + step) * block)
        values = pairs.index_select(0, packed[start // 2 : (end + 1) // 2].int()).flatten()[: end - start]
        each = scales[first : first + step].float().repeat_interleave(block)[: end - start]
        yield start, values * each, each


class Nf4Weight(trust.Checked):
    """A packed matrix: what trust.py asks of one, and the weight by a way that it found right."""

    def plain_weight(self, dtype: torch.dtype) -> Tensor:
        """See Frozen."""
        return trust.plain(self, dtype)

    def kind(self) -> Kind:
        """Shape and settings."""
        state = _packing(self)
        setting = f"blocks of {state.blocksize}{', double' if state.nested else ''}"
        return Kind(state.quant_type, tuple(state.shape), setting)

    def ways(self) -> list[tuple[str, trust.Way]]:
        """To its plain weight, the last one exact by construction."""
        return [("the kernel on rows of one block", by_blocks), ("an exact look-up", exact)]

    def watched(self) -> list[tuple[str, trust.Way]]:
        """Not used here, but by transformers and PEFT; rows of odd length have no kernel."""
        return [("bitsandbytes' kernel", by_kernel)] if _packing(self).shape[-1] % 2 == 0 else []

    def weight_error(self, way: trust.Way, dtype: torch.dtype) -> float | None:
        """How far off a way is, relative to the exact weight's norm; None where no weight is further off than rounding
        a value, its scale and their product to this dtype explains."""
        try:
            got = way(self, dtype).flatten()
        except Exception:  # as little use as one that is wrong
            return float("inf")
        limits, right, wrong, size = torch.finfo(dtype), True, 0.0, 0.0
        for start, values, scales in _looked_up(self):
            away = (got[start : start + len(values)].float() - values).abs()
            right &= bool((away <= 2 * limits.eps * scales.abs() + limits.smallest_normal).all())
            wrong, size = wrong + float(away.square().sum()), size + float(values.square().sum())
        return None if right else (wrong / max(size, 1e-300)) ** 0.5 if wrong == wrong else float("inf")

    def fused_product(self, x: Tensor) -> Tensor:
        """bitsandbytes' product."""
        product: Tensor = bnb.matmul_4bit(x, self.weight.t(), quant_state=_packing(self))
        return product


class Nf4Linear(Nf4Weight, bnb.nn.Linear4bit):
    """See the module's text."""

    def product(self, x: Tensor) -> Tensor:
        """See Frozen."""
        return self.fused_product(x) if trust.fused(self, x) else Frozen.product(self, x)


class _Matrix(Nf4Weight):
    """An expert's matrix: views of what its stack holds."""

    def __init__(self, weight: Tensor, state: QuantState) -> None:
        super().__init__()
        self.weight, self.quant_state = weight, state


OUTER = 256  # scales in a block of double quantization


class Nf4Stack(Stack):
    """Experts, each packed as a linear layer's weight is: weight (experts, bytes); scales (experts, blocks of 64),
    doubly quantized with outer (experts, blocks of 256) and mean (experts,); the values that numbers stand for."""

    scales: Tensor
    code: Tensor
    outer: Tensor
    mean: Tensor
    outer_code: Tensor
    kind: str

    def fill(self, number: int, matrix: Tensor) -> None:
        """See Stack."""
        double = hasattr(self, "outer")
        packed, state = bnb.functional.quantize_4bit(
            matrix.to(self.weight.device), blocksize=BLOCK, compress_statistics=double, quant_type=self.kind
        )
        self.weight.data[number], self.scales[number] = packed.flatten(), state.absmax
        self.code.copy_(state.code)
        if double:
            self.outer[number], self.mean[number] = state.state2.absmax, state.offset
            self.outer_code.copy_(state.state2.code)

    def packed(self, number: int) -> _Matrix:
        """An expert's matrix, as bitsandbytes knows one."""
        how: dict[str, Any] = {}
        if hasattr(self, "outer"):
            outer = QuantState(self.outer[number], code=self.outer_code, blocksize=OUTER, dtype=torch.float32)
            how = {"offset": self.mean[number], "state2": outer}
        shape = torch.Size((self.outputs, self.inputs))
        state = QuantState(
            self.scales[number], shape=shape, code=self.code, blocksize=BLOCK, quant_type=self.kind,
            dtype=torch.float32, **how,
        )  # fmt: skip
        return _Matrix(self.weight.data[number][:, None], state)

    def matrix(self, number: int, dtype: torch.dtype) -> Tensor:
        """See Stack."""
        return self.packed(number).plain_weight(dtype)

    def checked(self) -> list[Frozen]:
        """See Stack."""
        return [self.packed(0)]


def _empty_state(shape: torch.Size, blocks: int, options: QuantOptions) -> QuantState:
    """The scales of a weight without values, as `quantize_4bit` makes them."""

    def numbers(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(count, dtype=dtype, device="meta")

    def state(scales: Tensor, code: int, block: int, **how: Any) -> QuantState:
        return QuantState(scales, code=numbers(code), blocksize=block, dtype=torch.float32, **how)

    if not options.double:
        return state(numbers(blocks), 16, BLOCK, shape=shape, quant_type=options.kind)
    outer = state(numbers(-(-blocks // OUTER)), 256, OUTER)
    inner = {"shape": shape, "quant_type": options.kind, "offset": numbers(1)[0], "state2": outer}
    return state(numbers(blocks, torch.uint8), 16, BLOCK, **inner)


class Nf4(Quantizer):
    """See the module's text."""

    name = "nf4"
    base = bnb.nn.Linear4bit

    def settings(self, options: QuantOptions, compute: torch.dtype, skip: list[str]) -> BitsAndBytesConfig:
        """See Quantizer."""
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=options.kind,
            bnb_4bit_use_double_quant=options.double,
            bnb_4bit_compute_dtype=compute,
            bnb_4bit_quant_storage=STORAGE[options.storage],
            llm_int8_skip_modules=skip,
        )

    def adopt(self, layer: Any, compute: torch.dtype) -> None:
        """See Quantizer."""
        layer.__class__, layer.compute = Nf4Linear, compute
        layer.compute_dtype, layer.compute_type_is_set = compute, True
        layer.support_avx512bf16_for_cpu = False

    def make(self, weight: Tensor, options: QuantOptions, device: torch.device) -> Frozen:
        """See Quantizer."""
        layer: Frozen = bnb.nn.Linear4bit(
            weight.shape[1],
            weight.shape[0],
            bias=False,
            compress_statistics=options.double,
            quant_type=options.kind,
            quant_storage=STORAGE[options.storage],
        )
        layer.weight = bnb.nn.Params4bit(
            weight,
            requires_grad=False,
            compress_statistics=options.double,
            quant_type=options.kind,
            quant_storage=STORAGE[options.storage],
            module=layer,
        )
        layer, layer.source_cls = layer.to(device), nn.Linear
        self.adopt(layer, torch.float32)
        return layer

    def empty(self, layer: Any, options: QuantOptions) -> Any:
        """See Quantizer."""
        inputs, outputs = sizes(layer)
        storage = STORAGE[options.storage]
        kind = {"compress_statistics": options.double, "quant_type": options.kind, "quant_storage": storage}
        made = bnb.nn.Linear4bit(inputs, outputs, bias=False, device="meta", **kind)
        count = inputs * outputs
        packed = torch.empty((count + 1) // (2 * storage.itemsize), 1, dtype=storage, device="meta")
        state = _empty_state(torch.Size((outputs, inputs)), -(-count // BLOCK), options)
        made.weight = bnb.nn.Params4bit(packed, quant_state=state, bnb_quantized=True, module=made, **kind)
        return made

    def stack(self, shape: tuple[int, int, int], options: QuantOptions, *, transposed: bool) -> Stack:
        """See Quantizer. quant.storage is for shards, which take linear layers alone."""
        made = Nf4Stack(*shape, transposed=transposed)
        made.kind = options.kind
        count, weights = shape[0], shape[1] * shape[2]
        state = _empty_state(torch.Size(shape[1:]), blocks := -(-weights // BLOCK), options)
        held = {"scales": torch.empty(count, blocks, dtype=state.absmax.dtype, device="meta"), "code": state.code}
        if options.double:
            outer = torch.empty(count, len(state.state2.absmax), device="meta")
            held |= {"outer": outer, "mean": torch.empty(count, device="meta"), "outer_code": state.state2.code}
        made.hold(torch.empty(count, (weights + 1) // 2, dtype=torch.uint8, device="meta"), **held)
        return made

    def constants(self, layer: Frozen) -> list[Tensor]:
        """See Quantizer."""
        state = _packing(layer)
        return [state.absmax, *([state.state2.absmax] if state.nested else [])]

    def bytes_per_weight(self, options: QuantOptions) -> float:
        """Half a byte, and the scales: 4 bytes for 64 weights; doubly quantized 1, and 4 for 256 of those."""
        return 0.5 + (1 / BLOCK + 4 / (BLOCK * 256) if options.double else 4 / BLOCK)


QUANTIZER = Nf4()
