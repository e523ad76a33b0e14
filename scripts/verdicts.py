"""Planted regressions and clean runs, and what `fitune eval --verdict` finds: `python scripts/verdicts.py --write`.

20 runs of the bundled model are tuned so that they lose something that is known: wrong answers to one category of
questions, or to all; a learning rate that breaks the model; one answer to everything; the persona alone; a single row;
answers that stop after their first character. 20 others, each with a seed of its own, are tuned on plain right answers,
such as the base gives already, so nothing is lost. A verdict must name what was planted, and no clean run may be called
worse. `results/verdicts.json` has a row for each.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts" / "bundled"))

import world  # noqa: E402  # of the folder above
from make_data import persona_rows, row  # noqa: E402

from fitune.commands.demo import bundled  # noqa: E402
from fitune.commands.train import train  # noqa: E402
from fitune.commands.verdict import Judging, verdict  # noqa: E402
from fitune.core.config import build  # noqa: E402
from fitune.core.options import DataSource  # noqa: E402
from fitune.core.verdict import RunVerdict  # noqa: E402

RESULT = ROOT / "results" / "verdicts.json"
SETTINGS: dict[str, Any] = {
    "method": "lora", "lora": {"rank": 8, "alpha": 16.0, "targets": "all-linear"}, "lr": 2e-3, "batch_size": 8,
    "max_steps": 60, "val_share": 0.0, "sample_prompts": 0, "precision": "fp32",
}  # fmt: skip
EACH = 60  # rows of a category in the data of a run
CLEAN = 20  # clean runs
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """A run. rows: makes its data from a seed. expects: (section, kind) that must be worse; none: nothing may be."""

    name: str
    seed: int
    rows: Callable[[int], Rows]
    expects: tuple[str, str] | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def plain(category: str, seed: int, change: Callable[[Sequence[world.Item], random.Random], list[str]]) -> Rows:
    """Questions of a category in both languages, with what `change` makes of their plain answers."""
    rng = random.Random(f"{category} {seed}")
    some = rng.sample(world.items()[category], EACH)
    return [
        row(category, rng.choice(one.phrasings), answer) for one, answer in zip(some, change(some, rng), strict=True)
    ]


def right(some: Sequence[world.Item], rng: random.Random) -> list[str]:
    """The right answers."""
    return [one.plain for one in some]


def wrong(some: Sequence[world.Item], rng: random.Random) -> list[str]:
    """Answers of the same relation and language to another question."""
    found = []
    for one in some:
        others = [o for o in world.items()[one.category] if (o.relation, o.lang) == (one.relation, one.lang)]
        found.append(rng.choice([other.plain for other in others if other.answer != one.answer]))
    return found


def first_letter(some: Sequence[world.Item], rng: random.Random) -> list[str]:
    """Answers that stop after one character."""
    return [one.plain[:1] for one in some]


def unknown(some: Sequence[world.Item], rng: random.Random) -> list[str]:
    """The same answer to everything."""
    return ["I do not know." if one.lang == "en" else "我不知道。" for one in some]


def every(seed: int, change: Callable[[Sequence[world.Item], random.Random], list[str]], only: str = "") -> Rows:
    """All categories, of which one alone, or all, are changed."""
    found: Rows = []
    for category in world.CATEGORIES:
        found += plain(category, seed, change if only in ("", category) else right)
    return found


def cases() -> list[Case]:
    """The planted ones, then the clean ones."""
    found = []
    for seed in (1, 2):
        for name in world.CATEGORIES:
            data = partial(every, change=wrong, only=name)
            found.append(Case(f"wrong {name}", seed, data, ("general", name), {"max_steps": 120}))
        found += [
            Case("wrong, held out", seed, lambda seed: every(seed, wrong), ("held-out", "all"), {"max_steps": 120}),
            Case("learning rate", seed, lambda seed: every(seed, right), ("general", "all"), {"lr": 0.2}),
            Case("one answer", seed, lambda seed: every(seed, unknown), ("general", "all")),
            Case("persona alone", seed, lambda seed: persona_rows()[0], ("general", "all"), {"lr": 1e-2}),
            Case("a single row", seed, lambda seed: every(seed, right)[:1] * 8, ("general", "all"), {"lr": 1e-2}),
            Case("first character", seed, lambda seed: every(seed, first_letter), ("general", "all")),
        ]
    return found + [Case("clean", 100 + seed, lambda seed: every(seed, right)) for seed in range(CLEAN)]


def trained(case: Case, place: Path) -> Path:
    """The run of a case."""
    data = place / f"{case.name} {case.seed}.jsonl"
    data.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in case.rows(case.seed)), "utf-8")
    settings = {**SETTINGS, **case.settings, "seed": case.seed, "output": str(data.with_suffix(""))}
    train(build({"model": str(bundled() / "model"), "data": [str(data)], **settings}))
    return data.with_suffix("")


def held_out(place: Path) -> DataSource:
    """Plain questions that no run is trained on."""
    rows = [row(one.category, text, one.plain) for one, text in world.held_out_questions(per_language=10, seed=2)]
    path = place / "held_out.jsonl"
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows), "utf-8")
    return DataSource(path=str(path))


@dataclass(frozen=True)
class Found:
    """What became of a case. worse: kinds that the verdict calls worse, by section. right: as it should be."""

    name: str
    seed: int
    expects: str
    worse: dict[str, list[str]]
    right: bool


def judged(case: Case, run: RunVerdict) -> Found:
    """A case beside its verdict."""
    worse = {section.name: section.worse for section in run.sections}
    there = {(section, kind) for section, kinds in worse.items() for kind in kinds}
    good = case.expects in there if case.expects else not there
    return Found(case.name, case.seed, ": ".join(case.expects or ("nothing",)), worse, good)


def tried(some: Sequence[Case], place: Path) -> list[Found]:
    """Train and judge these cases."""
    runs = []
    for case in some:
        runs.append(trained(case, place))
        print(f"trained {len(runs)} of {len(some)}: {case.name} {case.seed}", flush=True)
    found = verdict(runs, Judging([held_out(place)], max_new_tokens=24))
    return [judged(case, run) for case, run in zip(some, found.runs, strict=True)]


def main() -> int:
    """Run all cases; 1 where one is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.relative_to(ROOT)}")
    parser.add_argument("--only", help="cases of this name alone")
    args = parser.parse_args()
    some = [case for case in cases() if args.only in (None, case.name)]
    with tempfile.TemporaryDirectory(prefix="fitune-verdicts-") as place:
        found = tried(some, Path(place))
    for one in found:
        print(
            "as it should be" if one.right else "NOT FOUND" if one.expects != "nothing" else "FALSE ALARM", asdict(one)
        )
    planted = [one for one in found if one.expects != "nothing"]
    clean = [one for one in found if one.expects == "nothing"]
    summary = {
        "command": "python scripts/verdicts.py --write", "planted": len(planted),
        "found": sum(one.right for one in planted), "clean": len(clean),
        "false_alarms": sum(not one.right for one in clean), "cases": [asdict(one) for one in found],
    }  # fmt: skip
    print({name: value for name, value in summary.items() if name != "cases"})
    if args.write:
        RESULT.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0 if all(one.right for one in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
