"""Every error a user can meet, and how several are reported at once.

In: what was received, what was expected, how to fix it. Out: exceptions that the command line prints as they are and
turns into an exit code. Draw on this tree, never on bare `ValueError`, for anything that a user can cause.

    FituneError              exit code 2
      ConfigError            a setting, a flag, a key of the YAML file
        RunawayError         a chat template that does not end
      DataError              a file or a row, with file:line:field
      ModelError             a model folder, a tokenizer, an adapter
      TrainingError          a run that went wrong (non-finite loss, a refused check)
      RunFolderError         a run folder, a checkpoint, the disk
      Problems               several of the above, reported together
      Interrupted            exit code 130: stopped by the user, the run is saved
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class FituneError(Exception):
    """A mistake that a user can fix: says what it got, what it wanted, and what to do."""

    exit_code = 2

    def __init__(self, what: str, *, received: object = None, expected: object = None, fix: str | None = None) -> None:
        self.what, self.received, self.expected, self.fix = what, received, expected, fix
        super().__init__(what)

    def __str__(self) -> str:
        lines = [self.what]
        if self.received is not None:
            lines.append(f"  received: {self.received}")
        if self.expected is not None:
            lines.append(f"  expected: {self.expected}")
        if self.fix is not None:
            lines.append(f"  fix:      {self.fix}")
        return "\n".join(lines)


class ConfigError(FituneError):
    """A setting is unknown, of the wrong type, or does not go with another one."""


class RunawayError(ConfigError):
    """A chat template takes more than any real one does: it is asked nothing more, whichever row it was."""


class DataError(FituneError):
    """A data file or one of its rows cannot be used."""

    def __init__(
        self,
        what: str,
        *,
        file: Path | str | None = None,
        line: int | None = None,
        field: str | None = None,
        received: object = None,
        expected: object = None,
        fix: str | None = None,
    ) -> None:
        self.file, self.line, self.field = file, line, field
        where = ":".join(str(part) for part in (file, line, field) if part is not None)
        super().__init__(f"{where}: {what}" if where else what, received=received, expected=expected, fix=fix)


class ModelError(FituneError):
    """A model folder, a tokenizer or an adapter cannot be used."""


class TrainingError(FituneError):
    """A check refused the run, or the run went wrong."""


class RunFolderError(FituneError):
    """A run folder or a checkpoint cannot be written, or read back."""


class Interrupted(FituneError):
    """The user stopped the run; what was done is saved."""

    exit_code = 130


class Problems(FituneError):
    """Several problems, reported in one message."""

    def __init__(self, problems: list[FituneError]) -> None:
        self.problems = problems
        super().__init__(f"{len(problems)} problems")

    def __str__(self) -> str:
        return f"{len(self.problems)} problems:\n" + "\n".join(f"{n}. {p}" for n, p in enumerate(self.problems, 1))


class Collector:
    """Gathers problems so that they are reported together.

    Example:
        >>> problems = Collector()
        >>> with problems.gather():
        ...     raise ConfigError("lr is negative")
        >>> problems.raise_any()
        Traceback (most recent call last):
        ...
        fitune.core.errors.ConfigError: lr is negative
    """

    def __init__(self) -> None:
        self.problems: list[FituneError] = []

    @contextmanager
    def gather(self) -> Iterator[None]:
        """Keep a FituneError raised inside instead of letting it through."""
        try:
            yield
        except Problems as several:
            self.problems.extend(several.problems)
        except FituneError as one:
            self.problems.append(one)

    def raise_any(self) -> None:
        """Raise what was gathered: one error as it is, several as Problems."""
        if len(self.problems) == 1:
            raise self.problems[0]
        if self.problems:
            raise Problems(self.problems)


FEW = 15  # names that are listed where none is near


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint for a mistyped name: ``did you mean 'lora'?``, the nearest three, or the few names there are."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]!r}?"
    if len(known) <= FEW:
        return f"choose one of: {', '.join(known)}"
    return f"the nearest of {len(known)} names: {', '.join(nearest(name, known))}"


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The names that are most like one, the nearest first."""

    def likeness(other: str) -> float:
        return difflib.SequenceMatcher(None, name.lower(), other.lower()).ratio()

    return sorted(sorted(set(known)), key=likeness, reverse=True)[:count]


def shorten(value: object, limit: int = 80) -> str:
    """The value as it stands in an error message: one line, at most `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}… ({len(text)} characters)"
