"""A plan knows what the sample answers take: keys and values beside weights and states."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fitune.core.config import build
from fitune.engine.batching import Batcher, Request, Room
from fitune.engine.drawing import Sampling
from fitune.memory import answers, device, plan, steps
from fitune.models import attached

GIB = 2**30


def shape(blocks: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=1000, hidden_size=128, intermediate_size=344, num_hidden_layers=blocks, num_attention_heads=8,
        num_key_value_heads=4,
    )  # fmt: skip


def config(prompts: int, tokens: int, precision: str = "fp32") -> Any:
    given = {"model": "m", "data": ["d"], "precision": precision, "lora": {"rank": 2}}
    return build({**given, "sample_prompts": prompts, "sample_tokens": tokens})


@pytest.mark.parametrize(
    ("prompt", "tokens", "blocks", "precision"),
    [(300, 4, 4, "fp32"), (20, 24, 8, "fp32"), (300, 4, 2, "bf16")],
)
def test_what_generation_takes_is_what_is_planned(prompt: int, tokens: int, blocks: int, precision: str) -> None:
    """By torch's own count of what is allocated while three prompts are answered."""
    model = LlamaForCausalLM(shape(blocks)).eval()
    model = model.bfloat16() if precision == "bf16" else model
    attached.of(model).compute = model.dtype
    encoder = SimpleNamespace(stop_ids=[-1])
    tuned: Any = SimpleNamespace(model=model, encoder=encoder)
    with (
        Batcher.open(tuned, Room(running=3)) as batcher,
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        for _ in range(3):
            ids = torch.randint(1000, (prompt,)).tolist()
            batcher.add(Request(ids, Sampling(max_new_tokens=tokens), lambda token: None))
        while batcher.busy:
            batcher.step()
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    predicted = answers.bytes_taken(
        config(3, tokens, precision), shape(blocks), steps.made_up(2, prompt, 1000), on_gpu=False
    )
    assert predicted == pytest.approx(most, rel=0.12)


@pytest.mark.parametrize(("widens", "measured"), [(False, 1_441_920), (True, 1_648_576)])
def test_a_cpu_without_bf16_instructions_makes_a_float32_copy(
    monkeypatch: pytest.MonkeyPatch, widens: bool, measured: int
) -> None:
    """As the test above measures on a CPU with AVX512-BF16, and there with ONEDNN_MAX_CPU_ISA=AVX512_CORE."""
    monkeypatch.setattr(answers, "widens", lambda: widens)
    batch = steps.made_up(2, 300, 1000)
    assert answers.bytes_taken(config(3, 4, "bf16"), shape(2), batch, on_gpu=False) == pytest.approx(measured, rel=0.03)
    on_gpu = answers.bytes_taken(config(3, 4, "bf16"), shape(2), batch, on_gpu=True)
    assert on_gpu > 1_441_920  # whatever this CPU does


@pytest.mark.parametrize(
    ("avx512", "bf16", "widens"), [(False, False, False), (True, False, True), (True, True, False)]
)
def test_only_avx512_without_bf16_makes_a_float32_copy(
    monkeypatch: pytest.MonkeyPatch, avx512: bool, bf16: bool, widens: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    assert answers.widens() is widens


def test_answers_are_in_the_plan_beside_the_states() -> None:
    batch = steps.made_up(1, 40, 1000)

    def made(prompts: int, held_out: Any = batch, kind: str = "cuda") -> plan.Plan:
        work = plan.Work(config(prompts, 400), shape(8), [[batch]], held_out)
        return plan.plan(work, device.Device("card", kind, 80 * GIB), name="m")

    few, many, none = made(1), made(16), made(0)
    phases = {moment.phase: moment for moment in many.phases}
    assert many.peak.phase == "answers"
    taken = answers.bytes_taken(config(16, 400), shape(8), batch, on_gpu=True)
    assert phases["answers"].parts["optimizer states"] == phases["update"].parts["optimizer states"]
    assert (
        phases["answers"].bytes - sum(size for name, size in phases["answers"].parts.items() if name != "temporaries")
        >= taken
    )
    assert many.needed > few.needed + 9 * 2**20  # the allocator's too
    assert made(16, kind="cpu").needed > made(0, kind="cpu").needed
    assert "answers" not in {moment.phase for moment in none.phases}
    assert "answers" not in {moment.phase for moment in made(16, None).phases}
    assert few.peak.phase != "answers"
