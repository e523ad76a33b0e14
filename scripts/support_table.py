"""Which methods work on which models, and on which weights: the table in the READMEs.

    python scripts/support_table.py

In: the catalog, the methods' own rules. Out: a line of Markdown per architecture. Each cell is what the method itself
says of the smallest catalog model of that architecture, built without weights; nothing is written by hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fitune.core import catalog
from fitune.core.config import build
from fitune.core.errors import FituneError
from fitune.core.options import quant_options
from fitune.models import families, methods, quant
from fitune.models.configs import config_of, without_weights
from fitune.models.methods import Quantized

EVERYWHERE, PLAIN, NOT_YET = "✓", "16/32", "not yet"
QUANTIZERS = ("int8", "nf4")


def works(method: methods.Method, base: Any, **settings: Any) -> str | None:
    """On which weights a method works: see EVERYWHERE and PLAIN; None: on none."""
    config = build({"model": "m", "data": ["d"], "method": method.name, **settings})
    family = families.of(base)
    try:
        method.check(config)
        expected = method.expected(base, family, config)
    except FituneError:
        return None
    if expected is not None and not expected:
        return None
    for name in QUANTIZERS:
        options = quant_options(name)
        there = Quantized(quant.planned(base, options), name, "cpu")
        if method.quant_problem(base, family, config.model_copy(update={"quant": options}), there) is not None:
            return PLAIN
    return EVERYWHERE


def cell(method: methods.Method, base: Any) -> str:
    """What a method says of a model."""
    found = works(method, base)
    if found is None and method.name == "bitfit":  # a model without biases can be given some
        found = works(method, base, bitfit={"add": True})
        return f"{found} (`bitfit.add`)" if found else NOT_YET
    return found or NOT_YET


def smallest() -> list[catalog.Entry]:
    """Of each architecture of the catalog the smallest model, by name."""
    found: dict[str, catalog.Entry] = {}
    for entry in sorted(catalog.entries().values(), key=lambda one: -one.parameters):
        kind = entry.config["model_type"]
        found[entry.name if kind == "chatglm" and entry.name == "chatglm-6b" else kind] = entry
    return sorted(found.values(), key=lambda entry: entry.name)


def lines() -> Iterator[str]:
    """The table."""
    yield "| | " + " | ".join(methods.TABLE) + " |"
    yield "|---|" + "---|" * len(methods.TABLE)
    for entry in smallest():
        base = without_weights(config_of(entry.config))
        yield f"| {entry.name} | " + " | ".join(cell(method, base) for method in methods.TABLE.values()) + " |"


if __name__ == "__main__":
    print("\n".join(lines()))
