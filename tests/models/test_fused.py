"""Norm, rotary positions and gated activation in one kernel each: values and gradients beside float64, the same bits
whatever stands beside a row, and how many launches a step takes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fitune.memory import plan
from fitune.memory.steps import made_up
from fitune.models.kernels import fused, target
from fitune.models.kernels.gated import lean_mlps
from fitune.models.kernels.rotary import turn_in_one
from fitune.models.prepare import ready
from support import contract, tiny
from support.beside_float64 import (
    ACTS,
    check_gated,
    check_loss,
    check_norm,
    check_rope,
)

HOPPER = target.Target("cuda", (9, 0), 132)
HALF = [torch.bfloat16, torch.float16]
triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


dtypes = st.sampled_from([torch.float32, *HALF])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 70), dtypes, st.sampled_from([None, torch.float32]))
def test_norm_beside_float64(rows: int, width: int, dtype: torch.dtype, trained: torch.dtype | None) -> None:
    check_norm(rows, width, dtype, trained=trained)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 70), st.sampled_from(ACTS), st.booleans(), dtypes)
def test_gated_beside_float64(rows: int, width: int, act: str, joined: bool, dtype: torch.dtype) -> None:
    check_gated(rows, width, act, joined, dtype)


@settings(max_examples=25, deadline=None)
@given(st.tuples(*(st.integers(1, 5) for _ in range(4)), st.integers(1, 9).map(lambda n: 2 * n)), st.booleans(), dtypes)
def test_rope_beside_float64(size: tuple[int, int, int, int, int], shared: bool, dtype: torch.dtype) -> None:
    check_rope(size, shared, dtype)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(2, 70), st.booleans(), dtypes)
def test_loss_beside_float64(rows: int, width: int, weighted: bool, dtype: torch.dtype) -> None:
    check_loss(rows, width, weighted, dtype)


def test_a_loss_that_is_not_finite_is_seen() -> None:
    for wrong in (float("nan"), float("inf")):
        logits = torch.randn(3, 7)
        logits[1, 2] = wrong
        assert not fused.ops.cross_entropy(logits, torch.tensor([0, 1, 2]))[0].isfinite().all()


def samples(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[tuple[Any, tuple[Any, ...]]]:
    torch.manual_seed(0)
    x, grad, weight = (torch.randn(size, device=device).to(dtype) for size in ((3, 5, 96), (3, 5, 96), (96,)))
    q, k = (torch.randn(2, 5, heads, 8, device=device).to(dtype).transpose(1, 2) for heads in (4, 2))
    cos, sin = (torch.randn(1, 5, 8, device=device).to(dtype) for _ in "cs")
    scale = fused.ops.rms_norm(x, weight, 1e-6)[1]
    labels = torch.randint(96, (5,), device=device)
    joined = torch.randn(3, 5, 192, device=device).to(dtype).chunk(2, -1)
    return [
        (fused.ops.rms_norm.default, (x, weight, 1e-6)),
        (fused.ops.rms_norm_backward.default, (grad, x, weight, scale)),
        *((fused.ops.swiglu.default, (*joined, act)) for act in ACTS),
        (fused.ops.swiglu_backward.default, (grad, *joined, fused.SILU)),
        (fused.ops.cross_entropy.default, (x[0], labels)),
        (fused.ops.cross_entropy_backward.default, (x[0], labels, scale[0], scale[1])),
        *((fused.ops.rope.default, (q, k, cos, sin, back)) for back in (False, True)),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operations_keep_torchs_contract(dtype: torch.dtype) -> None:
    for op, args in samples(dtype=dtype):
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def test_sizes_that_are_wrong_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    lib = torch.library.Library("fitune_planted", "FRAGMENT")
    lib.define("wrong(Tensor x) -> Tensor")
    lib.impl("wrong", lambda x: x.clone(), "CPU")
    torch.library.register_fake("fitune_planted::wrong", lambda x: x.new_empty(1), lib=lib)
    with pytest.raises(Exception, match="Shapes"):
        torch.library.opcheck(torch.ops.fitune_planted.wrong.default, (torch.randn(3),), test_utils="test_faketensor")


# ---- where they are used ----


def operations(kind: str, device: target.Target, **config: Any) -> Counter[str]:
    made = tiny.make_model(kind)
    work = plan.Work(contract.config_for("lora-all", "bf16", **config), made.config, [[made_up(4, 32, 64)]])
    return Counter(block.op for block in plan.traced(work, device).blocks)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
def test_a_plan_for_a_gpu_has_them_and_one_for_a_cpu_has_not(kind: str) -> None:
    on_gpu, on_cpu = operations(kind, HOPPER), operations(kind, target.CPU)
    for name in ("rms_norm", "rms_norm_backward", "swiglu", "swiglu_backward", "rope", "cross_entropy"):
        assert on_gpu[f"fitune::{name}"] > 0, name
        assert on_cpu[f"fitune::{name}"] == 0, name
    with fused.eager():
        assert not any(name.startswith("fitune::") for name in operations(kind, HOPPER))


def test_why_they_are_not_used() -> None:
    with target.planned(HOPPER):
        assert fused.refusal(HOPPER) is None
        assert "7.0" in str(fused.refusal(target.Target("cuda", (7, 0), 80)))
        with fused.eager():
            assert fused.refusal(HOPPER) == "turned off"
        assert "Triton" in fused.described(HOPPER)
    assert "CUDA" in str(fused.refusal(target.CPU))
    assert "torch's: not on a CUDA GPU" in fused.described(target.CPU)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3", "glm", "gpt2", "bloom"])
def test_a_model_on_a_cpu_computes_the_same_bits(kind: str) -> None:
    model = tiny.make_model(kind)
    ids = torch.arange(12)[None] % model.config.vocab_size
    before = model(ids).logits
    turn_in_one(model)
    lean_mlps(model)
    assert torch.equal(before, model(ids).logits)
    assert turn_in_one(model) == 0


def test_only_llamas_rotary_positions_are_replaced() -> None:
    for kind in ("llama", "qwen3", "mistral"):
        model = tiny.make_model(kind)
        assert turn_in_one(model) == model.config.num_hidden_layers
    for kind in ("gpt2", "glm", "phi3"):  # none; in pairs; of a part of each head
        assert turn_in_one(tiny.make_model(kind)) == 0


def test_a_step_with_them_takes_fewer_operations_and_no_more_memory() -> None:
    def most() -> tuple[int, int]:
        work = plan.Work(
            contract.config_for("lora-all", "bf16"), tiny.make_model("llama").config, [[made_up(4, 256, 64)]]
        )
        tracer = plan.traced(work, HOPPER)
        alive, highest = 0, 0
        for _, size in tracer.events:
            alive += size
            highest = max(highest, alive)
        return highest, len(tracer.blocks)

    with fused.eager():
        plain = most()
    assert most()[0] <= 1.001 * plain[0]  # copies of LoRA's weights are aligned
    assert most()[1] < 0.7 * plain[1]


# ---- Triton ----

INTERPRETED = """
import torch
from support import beside_float64 as beside
from fitune.models.kernels import fused, rows
for name in ("rms_norm", "rms_norm_backward", "swiglu", "swiglu_backward", "rope", "cross_entropy",
             "cross_entropy_backward"):
    fused._LIBRARY.impl(name, getattr(rows, name), "CPU", allow_override=True)
torch.manual_seed(0)
for dtype in (torch.float32, torch.float16):  # the interpreter truncates bfloat16
    for rows_, width in ((1, 1), (5, 96), (3, 1000), (2, 2048), (7, 4100)):
        beside.check_norm(rows_, width, dtype)
        beside.check_loss(rows_, width + 1, width == 96, dtype)
        for act in beside.ACTS:
            beside.check_gated(rows_, width, act, width == 96, dtype)
    for size in ((1, 4, 2, 5, 16), (2, 3, 1, 3, 10), (1, 32, 8, 3, 128)):
        for shared in (False, True):
            beside.check_rope(size, shared, dtype)
print("as they should be")
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fitune.models.kernels import rows
CASES = {
    "norm_kernel": {"ROWS": 1, "BLOCK": 4096}, "norm_backward_kernel": {"ROWS": 1, "BLOCK": 4096},
    "swiglu_kernel": {"GELU": False, "BLOCK": 1024}, "swiglu_backward_kernel": {"GELU": True, "BLOCK": 1024},
    "rope_kernel": {"BACK": True, "Q": 32, "K": 8, "HALF": 64},
    "loss_kernel": {"WIDTH": 128256, "BLOCK": 4096}, "loss_backward_kernel": {"BLOCK": 2048},
}
TENSORS = "x weight out grad gate up gate_grad up_grad q k cos sin q_out k_out logits".split()
for cc, kinds in {75: ("fp16", "bf16"), 80: ("bf16",), 89: ("bf16",), 90: ("bf16", "fp32"), 100: ("bf16",)}.items():
    for kind in kinds:
        for name, constants in CASES.items():
            kernel = getattr(rows, name)
            types = {"scale": "*fp32", "eps": "fp32", "labels": "*i64"}
            types |= dict.fromkeys(("losses", "total", "each"), "*fp32") | {n: f"*{kind}" for n in TENSORS}
            types |= dict.fromkeys(constants, "constexpr")
            signature = {n: types.get(n, "i32") for n in kernel.arg_names}
            values = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
            made = triton.compile(ASTSource(kernel, signature, values), target=GPUTarget("cuda", cc, 32))
            assert made.asm["cubin"], (name, cc, kind)
print("compiled")
"""


def run(code: str, **variables: str) -> str:
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    env = {**os.environ, "PYTHONPATH": path, **variables}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@triton
def test_triton_kernels_interpreted_beside_float64() -> None:
    assert "as they should be" in run(INTERPRETED, TRITON_INTERPRET="1")


@triton
def test_triton_kernels_compile_for_every_generation() -> None:
    assert "compiled" in run(COMPILED)


# ---- on a GPU ----


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_on_a_gpu_beside_float64(dtype: torch.dtype) -> None:
    assert fused.refusal(target.of(torch.device("cuda", 0))) is None
    torch.manual_seed(0)
    for rows, width in ((1, 1), (5, 96), (301, 128), (3, 1000), (70, 4096), (2, 16384)):
        check_norm(rows, width, dtype, "cuda", torch.float32)
        check_loss(rows, 128_256 if width == 4096 else width + 1, width == 128, dtype, "cuda")
        for act in ACTS:
            check_gated(rows, width, act, width == 128, dtype, "cuda")
    for size in ((1, 32, 8, 77, 128), (2, 3, 1, 5, 10), (1, 7, 7, 300, 64)):
        for shared in (False, True):
            check_rope(size, shared, dtype, "cuda")


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", HALF)
def test_on_a_gpu_the_bits_of_a_token_do_not_depend_on_others(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, grad, w = (torch.randn(n, 4096, device="cuda").to(dtype) for n in (777, 777, 1))
    q = torch.randn(1, 777, 8, 128, device="cuda").to(dtype).transpose(1, 2)
    angles = torch.randn(2, 1, 777, 128, device="cuda").to(dtype)

    def all_of(first: int, last: int) -> list[Tensor]:
        a, g = x[first:last].contiguous(), grad[first:last].contiguous()
        out, scale = fused.ops.rms_norm(a, w[0], 1e-5)
        turned = fused.ops.rope(q[:, :, first:last], q[:, :2, first:last], *angles[:, :, first:last], False)
        gated = fused.ops.swiglu_backward(g, a, out, fused.SILU)
        return [
            out, fused.ops.rms_norm_backward(g, a, w[0], scale), fused.ops.swiglu(a, g, fused.SILU), *gated,
            *(one.transpose(1, 2)[0] for one in turned),
        ]  # fmt: skip

    whole, again = all_of(0, 777), all_of(0, 777)
    assert all(torch.equal(one, other) for one, other in zip(whole, again, strict=True))
    for first, last in ((0, 1), (3, 20), (100, 356), (776, 777)):
        for one, part in zip(whole, all_of(first, last), strict=True):
            assert torch.equal(one[first:last], part)


@pytest.mark.cuda
def test_on_a_gpu_sizes_are_those_of_the_plan() -> None:
    for op, args in samples("cuda", torch.bfloat16):
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_on_a_gpu_a_model_computes_as_without_them(kind: str) -> None:
    model = ready(tiny.make_model(kind).to("cuda", torch.bfloat16), "bf16")
    exact = tiny.make_model(kind).double()
    ids = torch.arange(48)[None] % model.config.vocab_size
    right = exact(ids).logits
    with torch.no_grad(), fused.eager():
        plain = model(ids.cuda()).logits
    with torch.no_grad():
        found = model(ids.cuda()).logits
    errors = [float((one.double().cpu() - right).norm() / right.norm()) for one in (plain, found)]
    assert errors[1] <= 1.2 * errors[0] + 1e-4
