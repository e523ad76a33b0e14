"""Shapes of well-known models in their published sizes, so that planning needs no download.

In: a name, such as llama-3.2-1b. Out: the facts of its config.json that decide sizes, its id on the Hugging Face hub,
and its number of parameters as published (of ChatGLM-6B 6.2 billion, which counts one of its two vocabulary matrices;
here both are counted). A test builds each without storage and counts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from fitune.core.errors import ModelError, did_you_mean


@dataclass(frozen=True)
class Entry:
    """A model of the catalog. config: as in its config.json."""

    name: str
    id: str
    parameters: int
    config: dict[str, Any]


@cache
def entries() -> dict[str, Entry]:
    """Every model by name."""
    text = files("fitune").joinpath("catalog.json").read_text(encoding="utf-8")
    return {name: Entry(name, **values) for name, values in json.loads(text).items()}


def get(name: str) -> Entry | None:
    """The model of that name, in whatever case; None: there is none."""
    return entries().get(name.lower())


def by_id(name: str) -> Entry | None:
    """The model that has this id on the hub; None: there is none."""
    return next((entry for entry in entries().values() if entry.id.lower() == name.lower()), None)


def find(name: str) -> Entry:
    """The model of that name.

    Raises:
        ModelError: there is none.
    """
    found = get(name)
    if found is None:
        raise ModelError(f"{name}: not in the catalog", fix=did_you_mean(name.lower(), entries()))
    return found
