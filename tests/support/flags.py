"""The flags of each verb, put together once.

In: cyclopts' function that makes the flags of a verb from its signature. Out: one that calls it once for each verb and
hands out copies. A process of ours reads one command line, and makes them once; tests read a thousand, and 0.1 s of
each went into flags that are the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from cyclopts import App, ArgumentCollection

Makes = Callable[..., ArgumentCollection]


def once(make: Makes) -> Makes:
    """The same function of an app. What is asked for otherwise than to read a command line is made as ever."""
    made: dict[int, tuple[App, ArgumentCollection]] = {}  # with the app, so that no other gets its id

    def flags(app: App, **how: Any) -> ArgumentCollection:
        if how:
            return make(app, **how)
        if id(app) not in made:
            made[id(app)] = app, make(app)
        return unused(made[id(app)][1])

    return flags


def unused(flags: ArgumentCollection) -> ArgumentCollection:
    """Copies of flags for which nothing was typed."""
    copies = {id(one): copy.copy(one) for one in flags}
    for one in copies.values():
        one.tokens = []
        one.children = ArgumentCollection(copies[id(child)] for child in one.children)
    return ArgumentCollection(copies.values())
