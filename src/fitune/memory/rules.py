"""The rules of thumb by which people guess what a run takes, beside its plan.

In: a plan. Out: what each rule says, and how far that is from what the plan needs. None of them looks at the length of
rows or at activations; they are taught, so they are shown with their error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

from fitune.core.plan import Plan

ADAM = 16  # bytes of a trained weight: itself in float32 4, its gradient 4, Adam's two states 8
STORED = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0}
QUANTIZED = {"int8": 1.0, "nf4": 0.5, "fp4": 0.5}


@dataclass(frozen=True)
class Rule:
    """A rule of thumb: its name, how it counts, the bytes that it gives, and what the plan needs."""

    name: str
    how: str
    bytes: int
    planned: int

    @property
    def off(self) -> float:
        """How far the rule is from the plan, as a share of the plan: -0.4 is 40 % too little."""
        return self.bytes / self.planned - 1

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {**asdict(self), "off": self.off}


def rules(plan: Plan) -> list[Rule]:
    """What the rules say of a plan's model, method and precision."""
    stored = QUANTIZED.get(plan.quant, STORED.get(plan.precision, 4.0))
    frozen = plan.total - plan.trainable
    by: dict[str, tuple[str, Callable[[], float]]] = {
        "6 x batch x parameters": (f"6 x {plan.rows} x {plan.total:,}", lambda: 6 * plan.rows * plan.total),
        "16 bytes a parameter": (
            "weights 4, gradients 4, Adam's states 8, as if all were trained", lambda: ADAM * plan.total,
        ),
        "weights, and 16 a trained one": (
            f"{stored:g} x {frozen:,} + 16 x {plan.trainable:,}", lambda: stored * frozen + ADAM * plan.trainable,
        ),
    }  # fmt: skip
    return [Rule(name, how, round(made()), plan.needed) for name, (how, made) in by.items()]
