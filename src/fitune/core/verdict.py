"""Is a tuned model better than its base, and what did it forget? The records of a verdict, and the rule that gives it.

In: for each row what the base and the tuned model reached. Out: a Verdict. A measure of some rows is better or worse
where both hold: its test, corrected for the number of tests of the run, is below ALPHA, and the whole interval of the
difference lies beyond what counts as a difference. Else no difference is shown, which is not the same as none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fitune.core.paired import Floats, exact, flipped, holm, interval
from fitune.core.results import Answered

Outcome = Literal["better", "no difference shown", "worse"]
Name = Literal["loss", "exact match", "known"]
NONE: Outcome = "no difference shown"
ALPHA = 0.05  # of all tests of a run together
LEAST = {"loss": 0.01, "exact match": 0.0, "known": 0.0}  # a difference below it is none: 0.01 is 1 % of perplexity
ALL = "all"
KNOWN = 0.5  # share of general rows that a base must answer for its answers to decide what was forgotten
SHOWN = 5  # rows of what was forgotten


@dataclass(frozen=True)
class Pairs:
    """One measure of each row.

    before, after: (R,), of the base and of the tuned model; of a loss they are sums over its tokens. weights: (R,),
    what a row counts for: its tokens; of answers 1.
    """

    name: Name
    before: Floats
    after: Floats
    weights: Floats

    def part(self, rows: NDArray[np.int64]) -> Pairs:
        """Of these rows."""
        return Pairs(self.name, self.before[rows], self.after[rows], self.weights[rows])


@dataclass(frozen=True)
class Change:
    """How a measure of some rows changed.

    Args:
        name: loss (per target token, in nats), exact match (share of the answers), known (share of the answers that
            contain the expected one).
        base, tuned: its value. difference: tuned less base. low, high: 95 % interval of the difference, by bootstrap
            over rows.
        better, worse: rows that changed to either side. sign: the exact test of these two numbers.
        p: of the test that decides: of answers the exact test, of a loss that of its mean. corrected: the same for all
            tests of the run together.
        outcome: what that shows.
    """

    name: Name
    base: float
    tuned: float
    difference: float
    low: float
    high: float
    better: int
    worse: int
    sign: float
    p: float
    corrected: float = 1.0
    outcome: Outcome = NONE


@dataclass(frozen=True)
class Kind:
    """Rows of one kind; `all` are all rows of a section."""

    name: str
    rows: int
    changes: tuple[Change, ...]
    outcome: Outcome = NONE


@dataclass(frozen=True)
class Section:
    """What rows of one purpose show. name: held-out (what was to be learned), general (what the base knew).

    decides: the measures that its outcomes follow from, the first that shows a difference. lost: rows that the base
    answered and the tuned model does not, the first of `lost_rows`. note: what was not looked at, and why.
    """

    name: str
    kinds: tuple[Kind, ...] = ()
    decides: tuple[Name, ...] = ()
    lost_rows: int = 0
    lost: tuple[Answered, ...] = ()
    note: str = ""

    @property
    def outcome(self) -> Outcome:
        """Of all its rows; where they show no difference, worse if a kind is."""
        found = [kind.outcome for kind in self.kinds]
        if not found:
            return NONE
        return "worse" if found[0] != "better" and "worse" in found else found[0]

    @property
    def worse(self) -> list[str]:
        """Kinds that are worse."""
        return [kind.name for kind in self.kinds if kind.outcome == "worse"]

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {**asdict(self), "outcome": self.outcome, "worse": self.worse}


@dataclass(frozen=True)
class RunVerdict:
    """Of one run."""

    run: str
    sections: tuple[Section, ...]

    @property
    def forgot(self) -> list[str]:
        """Kinds of general rows that are worse."""
        return [name for section in self.sections if section.name == "general" for name in section.worse]

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {"run": self.run, "forgot": self.forgot, "sections": [section.as_dict() for section in self.sections]}


@dataclass(frozen=True)
class Verdict:
    """Of one run, or of several side by side; together: the mean of the runs, where all were measured on the same
    rows."""

    runs: tuple[RunVerdict, ...]
    together: RunVerdict | None = None

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        together = None if self.together is None else self.together.as_dict()
        return {"runs": [run.as_dict() for run in self.runs], "together": together}


# ---- the rule ----


@dataclass(frozen=True)
class Measured:
    """What the rows of a section reached.

    Args:
        name: of the section.
        pairs: its measures, each of all rows; a row without a measure has weight 0.
        kinds: of each row its kind.
        lost: rows that the base answered and the tuned model does not.
        rows: which rows these are: runs with the same have been measured on the same.
        note: what was not looked at.
    """

    name: str
    pairs: Sequence[Pairs]
    kinds: Sequence[str]
    lost: Sequence[Answered] = ()
    rows: str = ""
    note: str = ""


def decided(run: str, measured: Iterable[Measured]) -> RunVerdict:
    """The verdict on a run.

    Args:
        run: its name.
        measured: its sections.
    """
    sections = [_compared(one) for one in measured]
    places = [
        (s, k, c)
        for s, section in enumerate(sections)
        for k, kind in enumerate(section.kinds)
        for c, change in enumerate(kind.changes)
        if change.name in section.decides
    ]
    corrected = dict(zip(places, holm([sections[s].kinds[k].changes[c].p for s, k, c in places]), strict=True))
    return RunVerdict(run, tuple(_with_outcomes(section, s, corrected) for s, section in enumerate(sections)))


def together(run: str, measured: Sequence[Sequence[Measured]]) -> RunVerdict:
    """The verdict on the mean of several runs, measured on the same rows.

    Args:
        run: a name for them.
        measured: the sections of each run.
    """
    means = []
    for same in zip(*measured, strict=True):
        pairs = [_mean([one.pairs[n] for one in same]) for n in range(len(same[0].pairs))]
        means.append(replace(same[0], pairs=pairs, lost=()))
    return decided(run, means)


def _mean(pairs: Sequence[Pairs]) -> Pairs:
    before, after = (np.mean([getattr(one, side) for one in pairs], axis=0) for side in ("before", "after"))
    return replace(pairs[0], before=before, after=after)


def _compared(measured: Measured) -> Section:
    """A section, its outcomes still open."""
    names = sorted(set(measured.kinds))
    groups = {ALL: np.arange(len(measured.kinds))}
    if len(names) > 1:
        groups |= {name: np.flatnonzero(np.array(measured.kinds) == name) for name in names}
    kinds = []
    for name, rows in groups.items():
        changes = [change for pairs in measured.pairs if (change := _change(pairs.part(rows))) is not None]
        if changes:
            kinds.append(Kind(name, len(rows), tuple(changes)))
    decides = _deciding(measured.name, kinds)
    lost = tuple(measured.lost[:SHOWN])
    return Section(measured.name, tuple(kinds), decides, len(measured.lost), lost, measured.note)


def _deciding(section: str, kinds: Sequence[Kind]) -> tuple[Name, ...]:
    """The measures that a section's outcomes follow from, the first that shows a difference before the others."""
    changes = {change.name: change for change in kinds[0].changes} if kinds else {}
    if section == "general" and "known" in changes:
        return ("known",) if changes["known"].base >= KNOWN else ("loss",)
    order: tuple[Name, ...] = ("exact match", "loss")
    return tuple(name for name in order if name in changes)


def _change(pairs: Pairs) -> Change | None:
    """None: no row has this measure."""
    there = np.flatnonzero(pairs.weights > 0)
    if not len(there):
        return None
    pairs = pairs.part(there)
    difference, total = pairs.after - pairs.before, float(pairs.weights.sum())
    up, down = int((difference > 0).sum()), int((difference < 0).sum())
    better, worse = (down, up) if pairs.name == "loss" else (up, down)
    base, tuned = float(pairs.before.sum()) / total, float(pairs.after.sum()) / total
    sign = exact(better, worse)
    p = flipped(difference) if pairs.name == "loss" else sign
    return Change(pairs.name, base, tuned, tuned - base, *interval(difference, pairs.weights), better, worse, sign, p)


def _with_outcomes(section: Section, number: int, corrected: Mapping[tuple[int, int, int], float]) -> Section:
    kinds = []
    for k, kind in enumerate(section.kinds):
        changes = [
            _judged(change, corrected[number, k, c]) if (number, k, c) in corrected else change
            for c, change in enumerate(kind.changes)
        ]
        shown = {change.name: change.outcome for change in changes}
        outcomes = [shown[name] for name in section.decides if name in shown and shown[name] != NONE]
        outcome = outcomes[0] if outcomes else NONE
        kinds.append(replace(kind, changes=tuple(changes), outcome=outcome))
    return replace(section, kinds=tuple(kinds))


def _judged(change: Change, corrected: float) -> Change:
    """A change with its outcome."""
    change = replace(change, corrected=corrected)
    least = LEAST[change.name]
    if corrected > ALPHA or (change.low <= least and change.high >= -least):
        return change
    fell = change.high < -least
    return replace(change, outcome="better" if fell == (change.name == "loss") else "worse")
