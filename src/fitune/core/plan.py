"""The records of a memory plan: what a run takes, in bytes, by phase and by category. No torch here.

In: what memory/plan.py found out, or the plan.json of a run folder. Out: a Plan, which views draw and commands print.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from fitune.core.parse import parse


@dataclass(frozen=True)
class Moment:
    """The most that a phase takes, and what it is made of by category, in bytes."""

    phase: str
    bytes: int
    parts: dict[str, int]


@dataclass(frozen=True)
class Point:
    """A point of the course of a run: `at` is 0 at its start and 1 at its end; parts: bytes by category."""

    at: float
    phase: str
    parts: dict[str, int]


@dataclass(frozen=True)
class Holding:
    """Tensors of one kind that are there at the peak: how many storages, and their bytes together."""

    what: str
    count: int
    bytes: int


@dataclass(frozen=True)
class Compared:
    """Bytes that were predicted beside the bytes that were measured."""

    what: str
    predicted: int
    measured: int


@dataclass(frozen=True)
class Plan:
    """What a run takes, in bytes.

    how: trace, or closed form and why. phases: the most of each. peak: the most of all, largest: of what it is made.
    allocated: by the allocator's count. reserved: from the GPU, with fragmentation; smallest: the least with which it
    goes through, giving cached memory back when needed; both None on a CPU. outside: beside the tensors. needed: all of
    it. budget, spare, fits: of the device, None where nobody said how much there is. closed: the same by closed forms.
    loss_rows: of how many label rows logits are there at once. blocks: of the model. recomputed: of them those that are
    in the backward pass, by number; waiting: those whose activations are in main memory beside a GPU until then, where
    they take host bytes. more_work: operations of a step that this adds, as a share of those without. frozen_cache:
    where hidden states of the lowest frozen_blocks, frozen_bytes of them, are kept for later epochs (memory, disk; off:
    nowhere). later_work: operations of such an epoch, as a share of the first one's. parallel: of one of several
    processes, does it have the whole model (replicate), or its part (shard)?
    """

    model: str
    method: str
    precision: str
    quant: str
    device: str
    gpu: str | None
    how: str
    why: str
    tokens: int
    rows: int
    max_length: int | None
    trainable: int
    total: int
    phases: list[Moment]
    peak: Moment
    largest: list[Holding]
    timeline: list[Point]
    allocated: int
    reserved: int | None
    reserved_expandable: int | None
    smallest: int | None
    outside: dict[str, int]
    needed: int
    budget: int | None
    closed: dict[str, int]
    notes: list[str] = field(default_factory=list)
    loss_rows: int = 0
    blocks: int = 0
    recomputed: list[int] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    host: int = 0
    more_work: float = 0.0
    frozen_cache: str = "off"
    frozen_blocks: int = 0
    frozen_bytes: int = 0
    later_work: float = 1.0
    parallel: str = ""

    @property
    def spare(self) -> int | None:
        """What would be left of the budget; negative: what is missing."""
        return None if self.budget is None else self.budget - self.needed

    @property
    def fits(self) -> bool | None:
        """Is there room for it?"""
        return None if self.spare is None else self.spare >= 0

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        values = asdict(self)
        values["peak"]["largest"] = values.pop("largest")
        return {**values, "spare": self.spare, "fits": self.fits}

    @classmethod
    def from_dict(cls, values: Mapping[str, object], where: str = "plan") -> Plan:
        """Back from what `as_dict` gave; fields that are no plan's are left alone.

        Args:
            values: the mapping, as JSON has it.
            where: its name in errors.

        Raises:
            RunFolderError: a field is missing, or of another type.
        """
        peak = values.get("peak")
        largest = peak.get("largest", []) if isinstance(peak, Mapping) else []
        return parse(cls, {**values, "largest": largest}, where)


def size_text(count: int) -> str:
    """Bytes as text: GiB from 10 GiB on, as a plan writes them."""
    return f"{count / 2**30:,.1f} GiB" if count >= 10 * 2**30 else f"{count / 2**20:,.0f} MiB"
