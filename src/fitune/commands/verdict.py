"""fitune eval RUN --verdict: is the tuned model better than its base, and what did it forget?

In: runs, held-out rows, general checks. Out: a Verdict: each row is measured by the base and by the tuned model, and
the two are compared row by row (core/verdict.py has the rule).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fitune.commands.demo import bundled
from fitune.commands.evaluate import Ready, Request, prepared
from fitune.commands.scores import Judged
from fitune.core.config import RunConfig
from fitune.core.errors import ConfigError, DataError, RunFolderError
from fitune.core.events import Silent, Watcher
from fitune.core.files import sha256
from fitune.core.letters import HAN
from fitune.core.options import DataSource
from fitune.core.paired import Floats
from fitune.core.results import Answered
from fitune.core.verdict import Measured, Name, Pairs, RunVerdict, Verdict, decided, together
from fitune.data import readers, rows, sums
from fitune.data.cache import Cache
from fitune.data.fitting import encode
from fitune.data.pipeline import held_out_of
from fitune.data.store import Rows
from fitune.engine.checkpoint import RunFolder
from fitune.engine.loading import finished, load
from fitune.models.load import Tuned

GENERAL = "general.jsonl"  # of the bundled data: what the bundled base knows
CHINESE, OTHER = "Chinese answers", "other answers"  # kinds of rows that name none
MEAN = "mean of the runs"
ENDS = " \t\n.。!！?？"  # what stands around an answer and is no part of it


@dataclass(frozen=True)
class Judging:
    """What a verdict is made of.

    Args:
        data: held-out rows; none: those that each run held out.
        checks: general checks, rows that the base should answer as before; None: those of the bundled base, for it.
        kind: the column that names the kind of a row.
        take: so many rows of each source.
        answer: generate answers too; without, only losses are compared.
        max_new_tokens: longest answer.
        skip_bad: leave out rows that cannot be used.
        columns: what columns of other names mean.
    """

    data: Sequence[DataSource] = ()
    checks: Sequence[DataSource] | None = None
    kind: str = "kind"
    take: int | None = None
    answer: bool = True
    max_new_tokens: int = 256
    skip_bad: bool = False
    columns: Mapping[str, str] = field(default_factory=dict)

    def sources(self, given: Sequence[DataSource]) -> list[DataSource]:
        """Sources with what is said of all of them."""
        return [
            one.model_copy(update={"take": self.take or one.take, "map": {**self.columns, **one.map}}) for one in given
        ]


@dataclass(frozen=True)
class _Reached:
    """What a model reached on the rows of a section: (R,) summed losses, and its answers."""

    losses: NDArray[np.float64]
    answers: Sequence[Judged]


Known = dict[str, _Reached]  # what a base reached, by all that decides it
Test = Callable[[Judged], bool]


def verdict(
    runs: Sequence[str | Path],
    judging: Judging,
    *,
    loading: Mapping[str, str | None] | None = None,
    watch: Watcher | None = None,
) -> Verdict:
    """Compare tuned models with their bases.

    Args:
        runs: run folders, finished.
        judging: on which rows, and how.
        loading: model, device, precision, quant: as for `load`.
        watch: progress is reported to it.

    Raises:
        FituneError: a run or the data cannot be used.
    """
    watch, known, found = watch or Silent(), Known(), list[tuple[RunVerdict, list[Measured]]]()
    for run in runs:
        if len(runs) > 1:
            watch.message(f"run {len(found) + 1} of {len(runs)}: {run}")
        measured = _measured(RunFolder(run), judging, loading or {}, known, watch)
        found.append((decided(str(run), measured), measured))
    same = len({tuple(one.rows for one in measured) for _, measured in found}) == 1
    mean = together(MEAN, [measured for _, measured in found]) if len(found) > 1 and same else None
    return Verdict(tuple(one for one, _ in found), mean)


def _measured(
    run: RunFolder, judging: Judging, loading: Mapping[str, str | None], known: Known, watch: Watcher
) -> list[Measured]:
    """Both sections of a run."""
    if not run.has_settings():
        raise ConfigError(
            f"{run.path}: a verdict compares a run with its base",
            received="no run folder",
            expected="a folder that fitune train wrote",
            fix="without --verdict any model is measured",
        )
    config = finished(run)
    base = loading.get("model") or config.model
    of_base = json.dumps([base, config.precision, config.storage_dtype, config.quant.model_dump(), *loading.values()])
    judge = _Judge(load(run.path, **loading), judging, known, of_base, watch)  # type: ignore[arg-type]  # load's own names
    if judging.data:
        held_out = judge.section("held-out", judging.sources(judging.data))
    else:
        held_out = judge.section("held-out", *_own_rows(run, config, judge.tuned, judging, watch))
    checks = judging.checks
    if checks is None and _is_bundled(Path(base)):
        checks = [DataSource(path=str(bundled() / "data" / GENERAL))]
    if checks:
        return [held_out, judge.section("general", judging.sources(checks))]
    return [held_out, Measured("general", (), (), note="no general checks were given: what it forgot is not known")]


def _is_bundled(model: Path) -> bool:
    """Is this base the bundled one?"""
    files = [folder / "model.safetensors" for folder in (model, bundled() / "model")]
    with suppress(OSError):
        return sums.summed(files[0]) == sums.summed(files[1])
    return False


def _own_rows(
    run: RunFolder, config: RunConfig, tuned: Tuned, judging: Judging, watch: Watcher
) -> tuple[list[DataSource], rows.Loaded]:
    """The rows that a run held out, as it chose them.

    Raises:
        DataError, RunFolderError: it held out none, or the files are not those of the run.
    """
    if config.objective == "kto" or (not config.eval_data and not config.val_share):
        why = "its rows are labelled, good and bad" if config.objective == "kto" else "it held out no row"
        raise DataError(f"{run.path}: {why}", fix="give held-out rows: --data F")
    for name, digest in run.read("data").get("sha256", {}).items():
        if not Path(name).is_file() or sha256(Path(name)) != digest:
            raise RunFolderError(
                f"{name}: not the file that the run {run.path} was trained with, so the rows that it held out are not "
                "known",
                fix="restore it, or give held-out rows: --data F",
            )
    sources = config.eval_sources() or config.sources()
    skip = config.skip_bad or judging.skip_bad
    loaded = rows.load(sources, seed=config.seed, fill=config.fill, skip_bad=skip, wanted=config.wanted)
    if config.eval_data:
        return sources, loaded
    samples = encode(loaded.rows, tuned.encoder, Cache(), "", watch)
    good = np.setdiff1d(np.arange(len(loaded.rows)), list(samples.bad))
    return sources, replace(loaded, rows=loaded.rows.view(good[held_out_of(config, len(good))]))


@dataclass(frozen=True)
class _Judge:
    """Measures a run and its base, row by row.

    Args:
        tuned: the run's model.
        judging: on which rows, and how.
        known: what bases reached; of_base: what decides what this one does.
        watch: progress is reported to it.
    """

    tuned: Tuned
    judging: Judging
    known: Known
    of_base: str
    watch: Watcher

    def section(self, name: str, sources: Sequence[DataSource], loaded: rows.Loaded | None = None) -> Measured:
        """What both reach on the rows of a section; they are read, where they are not loaded yet."""
        judging = self.judging
        request = Request(name, sources, judging.answer, judging.max_new_tokens, 0, judging.skip_bad)
        ready = prepared(self.tuned, request, self.watch, loaded)
        key = f"{ready.rows.key} {ready.rows.numbers.tolist()}"
        before, after = self._of_base(ready, key), _reached(ready, base=False)
        tokens = _by_row(ready, ready.measuring.held_out.column("trained"))
        pairs = [Pairs("loss", before.losses, after.losses, tokens)]
        tests: dict[Name, Test] = {"exact match": is_right, "known": knows}
        measures: list[Name] = ["exact match", "known"] if name == "general" else ["exact match"]
        if ready.numbers:
            sides = (before.answers, after.answers)
            pairs += [_of_answers(ready, measure, tests[measure], sides) for measure in measures]
        test = knows if name == "general" else is_right
        lost = [
            Answered(new.prompt, new.expected, old.answer, new.answer)
            for old, new in zip(before.answers, after.answers, strict=True)
            if test(old) and not test(new)
        ]
        return Measured(name, pairs, _kinds(ready.rows, judging.kind), lost, key)

    def _of_base(self, ready: Ready, rows_: str) -> _Reached:
        """What the base reaches, which several runs share."""
        key = f"{self.of_base} {self.tuned.template.as_dict()} {rows_}"
        if key not in self.known:
            self.known[key] = _reached(ready, base=True)
        return self.known[key]


def _reached(ready: Ready, *, base: bool) -> _Reached:
    losses = _by_row(ready, ready.measuring.losses(base=base))
    return _Reached(losses, ready.measuring.answers(base=base))


def _by_row(ready: Ready, values: NDArray[np.generic]) -> Floats:
    """(R,): the sums over the samples of each row, of which a long document has several."""
    row_of = ready.measuring.held_out.column("row")
    return np.bincount(row_of, values.astype(np.float64), len(ready.rows)).astype(np.float64)


def _of_answers(ready: Ready, name: Name, test: Test, answers: tuple[Sequence[Judged], Sequence[Judged]]) -> Pairs:
    """Whether answers pass a test; rows that were not asked have weight 0."""
    before, after, asked = np.zeros((3, len(ready.rows)))
    numbers = list(ready.numbers)
    asked[numbers] = 1
    for side, judged in zip((before, after), answers, strict=True):
        side[numbers] = [test(one) for one in judged]
    return Pairs(name, before, after, asked)


def is_right(judged: Judged) -> bool:
    """Is it exactly the expected answer?"""
    return judged.right


def knows(judged: Judged) -> bool:
    """Does the answer contain the expected one, however it is wrapped? A number or a Latin word counts only whole."""
    expected = judged.expected.strip(ENDS).casefold()
    before, after = rf"(?<![^\W{HAN}])", rf"(?![^\W{HAN}])"  # no letter or digit but a Chinese character
    before += r"(?<!-)(?<!\d[.,])" if expected[:1].isdigit() else ""
    after += r"(?![.,]\d)" if expected[-1:].isdigit() else ""
    found = re.search(before + re.escape(expected) + after, judged.answer.casefold())
    return bool(expected) and found is not None


def _kinds(there: Rows, column: str) -> list[str]:
    """Of each row its kind: what stands in that column, else the language of its answer."""
    named = dict[tuple[str, int], str]()
    for file in {there.source(number).file for number in range(len(there))}:
        with suppress(DataError):  # rows that are bad are none of those that are measured
            for item in readers.read(Path(file)):
                if not isinstance(item, DataError) and isinstance(item[0], Mapping) and item[0].get(column) is not None:
                    named[file, item[1].line] = str(item[0][column])
    found = []
    for row in there:
        place = row.source
        name = None if place is None else named.get((place.file, place.line))
        found.append(name or (CHINESE if re.search(f"[{HAN}]", row.answer()) else OTHER))
    return found
