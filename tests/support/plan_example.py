"""A memory plan with made-up figures, for views."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fitune.core.plan import Plan

MIB, GIB = 2**20, 2**30


PHASES = ("load", "forward", "loss", "backward", "update", "evaluation", "checkpoint")


BASE = {"frozen weights": 4.0, "quantization constants": 0.1, "trainable weights": 0.03}


STATES = {"optimizer states": 0.06}


EACH: dict[str, dict[str, float]] = {  # GiB
    "load": {**BASE, "temporaries": 0.5},
    "forward": {**BASE, "activations": 7.2, "dequantized and cast weights": 0.22, "temporaries": 0.3},
    "loss": {**BASE, "activations": 7.25, "logits and loss": 4.72},
    "backward": {
        **BASE,
        "gradients": 0.03,
        "activations": 7.2,
        "dequantized and cast weights": 0.44,
        "temporaries": 0.9,
    },
    "update": {**BASE, **STATES, "gradients": 0.03, "temporaries": 0.04},
    "evaluation": {**BASE, **STATES, "logits and loss": 3.1, "dequantized and cast weights": 0.22},
    "checkpoint": {**BASE, **STATES},
}


def sizes(parts: dict[str, float], unit: int) -> dict[str, int]:
    return {name: int(size * unit) for name, size in parts.items()}


def timeline(unit: int) -> list[dict[str, object]]:
    """Two steps: what is used grows in the forward pass and shrinks in the backward pass."""
    stretches = [("load", 8), *[("forward", 30), ("loss", 4), ("backward", 32), ("update", 3)] * 2]
    stretches += [("evaluation", 10), ("checkpoint", 4)]
    points: list[dict[str, object]] = []
    for phase, count in stretches:
        for n in range(count):
            grown = {"load": (n + 1) / count, "forward": (n + 1) / count, "backward": 1 - n / count}.get(phase, 1.0)
            moving = set(EACH[phase]) if phase == "load" else {"activations", "temporaries"}
            parts = {name: size * (grown if name in moving else 1) for name, size in EACH[phase].items()}
            points.append({"phase": phase, "parts": sizes(parts, unit)})
    return [{"at": n / (len(points) - 1), **point} for n, point in enumerate(points)]


def example(unit: int = GIB, **changed: object) -> Plan:
    """A plan for a card of 24 GiB, or the same in smaller units."""
    phases: list[dict[str, Any]] = [{"phase": name, "parts": sizes(EACH[name], unit)} for name in PHASES]
    phases = [{**phase, "bytes": sum(phase["parts"].values())} for phase in phases]
    peak = phases[2]
    plan = {
        "model": "models/llama-3.1-8b",
        "method": "lora",
        "precision": "bf16",
        "quant": "nf4",
        "device": "cuda",
        "gpu": "rtx-4090",
        "how": "trace",
        "why": "",
        "tokens": 2048,
        "rows": 4,
        "max_length": 512,
        "trainable": 3407872,
        "total": 8033669120,
        "phases": phases,
        "peak": {
            **peak,
            "largest": [
                {"what": "lm_head: aten::mm", "count": 3, "bytes": int(3.9 * unit)},
                {"what": "model.layers.*.mlp.gate_proj: aten::mm", "count": 32, "bytes": int(1.75 * unit)},
            ],
        },
        "timeline": timeline(unit),
        "allocated": peak["bytes"],
        "reserved": int(16.8 * unit),
        "reserved_expandable": int(16.3 * unit),
        "smallest": int(16.2 * unit),
        "outside": {"CUDA context": int(0.484 * unit), "cuBLAS workspaces": int(0.016 * unit)},
        "needed": int(17.3 * unit),
        "budget": 24 * unit,
        "closed": sizes({**BASE, **STATES, "gradients": 0.03, "activations": 7.0}, unit),
        "notes": ["attention by flash: no scores in memory", "<b>not</b> markup"],
    }
    return Plan.from_dict({**plan, **changed})


def on_cpu() -> Plan:
    """No budget, nothing outside, no allocator, a Chinese name, one thousandth of the size."""
    plan = example(MIB * 100, model="模型/通义千问-小", device="cpu", gpu=None, quant="none", outside={}, budget=None)
    nothing: dict[str, Any] = {"reserved": None, "reserved_expandable": None, "smallest": None, "max_length": None}
    return replace(plan, **nothing, needed=plan.allocated)
