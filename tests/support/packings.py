"""Tiny folders in the formats in which others publish quantized models, written by the formats' descriptions, a number
at a time, and the weights that they stand for.

In: a kind of tiny.py, the name of a packing. Out: a folder, and a plain model with the same values.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from support import every_type, tiny

Ints = NDArray[np.int64]
Tensors = dict[str, Tensor]


def into_ints(values: Ints, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """(n, m) unsigned numbers to (n, m x bits / 32) int32, the n-th lowest bits those of column order[n]; a row is one
    string of bits, also where an int ends within a number."""
    per = 32 // bits
    made = np.zeros((values.shape[0], values.shape[1] * bits // 32), np.uint64)
    for row in range(made.shape[0]):
        text = 0
        for column in range(values.shape[1]):
            at = column // per * per + order[column % per] if order else column
            text |= int(values[row, at]) << (bits * column)
        for column in range(made.shape[1]):
            made[row, column] = text >> (32 * column) & 0xFFFFFFFF
    return torch.from_numpy(made.astype(np.uint32).view(np.int32).copy())


@dataclass(frozen=True)
class Packing:
    """config: its quantization_config. pack: of a weight (out, in) its tensors, and what they stand for, in float32.
    kind: of a model whose sizes it can take."""

    config: dict[str, Any]
    pack: Callable[[Tensor, np.random.Generator], tuple[Tensors, Tensor]]
    kind: str = "llama"


def _scales(weight: Tensor, shape: tuple[int, ...], dtype: torch.dtype, highest: int) -> Tensor:
    generator = torch.Generator().manual_seed(weight.shape[0])
    return (float(weight.abs().max()) / highest * (1 + torch.rand(shape, generator=generator))).to(dtype)


def gptq(bits: int, group: int, v2: bool = False, ordered: bool = False) -> Packing:
    """GPTQ: along the inputs, zero points less one."""

    def pack(weight: Tensor, random: np.random.Generator) -> tuple[Tensors, Tensor]:
        outputs, inputs = weight.shape
        groups = 1 if group == -1 else inputs // group
        numbers = random.integers(0, 2**bits, (inputs, outputs))
        zeros = random.integers(0, 2**bits, (groups, outputs))
        of = np.arange(inputs) // (inputs // groups)
        of = random.permutation(of) if ordered else of
        scales = _scales(weight, (groups, outputs), torch.float16, 2**bits)
        stored = zeros if v2 else (zeros - 1) % 2**bits
        plain = (torch.from_numpy(numbers - zeros[of]).float() * scales.float()[of]).T
        packed = {
            "qweight": into_ints(numbers.T, bits).T.contiguous(),
            "qzeros": into_ints(stored, bits),
            "scales": scales,
            "g_idx": torch.from_numpy(of.astype(np.int32)),
        }
        return packed, plain

    form = {"checkpoint_format": "gptq_v2"} if v2 else {}
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": ordered, **form}
    return Packing(config, pack, "llama" if 32 % bits == 0 else "phi3")


def awq(group: int) -> Packing:
    """AWQ's gemm: along the outputs, in its order."""

    def pack(weight: Tensor, random: np.random.Generator) -> tuple[Tensors, Tensor]:
        outputs, inputs = weight.shape
        numbers, zeros = random.integers(0, 16, (inputs, outputs)), random.integers(0, 16, (inputs // group, outputs))
        scales = _scales(weight, (inputs // group, outputs), torch.float16, 16)
        of, order = np.arange(inputs) // group, (0, 2, 4, 6, 1, 3, 5, 7)
        plain = (torch.from_numpy(numbers - zeros[of]).float() * scales.float()[of]).T
        return {"qweight": into_ints(numbers, 4, order), "qzeros": into_ints(zeros, 4, order), "scales": scales}, plain

    return Packing({"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}, pack)


def _compressed(form: str, weights: dict[str, Any], ignore: list[str]) -> dict[str, Any]:
    how = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False, **weights}
    group = {"targets": ["Linear"], "weights": how, "input_activations": None}
    found = {"quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed"}
    return {**found, "config_groups": {"group_0": group}, "ignore": ignore, "kv_cache_scheme": None}


def compressed_ints(bits: int, group: int, symmetric: bool, ordered: bool = False) -> Packing:
    """compressed-tensors' packed ints: along the inputs, zero points along the outputs, all less the lowest value."""

    def pack(weight: Tensor, random: np.random.Generator) -> tuple[Tensors, Tensor]:
        outputs, inputs = weight.shape
        low, groups = 2 ** (bits - 1), inputs // group
        numbers = random.integers(-low, low, (outputs, inputs))
        zeros = np.zeros((outputs, groups), np.int64) if symmetric else random.integers(-low, low, (outputs, groups))
        of = np.arange(inputs) // group
        of = random.permutation(of) if ordered else of
        scales = _scales(weight, (outputs, groups), torch.bfloat16, low)
        packed = {
            "weight_packed": into_ints(numbers + low, bits),
            "weight_scale": scales,
            "weight_shape": torch.tensor([outputs, inputs]),
        }
        if not symmetric:
            packed["weight_zero_point"] = into_ints((zeros + low).T, bits).T.contiguous()
        if ordered:
            packed["weight_g_idx"] = torch.from_numpy(of.astype(np.int32))
        return packed, torch.from_numpy(numbers - zeros[:, of]).float() * scales.float()[:, of]

    how = {"num_bits": bits, "symmetric": symmetric, "strategy": "group", "group_size": group}
    actorder = {"actorder": "group"} if ordered else {}
    return Packing(_compressed("pack-quantized", {**how, **actorder}, ["lm_head"]), pack)


def compressed_plain(kind: str, strategy: str) -> Packing:
    """compressed-tensors' int8 and FP8, a number a byte."""

    def pack(weight: Tensor, random: np.random.Generator) -> tuple[Tensors, Tensor]:
        outputs, inputs = weight.shape
        shape = {"channel": (outputs, 1), "tensor": (1,), "block": (-(-outputs // 16), -(-inputs // 16))}[strategy]
        scales = _scales(weight, shape, torch.bfloat16, 127)
        if kind == "int":
            numbers = torch.from_numpy(random.integers(-128, 128, (outputs, inputs)).astype(np.int8))
        else:
            numbers = (weight / float(weight.abs().max()) * 400).to(torch.float8_e4m3fn)
        wide = scales.float()
        if strategy == "block":
            wide = wide.repeat_interleave(16, 0)[:outputs].repeat_interleave(16, 1)[:, :inputs]
        return {"weight": numbers, "weight_scale": scales}, numbers.float() * wide

    block = {"block_structure": [16, 16]} if strategy == "block" else {}
    form = "int-quantized" if kind == "int" else "float-quantized"
    return Packing(_compressed(form, {"type": kind, "strategy": strategy, **block}, ["re:.*lm_head"]), pack)


def fp8(block: int) -> Packing:
    """FP8 as DeepSeek and Qwen3 publish it."""

    def pack(weight: Tensor, random: np.random.Generator) -> tuple[Tensors, Tensor]:
        outputs, inputs = weight.shape
        scales = _scales(weight, (-(-outputs // block), -(-inputs // block)), torch.float32, 448)
        numbers = (weight / float(weight.abs().max()) * 448).to(torch.float8_e4m3fn)
        wide = scales.repeat_interleave(block, 0)[:outputs].repeat_interleave(block, 1)[:, :inputs]
        return {"weight": numbers, "weight_scale_inv": scales}, numbers.float() * wide

    config = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [block, block]}
    return Packing({**config, "modules_to_not_convert": ["lm_head"]}, pack)


def _nvfp4(weight: Tensor, random: np.random.Generator, whole: float) -> tuple[Tensor, Tensor, Tensor]:
    """Packed numbers, scales of 16, and what they stand for, less the scale of the whole weight."""
    outputs, inputs = weight.shape
    numbers = random.integers(0, 16, (outputs, inputs))
    scales = (torch.from_numpy(random.random((outputs, inputs // 16)) + 0.5).float() * 100).to(torch.float8_e4m3fn)
    plain = np.zeros((outputs, inputs), np.float32)
    for where in np.ndindex(*plain.shape):
        plain[where] = HALF[numbers[where] & 7] * (-1 if numbers[where] & 8 else 1)
    wide = (scales.float() * torch.tensor(whole)).repeat_interleave(16, 1)
    packed = (numbers[:, 0::2] | numbers[:, 1::2] << 4).astype(np.uint8)
    return torch.from_numpy(packed), scales, torch.from_numpy(plain) * wide


def compressed_nvfp4() -> Packing:
    """compressed-tensors' NVFP4: scales are divided by one for the whole weight."""

    def pack(weight: Tensor, random: np.random.Generator) -> tuple[Tensors, Tensor]:
        packed, scales, plain = _nvfp4(weight, random, 1 / 2048)  # a power of two: dividing is multiplying
        whole = {"weight_global_scale": torch.tensor([2048.0]), "input_global_scale": torch.tensor([3.0])}
        return {"weight_packed": packed, "weight_scale": scales, **whole}, plain

    how = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    return Packing(_compressed("nvfp4-pack-quantized", how, ["lm_head"]), pack)


def modelopt(algorithm: str) -> Packing:
    """ModelOpt's NVFP4 and FP8."""

    def pack(weight: Tensor, random: np.random.Generator) -> tuple[Tensors, Tensor]:
        there = {"input_scale": torch.tensor(0.5)}
        if algorithm == "FP8":
            scale = torch.tensor(float(weight.abs().max()) / 448)
            numbers = (weight / scale).to(torch.float8_e4m3fn)
            return {"weight": numbers, "weight_scale": scale, **there}, numbers.float() * scale
        packed, scales, plain = _nvfp4(weight, random, 0.0007)
        whole = {"weight_scale_2": torch.tensor(0.0007)}
        return {"weight": packed, "weight_scale": scales, **whole, **there}, plain

    how = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    group = {"config_groups": {"group_0": {"weights": how, "input_activations": how, "targets": ["Linear"]}}}
    group = group if algorithm == "NVFP4" else {}
    return Packing({"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"], **group}, pack)


HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # E2M1

KINDS: dict[str, Packing] = {
    "gptq-3": gptq(3, 16),
    "gptq-4": gptq(4, 16),
    "gptq-8": gptq(8, -1),
    "gptq-4-ordered-v2": gptq(4, 8, v2=True, ordered=True),
    "awq": awq(16),
    "compressed-int4": compressed_ints(4, 16, symmetric=True),
    "compressed-int4-zeros-ordered": compressed_ints(4, 8, symmetric=False, ordered=True),
    "compressed-int8": compressed_plain("int", "channel"),
    "compressed-fp8": compressed_plain("float", "channel"),
    "compressed-fp8-tensor": compressed_plain("float", "tensor"),
    "compressed-fp8-block": compressed_plain("float", "block"),
    "fp8": fp8(24),
    "compressed-nvfp4": compressed_nvfp4(),
    "modelopt-nvfp4": modelopt("NVFP4"),
    "modelopt-fp8": modelopt("FP8"),
}


def published(name: str, folder: Path, kind: str | None = None) -> Any:
    """Write the folder; a plain model with the values that it stands for."""
    packing, random = KINDS[name], np.random.default_rng(0)
    kind = kind or packing.kind
    tiny.save(kind, folder)
    model: Any = tiny.make_model(kind)
    head = model.get_output_embeddings()
    linear = {n: m for n, m in model.named_modules() if type(m) is nn.Linear and m is not head}
    state = {n: t for n, t in model.state_dict().items() if n.removesuffix(".weight") not in linear}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    for path, module in linear.items():
        packed, plain = packing.pack(module.weight.detach(), random)
        state |= {f"{path}.{part}": tensor for part, tensor in packed.items()}
        module.weight.data = plain.contiguous()
    state = {n: t.clone().contiguous() for n, t in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = json.dumps({**values, "quantization_config": packing.config})
    (folder / "config.json").write_text(text, encoding="utf-8")
    return model.eval()


LEFT = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]  # as gpt-oss has it


def published_mxfp4(folder: Path) -> Any:
    """gpt-oss with its experts in MXFP4, written to the folder; a plain model with the values that they stand for."""
    random = np.random.default_rng(0)
    every_type.save("gpt_oss", folder)
    model: Any = every_type.model_of("gpt_oss")
    state = model.state_dict()
    for name in [name for name in state if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = state[name].shape  # a plain model has them the other way round
        numbers = random.integers(0, 16, (experts, outputs, inputs))
        scales = random.integers(122, 125, (experts, outputs, inputs // 32))
        plain = np.zeros((experts, outputs, inputs), np.float32)
        for where in np.ndindex(*plain.shape):
            value = HALF[numbers[where] & 7] * (-1 if numbers[where] & 8 else 1)
            plain[where] = value * 2.0 ** float(scales[(*where[:2], where[2] // 32)] - 127)
        packed = (numbers[..., 0::2] | numbers[..., 1::2] << 4).astype(np.uint8)
        state[f"{name}_blocks"] = torch.from_numpy(packed.reshape(experts, outputs, inputs // 32, 16))
        state[f"{name}_scales"] = torch.from_numpy(scales.astype(np.uint8))
        model.get_parameter(name).data = torch.from_numpy(plain).transpose(1, 2).contiguous()
        del state[name]
    state = {n: t.clone().contiguous() for n, t in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = {"quant_method": "mxfp4", "modules_to_not_convert": LEFT}
    text = json.dumps({**values, "quantization_config": config})
    (folder / "config.json").write_text(text, encoding="utf-8")
    return model.eval()
