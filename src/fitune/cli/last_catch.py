"""The last catch at the door: an error that is none of ours, so nobody has written a message for it.

In: the exception, and what was typed. Out: one message (what was being done, with which file), and a log with the
trace, in the run folder where there is one, else beside the cache. It is a defect of fitune whenever anybody sees it;
errors that a user can cause are FituneErrors.
"""

from __future__ import annotations

import os
import platform
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from importlib import metadata
from pathlib import Path
from types import FrameType

from fitune.data.cache import default_folder

DEBUG = "FITUNE_DEBUG"  # set to 1: the trace is shown, too
PACKAGES = ("fitune", "torch", "transformers", "peft", "tokenizers", "safetensors", "bitsandbytes")
RUN_MARK = "config.yaml"


def report(error: Exception, arguments: Sequence[str]) -> str:
    """The message for an unexpected error; its trace is written to a log.

    Args:
        error: what was raised.
        arguments: the command line, without the program's name.
    """
    lines = [f"fitune failed unexpectedly: {type(error).__name__}: {_short(error)}"]
    lines.append(f"  doing:    {_doing(error, arguments)}")
    if (file := _file(error)) is not None:
        lines.append(f"  file:     {file}")
    trace = "".join(traceback.format_exception(error))
    log = _write(_text(trace, arguments), arguments)
    lines.append(f"  log:      {log or 'could not be written'}")
    lines.append("  fix:      this is a defect of fitune, not of your input: please report it with that log")
    lines.append(f"            ({DEBUG}=1 shows the trace here)")
    if log is None or os.environ.get(DEBUG) not in (None, "", "0"):
        lines.append(trace)
    return "\n".join(lines)


def _short(error: Exception) -> str:
    with suppress(Exception):  # an exception whose text cannot be made
        return " ".join(str(error).split())[:300]
    return "no text"


def _frames(error: BaseException | None) -> Iterator[FrameType]:
    """The frames of fitune's own functions, the innermost first, causes behind."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        yield from (f for f in reversed(frames) if str(f.f_globals.get("__name__", "")).split(".")[0] == "fitune")
        error = error.__cause__ or error.__context__


def _doing(error: Exception, arguments: Sequence[str]) -> str:
    verb = next((argument for argument in arguments if not argument.startswith("-")), "")
    frame = next(_frames(error), None)
    where = "" if frame is None else f" ({frame.f_globals['__name__']}, {frame.f_code.co_name}, line {frame.f_lineno})"
    return f"fitune {verb}".rstrip() + where


def _file(error: Exception) -> Path | str | None:
    """The file that was being read or written: the error's own, else the path that the innermost function held."""
    if isinstance(error, OSError) and isinstance(error.filename, (str, os.PathLike)):
        return os.fspath(error.filename)
    for frame in _frames(error):
        held = [value for value in frame.f_locals.values() if isinstance(value, Path)]
        if held:
            return max(held, key=lambda path: len(path.parts))
    return None


def _text(trace: str, arguments: Sequence[str]) -> str:
    versions = []
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions.append(f"{name} {metadata.version(name)}")
    return (
        f"{datetime.now().isoformat(timespec='seconds')}\n"
        f"command: {['fitune', *arguments]}\n"
        f"Python {platform.python_version()}, {platform.platform()}\n{', '.join(versions)}\n\n{trace}"
    )


def _places(arguments: Sequence[str]) -> Iterator[Path]:
    """Where a log may go: the run folder that was named, the cache, the system's place for temporary files."""
    for argument in arguments:
        with suppress(OSError, ValueError):
            value = argument.partition("=")[2] if argument.startswith("--") and "=" in argument else argument
            folder = Path(value).expanduser()
            if (folder / RUN_MARK).is_file():
                yield folder
    with suppress(Exception):  # no home
        yield default_folder().parent / "logs"
    yield Path(tempfile.gettempdir())


def _write(text: str, arguments: Sequence[str]) -> Path | None:
    """The log; None: no place takes it."""
    name = f"error-{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}.log"
    for folder in _places(arguments):
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")
            return folder / name
    return None
