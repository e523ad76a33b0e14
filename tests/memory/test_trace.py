"""What a run allocates is what was said: shadows beside the real thing, for every method, family and precision."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from fitune.core.config import RunConfig, build, settings_only
from fitune.memory import known, overrides, plan, steps, storage, trace
from fitune.memory.counted import count, shadows
from fitune.memory.cuda import Cuda
from fitune.memory.measure import most_allocated
from fitune.memory.shadow import Shadow
from fitune.memory.trace import Building, Tracer
from fitune.memory.usage import PHASES, usage
from fitune.models import adapters, families, methods
from fitune.models import quant as quants
from fitune.models.configs import without_weights
from fitune.models.kernels.target import AMPERE, CPU
from support import contract as contract
from support import measured, tiny
from support.measured import batch

LEAST, CLOSE = 10 * 2**20, 0.005
QUICK = {
    ("lora", "llama", "bf16", "none"), ("lora-all", "qwen2", "bf16", "nf4"),
    ("full", "gpt2", "fp32", "none"), ("freeze", "llama", "bf16", "none"), ("tail", "qwen2", "fp32", "none"),
    ("prefix", "bloom", "fp32", "none"), ("p-tuning-lstm", "llama", "fp32", "none"),
    ("houlsby", "chatglm", "fp32", "none"), ("lora-dora", "llama", "fp32", "nf4"), ("ia3", "gemma2", "fp32", "none"),
    ("bitfit", "opt", "bf16", "none"), ("lora", "gpt2", "fp32", "int8"), ("lora", "bloom", "fp16", "none"),
}  # fmt: skip
PRECISIONS = [("fp32", "none"), *contract.QUICK]


def cases() -> Iterator[Any]:
    """Every method on every family in every precision; pairs of them in the quick run."""
    for variant, kind, (precision, quant) in product(contract.VARIANTS, contract.KINDS, PRECISIONS):
        if (variant, kind) not in contract.REFUSED:
            marks = [] if (variant, kind, precision, quant) in QUICK else [pytest.mark.full]
            yield pytest.param(variant, kind, precision, quant, marks=marks, id=f"{variant}-{kind}-{precision}-{quant}")


def really(config: RunConfig, kind: str, work: plan.Work, quant: str) -> int:
    """What a tiny model and the work take together."""
    return measured.really(contract.make_base(kind, config.precision, methods.find(config.method), quant), config, work)


def predicted(work: plan.Work) -> Tracer:
    return plan.traced(work)


def most(tracer: Tracer) -> int:
    return usage(tracer, without="start").peak.bytes  # what is measured begins with the method on the model


def refused(variant: str, kind: str, config: RunConfig, quant: str) -> bool:
    if quant == "none":
        return False
    shape = without_weights(tiny.make_model(kind).config)
    there = methods.Quantized(quants.planned(shape, config.quant), quant, "cpu")
    return methods.find(config.method).quant_problem(shape, families.of(shape), config, there) is not None


@pytest.mark.parametrize(("variant", "kind", "precision", "quant"), list(cases()))
def test_what_is_planned_is_what_is_allocated(variant: str, kind: str, precision: str, quant: str) -> None:
    config = contract.config_for(variant, precision, quant=quant)
    if refused(variant, kind, config, quant):
        pytest.skip("this method does not go on these weights, and the contract says why")
    work = plan.Work(config, tiny.make_model(kind).config, [[batch(9, 5)], [batch(*[240] * 25)]])
    expected = most(predicted(work))  # before the run
    there = really(config, kind, work, quant)
    assert there >= LEAST
    assert expected == pytest.approx(there, rel=CLOSE), f"{expected / there - 1:+.3%}"


def test_layers_that_are_dropped_at_random_are_planned_for() -> None:
    """OPT drops whole blocks while it is trained, if it is asked to: a step may have all of them."""
    config, asked = contract.config_for("bitfit"), [[batch(9, 5)], [batch(*[24] * 25)]]
    always, sometimes = (copy.deepcopy(tiny.make_model("opt").config) for _ in range(2))
    always.layerdrop, sometimes.layerdrop = 0.0, 0.5
    whole, found = (most(predicted(plan.Work(config, shape, asked))) for shape in (always, sometimes))
    assert whole <= found <= 1.001 * whole  # that one number more is drawn


@pytest.mark.parametrize(
    "changes",
    [
        {"checkpointing": True},
        {"checkpointing": 2},
        {"checkpointing": "0-1"},
        {"offload": "0-0", "checkpointing": "1-1"},
        {"optimizer": "adamw-foreach"},
        {"optimizer": "adamw-8bit"},
        {"optimizer": "paged-adamw-8bit"},
        {"optimizer": "adafactor"},
        {"optimizer": "lion"},
        {"optimizer": "lion-8bit"},
        {"optimizer": "sgd"},
        {"optimizer_in_backward": True, "max_grad_norm": 0},
        {"layout": "padded"},
        {"layout": "documents"},
    ],
    ids=str,
)
def test_every_saver_and_optimizer_is_seen(changes: dict[str, Any]) -> None:
    layout = changes.pop("layout", "flat")
    config = contract.config_for("full", **changes)
    steps = [[batch(9, 5)], [batch(*[200] * 12), batch(*[200] * 14)][: 1 if "optimizer_in_backward" in changes else 2]]
    work = plan.Work(config, tiny.make_model("llama").config, steps, batch(*[230] * 9), layout)
    assert most(predicted(work)) == pytest.approx(really(config, "llama", work, "none"), rel=CLOSE)


def test_a_trace_that_forgets_activations_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    config = contract.config_for("lora")
    work = plan.Work(config, tiny.make_model("llama").config, [[batch(*[240] * 25)]])
    right = most(predicted(work))
    found = Tracer._see
    monkeypatch.setattr(Tracer, "_see", lambda self, t, op: found(self, t.new_empty(0) if op == "aten::add" else t, op))
    assert most(predicted(work)) < right * (1 - 5 * CLOSE)


def test_a_phase_that_fails_is_in_no_figure() -> None:
    tracer = trace.Tracer()
    with tracer:
        with suppress(MemoryError), tracer.during("step"):
            torch.empty(4 << 20, dtype=torch.uint8)
            raise MemoryError
        with tracer.during("step"):
            torch.empty(1 << 20, dtype=torch.uint8)
    tracer.close()
    assert usage(tracer).peak.bytes == 1 << 20


def test_parts_add_up_and_every_phase_is_there() -> None:
    work = plan.Work(
        contract.config_for("full"), tiny.make_model("qwen2").config, [[batch(30, 50)], [batch(200, 100)]], batch(60)
    )
    tracer = predicted(work)
    seen = usage(tracer)
    # with every weight trained nothing is put on the model
    assert [moment.phase for moment in seen.phases] == [name for name in PHASES if name != "start"]
    for moment in seen.phases:
        assert sum(moment.parts.values()) == moment.bytes
    assert seen.peak == max(seen.phases, key=lambda moment: moment.bytes)
    trained = sum(p.numel() for p in without_weights(work.model_config).parameters()) * 4
    update = next(moment for moment in seen.phases if moment.phase == "update").parts
    assert update[storage.TRAINABLE] == trained
    assert update[storage.GRADIENTS] == trained
    assert 2 * trained <= update[storage.STATES] <= 2 * trained + 4096  # and a step's number for each tensor
    assert seen.timeline[0].at < 0.02
    assert seen.timeline[-1].at <= 1
    assert all(sum(point.parts.values()) <= seen.peak.bytes for point in seen.timeline)


def test_quantized_weights_and_their_constants_are_those_of_the_loaded_model() -> None:
    for quant in ("int8", "nf4"):
        config = contract.config_for("lora", quant=quant)
        work = plan.Work(config, tiny.make_model("llama").config, [[batch(5)]])
        parts = usage(predicted(work)).phases[0].parts
        tracer = Tracer()
        there = count(contract.make_base("llama", "fp32", None, quant), tracer)
        assert sum(parts.values()) == there
        assert parts[storage.CONSTANTS] > 0


# ---- overrides ----


def _allocated(work: Callable[[], Any]) -> int:
    """What is there after some work that was not there before, by torch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = work()
    found = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    del kept
    return sum(found)


@pytest.mark.parametrize(("tokens", "width", "inner"), [(20, 24, 24), (20, 64, 64), (40, 128, 128)])
def test_the_workspace_of_an_lstm(tokens: int, width: int, inner: int) -> None:
    layer = torch.nn.LSTM(width, inner, batch_first=True)
    x = torch.randn(1, tokens, width, requires_grad=True)
    really_kept = _allocated(lambda: layer(x))
    tracer = Tracer()
    with torch.device("meta"):
        empty = torch.nn.LSTM(width, inner, batch_first=True)
    shadows(empty, tracer)
    before = len(tracer.events)
    with tracer:
        shadow = Shadow(torch.empty(1, tokens, width, device="meta"), requires_grad=True)
        kept = empty(shadow)
    tracer.close()
    kept = sum(size for _, size in tracer.events[before:])
    assert kept == pytest.approx(really_kept, rel=0.15)
    assert kept is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_of_a_layer_norm(dtype: torch.dtype) -> None:
    x, weight = torch.ones(4, 8, dtype=dtype), torch.ones(8, dtype=dtype)
    _, mean, _ = torch.native_layer_norm(x, [8], weight, weight, 1e-5)
    tracer = Tracer()
    with tracer:
        shadow = Shadow(torch.empty(4, 8, dtype=dtype, device="meta"))
        weights = Shadow(torch.empty(8, dtype=dtype, device="meta"))
        _, expected, _ = torch.native_layer_norm(shadow, [8], weights, weights, 1e-5)
    tracer.close()
    assert expected.dtype == mean.dtype


def test_values_are_supposed_only_where_there_are_none() -> None:
    with Building():
        assert float(torch.tensor(3.0)) == 3.0
        assert float(torch.empty((), device="meta")) == 1.0
    with pytest.raises(RuntimeError, match="meta"):
        float(torch.empty((), device="meta"))
    assert set(overrides.SUPPOSED) >= {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default}


# ---- what a GPU does otherwise ----


def _ops(work: Callable[[], Any]) -> set[str]:
    tracer = Tracer(AMPERE)
    with tracer, Cuda():
        kept = work()
    tracer.close()
    assert kept is not None
    return {block.op.rpartition("::")[2] for block in tracer.blocks}


def _heads(heads: int, width: int, dtype: torch.dtype) -> Tensor:
    inner = torch.empty(1, heads, 40, width, dtype=dtype, device="meta")
    return Shadow(inner, requires_grad=True)


def test_attention_is_what_a_gpu_would_run() -> None:
    half, single = torch.bfloat16, torch.float32

    def run(q: Tensor, k: Tensor, **how: Any) -> Tensor:
        return F.scaled_dot_product_attention(q, k, k, **how)

    flash, efficient = "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention"
    assert flash in _ops(lambda: run(_heads(4, 16, half), _heads(2, 16, half), is_causal=True, enable_gqa=True))
    assert efficient in _ops(lambda: run(_heads(4, 16, single), _heads(4, 16, single), is_causal=True))
    masked = _ops(lambda: run(_heads(4, 16, half), _heads(4, 16, half), attn_mask=torch.ones(40, 40, dtype=torch.bool)))
    assert efficient in masked
    assert "constant_pad_nd" in masked  # rows of 40 numbers are no whole multiples of 16
    assert efficient in _ops(lambda: run(_heads(2, 512, half), _heads(2, 512, half)))  # too wide a head for flash


def test_autocast_on_a_gpu_computes_norms_in_float32() -> None:
    def norm() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.layer_norm(Shadow(torch.empty(3, 8, dtype=torch.bfloat16, device="meta")), [8])

    tracer = Tracer(AMPERE)
    with tracer, Cuda():
        assert norm().dtype == torch.float32
    with tracer:
        assert norm().dtype == torch.bfloat16  # as on a CPU
    tracer.close()


def test_a_checkpointed_block_is_recomputed_as_a_gpu_would() -> None:
    config = contract.config_for("lora", "bf16", checkpointing=True)
    work = plan.Work(config, tiny.make_model("llama").config, [[batch(60, 30)]])
    tracer = plan.traced(work, AMPERE)
    found = {(block.region, block.op.rpartition("::")[2]) for block in tracer.blocks}
    assert ("forward", "_flash_attention_forward") in found
    assert ("backward", "_flash_attention_forward") in found


# ---- published figures ----


@pytest.mark.parametrize(("checkpointing", "published"), [(False, 8760), (True, 6018)])
def test_the_plain_loop_of_llama_1b(checkpointing: bool, published: int) -> None:
    import importlib.util
    from pathlib import Path

    path = Path(__file__).parents[2] / "benchmarks" / "memory_llama.py"
    spec = importlib.util.spec_from_file_location("memory_llama", path)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    assert round(benchmark.plain_trace(checkpointing) / 2**20) == published
    assert benchmark.plain_formula(checkpointing) / 2**20 == pytest.approx(published, rel=1e-3)
    own = benchmark.own(checkpointing)
    assert own.peak.bytes / 2**20 < (4800, 2900)[checkpointing]
    assert sum(own.closed.values()) == pytest.approx(own.peak.bytes, rel=0.05)


@pytest.mark.parametrize("name", ["adamw-8bit", "lion-8bit", "lion"])
def test_what_an_update_of_bitsandbytes_takes_is_seen(name: str) -> None:
    """The peak of a model whose activations are small: the update of its largest matrix."""
    shape = LlamaConfig(
        vocab_size=2000, hidden_size=256, intermediate_size=2048, num_hidden_layers=2, num_attention_heads=4
    )
    config = build({"model": "m", "data": ["d"], "method": "full", "optimizer": name, "precision": "fp32"})
    work = plan.Work(config, shape, [[batch(9)], [batch(9)]])
    tracer = predicted(work)
    model = adapters.attach(LlamaForCausalLM(shape), config)
    there = count(model, Tracer())
    measured = most_allocated(lambda: plan.go(model, work, trace.Blind()), there)
    assert any(block.op in overrides.INSIDE for block in tracer.blocks)
    assert most(tracer) == pytest.approx(measured, rel=CLOSE), f"{most(tracer) / measured - 1:+.3%}"


# ---- what traces share ----


def test_a_trace_is_the_same_whether_others_went_before_it() -> None:
    """What operations gave is kept for all traces: none may depend on which ran first."""
    config = settings_only({"method": "lora", "precision": "fp32", "checkpointing": True})
    batch = steps.made_up(2, 24, 400)
    work = plan.Work(config, tiny.make_model("llama").config, [[batch], [batch]])
    there = known.results(CPU, torch.float32)
    there.clear()
    first = plan.traced(work)
    asked = len(there)
    again = plan.traced(work)
    assert asked > 50
    assert len(there) == asked  # the second asked for nothing new
    assert (first.events, first.blocks, first.course) == (again.events, again.blocks, again.course)


def test_what_only_writes_is_distinguished_from_what_changes_a_shape() -> None:
    aten = torch.ops.aten
    for func in (aten.add_.Tensor, aten.addcdiv_.default, aten.zero_.default, aten.copy_.default):
        assert known.facts(func).writes, func
    for func in (aten.resize_.default, aten.set_.source_Tensor, aten.as_strided_.default, aten.add.Tensor):
        assert not known.facts(func).writes, func
