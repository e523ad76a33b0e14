"""What it takes to put a method on a model is said by name, for every method of PEFT; the rest of a run with it too."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import LlamaConfig, LlamaForCausalLM

from fitune.core.config import build
from fitune.core.errors import ConfigError
from fitune.memory import plan, steps
from fitune.memory.counted import count
from fitune.memory.trace import Tracer
from fitune.memory.usage import usage
from fitune.models import adapters
from fitune.models.kernels.target import AMPERE, CPU, Target
from fitune.models.methods import other
from fitune.models.prepare import ready

CLOSE, CLOSE_START = 0.01, 0.05  # shares of what was measured
SHAPE = LlamaConfig(
    vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=4,
)  # fmt: skip
KINDS = sorted(str(getattr(kind, "value", kind)) for kind in PEFT_TYPE_TO_CONFIG_MAPPING)
QUICK = {"OSF", "SHIRA", "FROD", "VBLORA"}  # decompositions, sparse matrices, a mask that decides a shape
SETTINGS: dict[str, dict[str, Any]] = {
    "ADAMSS": {"r": 16, "num_subspaces": 4},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2},
    "C3A": {"block_size": 32},
    "FOURIERFT": {"n_frequency": 100},
    "FROD": {"progressbar": False},
    "OFT": {"oft_block_size": 4, "r": 0},
    "PREFIX_TUNING": {"num_virtual_tokens": 4},
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
    "P_TUNING": {"num_virtual_tokens": 4},
    "SHIRA": {"r": 4},
    "VBLORA": {"vector_length": 32, "num_vectors": 32},
    "WAVEFT": {"n_frequency": 100},
}


def work_of(kind: str) -> plan.Work:
    method = {"method": f"peft:{kind}", "peft": SETTINGS.get(kind, {})}
    config = build({"model": "none", "data": ["none"], "precision": "fp32", **method})
    short, long = steps.made_up(1, 8, 512), steps.made_up(4, 64, 512)
    return plan.Work(config, SHAPE, [[short], [long], [short]], long)


def measured(work: plan.Work) -> dict[str, int]:
    """The most bytes of each phase, of real tensors."""
    tracer = Tracer(real=True)
    base = ready(LlamaForCausalLM(SHAPE), "fp32")
    with tracer.during("load"):
        count(base, tracer)
    with tracer, tracer.during("start"):
        model = adapters.attach(base, work.config)
    with tracer.during("start"):
        count(model, tracer)
    plan.go(model, work, tracer)
    tracer.close()
    return {moment.phase: moment.bytes for moment in usage(tracer).phases}


def phases(work: plan.Work, target: Target = CPU) -> dict[str, int]:
    return {moment.phase: moment.bytes for moment in usage(plan.traced(work, target)).phases}


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k in QUICK else pytest.mark.full) for k in KINDS])
def test_what_is_planned_of_a_method_of_peft_is_what_it_takes(kind: str) -> None:
    if kind in other.NEEDS_MORE:
        with pytest.raises(ConfigError, match="needs more than plain training steps"):
            other.find(f"peft:{kind}").check(work_of("LORA").config)
        return
    if kind == "ADAMSS" and find_spec("sklearn") is None:
        pytest.skip("PEFT needs scikit-learn for it")
    work = work_of(kind)
    predicted, found = phases(work), measured(work)
    assert predicted.keys() - {"answers"} == found.keys()  # sample answers are planned beside the work
    for phase, size in found.items():
        assert predicted[phase] == pytest.approx(size, rel=CLOSE_START if phase == "start" else CLOSE), phase
    assert phases(work, AMPERE)["backward"] > 0  # on paper there is a GPU too


def test_a_decomposition_takes_more_than_what_it_leaves() -> None:
    tracer = plan.traced(work_of("OSF"))
    predicted = {moment.phase: moment.bytes for moment in usage(tracer).phases}
    left = sum(size for at, (_, size) in enumerate(tracer.events) if at < _first_of(tracer, "step"))
    assert predicted["start"] > left > predicted["load"]
    # whoever leaves the start out does not see it
    assert "start" not in {moment.phase for moment in usage(tracer, without="start").phases}


def _first_of(tracer: Tracer, wanted: str) -> int:
    return next(at for at, phase, _ in tracer.course if phase == wanted)


def test_what_a_method_leaves_in_main_memory_is_not_the_gpus() -> None:
    made = work_of("BOFT")  # its permutation, a matrix as wide as the model, stays where it was made
    each = 4 * SHAPE.hidden_size**2 * 2 * SHAPE.num_hidden_layers  # of float32, for queries and values
    tracers = [plan.traced(made, target) for target in (CPU, AMPERE)]
    left = [sum(size for _, size in one.events[: _first_of(one, "step")]) for one in tracers]
    assert left[0] - left[1] == pytest.approx(each, rel=0.01)


def test_values_that_no_shadow_holds_are_those_of_a_healthy_run() -> None:
    with Tracer():
        logits = torch.empty(300, 300).normal_()
        assert not logits.isinf().any()
        assert not (logits != logits).any()
        mask = torch.zeros(300, 300).view(1, -1)
        chosen = torch.randperm(300 * 300)[:77]
        mask = mask.scatter_(1, chosen.unsqueeze(0), torch.ones(1, 77)).view(300, 300)
        assert torch.where(mask == 1.0)[0].shape == (77,)


def test_a_package_that_is_missing_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> None:
        raise ImportError("scikit-learn is required")

    monkeypatch.setattr(other, "get_peft_model", missing)
    with pytest.raises(ConfigError, match="PEFT needs a package") as raised:
        plan.without_values(work_of("LORA"))
    assert "scikit-learn" in str(raised.value)


def test_published_runs_are_predicted_within_their_bound() -> None:
    """The file that `python benchmarks/memory_l40s.py` wrote."""
    path = Path(__file__).parents[2] / "results" / "memory_l40s.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["table"]
    errors = {row["name"]: row["predicted_bytes"] / row["measured_bytes"] - 1 for row in rows}
    for kind in (
        "osf",
        "lora--llama-3.2-3B-rank32-lorafa",
        "boft",
        "trainable_tokens",
        "adamss",
        "frod",
        "shira",
        "vblora",
    ):
        assert all(abs(error) <= 0.025 for name, error in errors.items() if name.startswith(kind)), kind
    assert sorted(map(abs, errors.values()))[len(errors) // 2] <= 0.0075
    # beyond the bound: prefixes of 200 tokens
    beyond = {name.partition("--")[0] for name, error in errors.items() if abs(error) > 0.025}
    assert beyond <= {"prefixtuning"}
