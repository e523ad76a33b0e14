"""Silence of dependencies: what they print while fitune works is of no use to whoever called it.

In: nothing. Out: for the command line once and for all, for Python a context that puts everything back.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from importlib import import_module
from types import ModuleType
from typing import ParamSpec, TypeVar

from fitune.core.imports import loading

THEIRS = r"(transformers|torch|peft|bitsandbytes|huggingface_hub|tokenizers|accelerate|safetensors|fitune)(\.|$)"
LOGGERS = ("bitsandbytes", "huggingface_hub", "peft", "torch.distributed.elastic")
# PEFT lays virtual tokens before each row itself when it generates; nothing is packed there
ONE = "Position ids are not supported for parameter efficient tuning"

P = ParamSpec("P")
T = TypeVar("T")


def for_good() -> None:
    """For a process that is ours."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=ONE)


def at_the_end() -> None:
    """For the end of a process that is ours: Triton counts what is left of it, and something is, because nothing goes
    through all of torch once more (`imports.for_good`). What was printed is written before."""
    if "triton" not in sys.modules:
        return
    with suppress(OSError, ValueError, AttributeError):  # Python says so itself: a pipe that nobody reads, a full disk
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


@contextmanager
def without_panics() -> Iterator[None]:
    """Inside, what a library in Rust gives up at is an error like others, and writes nothing to standard error.

    Raises:
        RuntimeError: with the library's own message.
    """
    try:
        kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    except OSError:  # there is no standard error
        kept = nowhere = -1
    try:
        if kept >= 0:
            os.dup2(nowhere, 2)
        yield
    except BaseException as error:
        if type(error).__name__ == "PanicException":  # it is no Exception, and has no name to import
            raise RuntimeError(str(error)) from None
        raise
    finally:
        if kept >= 0:
            os.dup2(kept, 2)
            os.close(kept)
            os.close(nowhere)


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, dependencies neither warn nor draw bars; afterwards all is as it was."""
    with loading():
        hub = import_module("huggingface_hub.utils")
        from transformers.utils import logging as theirs

    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    verbosity, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    hub_bars = not hub.are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=THEIRS)
        warnings.filterwarnings("ignore", message=ONE)
        try:
            theirs.set_verbosity_error()
            theirs.disable_progress_bar()
            if hub_bars:
                hub.disable_progress_bars()
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            theirs.set_verbosity(verbosity)
            if bars:
                theirs.enable_progress_bar()
            if hub_bars:
                hub.enable_progress_bars()
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def module(name: str) -> ModuleType:
    """The module of that name, imported in `quiet`: bitsandbytes complains while it is imported."""
    with quiet(), loading():
        return import_module(name)


def quietly(function: Callable[P, T]) -> Callable[P, T]:
    """The same function, in `quiet`."""

    @wraps(function)
    def inner(*args: P.args, **kwargs: P.kwargs) -> T:
        with quiet():
            return function(*args, **kwargs)

    return inner
