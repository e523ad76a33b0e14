"""Kernels that are wrong for packed weights on this machine: the record of each, and what a user reads of them.

In: what quant/trust.py found. Out: a Finding, or a line of the log.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from fitune.core.records import Finding

SHOWN = 8  # shapes that are listed
OTHERS = "fitune computes exactly; transformers and PEFT on this machine compute with the wrong weights"


@dataclass(frozen=True)
class Kind:
    """What packed layers have in common for which a kernel is right or wrong together: nf4, (out, in), what else."""

    form: str
    shape: tuple[int, ...]
    setting: str

    @property
    def size(self) -> str:
        """The shape as it is written."""
        return " x ".join(map(str, self.shape))


@dataclass(frozen=True)
class Fault:
    """A kernel that is wrong for a kind of layers.

    kernel: what was tried. error: of its result, relative to the exact one's norm. instead: what fitune uses.
    """

    kind: Kind
    dtype: str
    device: str
    kernel: str
    error: float
    instead: str


def describe(faults: Iterable[Fault]) -> str:
    """Which shapes, formats and dtypes each kernel gets wrong, by how much at most, and what is used."""
    groups: dict[tuple[str, str], list[Fault]] = {}
    for fault in faults:
        groups.setdefault((fault.kernel, fault.instead), []).append(fault)
    lines = []
    for (kernel, instead), some in groups.items():
        shapes = list(dict.fromkeys(fault.kind.size for fault in some))
        more = f" and {len(shapes) - SHOWN} more" if len(shapes) > SHOWN else ""
        what = [list(dict.fromkeys(names)) for names in zip(*map(_what, some), strict=True)]
        worst = max(fault.error for fault in some)
        kinds = "; ".join(", ".join(names) for names in what)
        wrong = f"{kernel} is wrong for {', '.join(shapes[:SHOWN])}{more} ({kinds}; off by up to {worst:.2f})"
        lines.append(f"{wrong}, {instead} is used")
    return "; ".join(lines)


def _what(fault: Fault) -> tuple[str, str, str, str]:
    return fault.kind.form, fault.kind.setting, fault.dtype, fault.device


def finding(faults: Sequence[Fault]) -> Finding:
    """The kernels give for the model's packed layers the values that their packed numbers stand for."""
    if not faults:
        return Finding("quant-kernels", "ok", "what is computed with packed weights is what they stand for")
    return Finding("quant-kernels", "warn", f"on this machine {describe(faults)}", OTHERS)


@cache
def warn_once(text: str) -> None:
    """Log a line for people, each text once."""
    logging.getLogger("fitune").warning(text)


def notice(faults: Sequence[Fault]) -> None:
    """Log the same, once, for what has no list of findings: chat, evaluation, merging, quantizing."""
    if faults:
        warn_once(f"warning: {finding(faults).text}; {OTHERS}")
