"""Settings as one types them in a shell.

In: settings as a mapping, groups among them. Out: flags, quoted for a shell.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from typing import Any


def flags(settings: Mapping[str, Any]) -> str:
    """Settings as one types them in a shell."""
    arguments: list[str] = []
    for name, value in _leaves(settings):
        flag = f"--{name.replace('_', '-')}"
        if name == "quant.name":
            arguments += ["--quant", value]
        elif value is True:
            arguments.append(flag)
        elif isinstance(value, (str, int, float)) and value is not False:
            arguments += [flag, str(value)]
        else:  # lists and mappings have forms of their own as flags; here all go the same way
            arguments += ["--set", f"{name}={json.dumps(value, ensure_ascii=False)}"]
    return " ".join(shlex.quote(str(one)) for one in arguments)


GROUPS = ("map", "fill", "peft", "ranks")  # mappings whose keys are no settings


def _leaves(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if above == "" and name == "quant" and isinstance(value, str):
            yield "quant.name", value
        elif isinstance(value, Mapping) and name not in GROUPS:
            yield from _leaves(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value
