"""Importing torch, transformers and PEFT, which is half of what a short command takes.

In: import statements. Out: the same modules, in less than two thirds of the time. Two things are left out:

* Python's search for cycles that nobody needs any more. Modules, classes and functions stay, and with every 25 % more
  of them all are gone through again. In a process of ours they are never gone through later either (`gc.freeze`), nor
  at its end: one search through torch and transformers takes 0.4 s.
* The compiler. bitsandbytes, which PEFT imports, wraps four functions in `torch.compile`, and that loads all of
  torch's compiler (550 modules) although it compiles nothing. Without it they are what they are in Python: what plans
  trace and the documentation of fitune describes.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from types import ModuleType

COMPILER = "TORCHDYNAMO_DISABLE"  # torch.compile gives back the function that it was given


@contextmanager
def loading() -> Iterator[None]:
    """Inside, modules are imported; afterwards everything is set as it was."""
    collects, before = gc.isenabled(), os.environ.get(COMPILER)
    gc.disable()
    os.environ[COMPILER] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(COMPILER, None)
        else:
            os.environ[COMPILER] = before
        if collects:
            gc.enable()


@contextmanager
def for_good() -> Iterator[None]:
    """The same in a process that is ours: what is there after the first time stays until its end."""
    with loading():
        yield
        _freeze()


@cache
def _freeze() -> None:
    """Once: later there may be models, which are to go. (To ask Python whether it was done takes 0.1 s.)"""
    gc.freeze()


def module(name: str) -> ModuleType:
    """The module of that name, imported in `loading`."""
    with loading():
        return import_module(name)
