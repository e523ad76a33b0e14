"""Kernels for packed weights: each load compares them with the exact reference; a wrong one is found and not used."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path
from typing import Any, Literal

import bitsandbytes as bnb
import pytest
import torch

from fitune.commands import doctor
from fitune.commands.merge import merge
from fitune.commands.train import train
from fitune.core.config import build
from fitune.core.options import QuantOptions, quant_options
from fitune.engine.checkpoint import RunFolder
from fitune.models import kernel_faults
from fitune.models import quant as quants
from fitune.models.load import load_model
from fitune.models.quant import absmax, nf4, trust
from support import tiny

SHAPES = ((48, 80), (16, 688), (100, 96), (48, 64), (20, 128), (64, 172), (32, 100), (48, 16), (7, 13))
RIGHT = bnb.functional.dequantize_4bit


def packed(shape: tuple[int, int], kind: Literal["nf4", "fp4"] = "nf4", block: int = 64, double: bool = False) -> Any:
    """A layer in blocks of any size, as a folder of somebody else may hold it."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    layer: Any = quants.find("nf4").make(weight, QuantOptions(name="nf4", kind=kind), torch.device("cpu"))
    data, state = bnb.functional.quantize_4bit(weight, quant_type=kind, blocksize=block, compress_statistics=double)
    layer.weight.data, layer.weight.quant_state = data, state
    return layer


def by_hand(layer: Any) -> torch.Tensor:
    """An independent reading of the format, number by number."""
    state = layer.weight.quant_state
    scales = state.absmax
    if state.nested:
        scales = nf4.single_scales(state.absmax, state.state2.code, state.state2.absmax, state.offset)
    packed_, count = layer.weight.data.flatten().numpy(), state.shape.numel()
    numbers = [int(packed_[n // 2] >> 4 if n % 2 == 0 else packed_[n // 2] & 15) for n in range(count)]
    return (state.code[numbers] * scales[torch.arange(count) // state.blocksize]).view(state.shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_plain_weights_are_exact_for_every_shape_kind_dtype_and_block(shape: tuple[int, int]) -> None:
    kinds: tuple[Literal["nf4", "fp4"], ...] = ("nf4", "fp4")
    for kind, block, double in product(kinds, (64, 128, 512), (False, True)):
        layer = packed(shape, kind, block, double)
        exact = by_hand(layer)
        assert torch.equal(nf4.exact(layer, torch.float32), exact)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            trust.check([layer], dtype)
            got = layer.plain_weight(dtype)
            assert got.dtype == dtype
            assert (got.float() - exact).abs().max() <= 2 * torch.finfo(dtype).eps * exact.abs().max()


def wrong_rows(data: torch.Tensor, state: Any, **_: Any) -> torch.Tensor:
    """The fault of bitsandbytes 0.50.2 with AVX512, for machines without it: a row starts at a block of its own."""
    made = RIGHT(data, state)
    return made * 1.25 if len(state.shape) > 1 and state.shape[1] % state.blocksize else made


def wrong_always(data: torch.Tensor, state: Any, **_: Any) -> torch.Tensor:
    made = RIGHT(data, state)
    made.view(-1)[-1] += 0.5  # of one weight
    return made


def test_a_wrong_kernel_is_found_and_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.save("llama", tmp_path / "llama")  # rows of 32, 48 and 64
    right = {name: nf4.exact(layer, torch.float32) for name, layer in quants.layers(load_model(folder, quant="nf4"))}

    monkeypatch.setattr(bnb.functional, "dequantize_4bit", wrong_rows)
    model = load_model(folder, quant="nf4")
    faults = quants.faults(model)
    assert {fault.kind.shape for fault in faults} == {(48, 32), (24, 32), (32, 48), (64, 32)}  # not 32 x 64
    assert {fault.instead for fault in faults} == {"the kernel on rows of one block"}
    assert all(fault.error > 0.1 for fault in faults)
    for name, layer in quants.layers(model):
        assert torch.equal(layer.plain_weight(torch.float32), right[name])
    found = kernel_faults.finding(faults)
    assert found.level == "warn"
    assert re.search(
        r"wrong for .*48 x 32.* \(nf4; blocks of 64, double; float32; cpu; off by up to 0\.\d\d\)", found.text
    )

    monkeypatch.setattr(bnb.functional, "dequantize_4bit", wrong_always)
    model = load_model(folder, quant="nf4", precision="bf16")
    assert {fault.instead for fault in quants.faults(model)} == {"an exact look-up"}
    assert len({fault.kind for fault in quants.faults(model)}) == 5  # one of each shape, all of them
    for name, layer in quants.layers(model):
        assert torch.equal(layer.plain_weight(torch.bfloat16), right[name].bfloat16())
        assert torch.equal(layer.plain_weight(torch.float32), right[name])  # a dtype that is first needed now

    def missing(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(bnb.functional, "dequantize_4bit", missing)
    name, layer = next(iter(quants.layers(load_model(folder, quant="nf4"))))
    assert torch.equal(layer.plain_weight(torch.float32), right[name])

    monkeypatch.setattr(bnb.functional, "dequantize_4bit", RIGHT)
    layers = [packed((48, 64)), packed((8, 128), double=True)]
    assert trust.check(layers, torch.float32) == []
    assert kernel_faults.finding([]).level == "ok"


def test_a_run_on_a_wrong_kernel_says_so_and_merges_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, data = tiny.save("llama", tmp_path / "llama"), tiny.write_rows(tmp_path / "rows.jsonl", 20)
    settings = {"model": str(folder), "data": [str(data)], "quant": "nf4", "precision": "fp32", "max_steps": 2}
    runs = []
    for name, kernel in (("right", RIGHT), ("wrong", wrong_rows)):
        monkeypatch.setattr(bnb.functional, "dequantize_4bit", kernel)
        runs.append(train(build({**settings, "output": str(tmp_path / name)})).run)
        merged = merge(runs[-1], tmp_path / f"{name}-merged")
        assert merged.merge_error <= 1e-5
    first, second = ((Path(run) / "adapter" / "adapter_model.safetensors").read_bytes() for run in runs)
    assert first == second
    findings = RunFolder(runs[1]).read("data")["findings"]
    found = next(one for one in findings if one["rule"] == "quant-kernels")
    assert found["level"] == "warn"
    assert "48 x 32" in found["text"]


def test_a_wrong_product_is_found_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does: bitsandbytes' product is used where it is right. Its CPU product stands for it here."""
    monkeypatch.setattr(trust, "FUSED", {"cuda", "cpu"})
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(4)) / 8
    layer: Any = quants.find("nf4").make(weight, quant_options("nf4"), torch.device("cpu")).eval()
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(5))
    theirs = bnb.matmul_4bit
    calls: list[int] = []

    def counted(x: torch.Tensor, *rest: Any, **how: Any) -> torch.Tensor:
        calls.append(len(x))
        return theirs(x, *rest, **how)

    monkeypatch.setattr(bnb, "matmul_4bit", counted)
    assert trust.check([layer], torch.float32) == []
    assert calls == list(trust.ROWS)
    layer(x)
    assert calls[-1] == 5
    monkeypatch.setattr(
        bnb, "matmul_4bit", lambda x, *rest, **how: theirs(x, *rest, **how) * (1.1 if len(x) == 1 else 1)
    )
    (fault,) = trust.check([layer], torch.float32)
    assert fault.kernel == "bitsandbytes' product"
    assert fault.error == pytest.approx(0.1, abs=0.02)
    monkeypatch.setattr(bnb, "matmul_4bit", counted)
    calls.clear()
    assert torch.allclose(layer(x), x @ layer.plain_weight(torch.float32).T, atol=1e-5)
    assert calls == []


def test_int8_is_what_its_numbers_and_scales_stand_for() -> None:
    for shape in SHAPES:
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(6))
        layer: Any = quants.find("int8").make(weight, quant_options("int8"), torch.device("cpu"))
        assert trust.check([layer], torch.float32) == []  # no kernel of bitsandbytes takes part
        exact = absmax.dequantize(layer.weight.data, layer.scales()[:, None] / 127)
        assert torch.equal(layer.plain_weight(torch.float32), exact)


def test_doctor_lists_the_shapes_that_this_machine_gets_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bnb.functional, "dequantize_4bit", RIGHT)
    there = trust.check([packed(shape) for shape in doctor.PROBES], torch.float32)
    here = {check.name: check for check in doctor._bitsandbytes()}
    assert here["nf4 kernels"].level == ("warn" if there else "ok")  # whatever this machine is
    assert here["int8"].level == "ok"
    assert "int8 kernels" not in here
    monkeypatch.setattr(bnb.functional, "dequantize_4bit", wrong_rows)
    found = {check.name: check for check in doctor._bitsandbytes()}["nf4 kernels"]
    assert found.level == "warn"
    assert "48 x 80, 256 x 688, 100 x 96" in found.text
    assert "48 x 64" not in found.text
    assert "float16" in found.text
