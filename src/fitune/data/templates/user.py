"""A user's own template, from a YAML file with the pieces as keys.

In: a path. Out: a PieceTemplate. All that is wrong with the file is reported together.

    user: "Q: {content}\\n"
    opening: "A: "
    system: "{content}\\n"
    stop: "</s>"
"""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from fitune.core.errors import Collector, ConfigError, did_you_mean, shorten
from fitune.core.files import names_near
from fitune.core.untrusted import MOST_YAML, parse_yaml, read_text, yaml_reason
from fitune.data.templates.pieces import PieceTemplate

# the slots that each piece may have; those in capitals it must have
SLOTS: dict[str, tuple[str, ...]] = {
    "user": ("CONTENT", "context"),
    "assistant": ("CONTENT",),
    "system": ("CONTENT",),
    "user_with_context": ("CONTENT", "CONTEXT"),
    "user_with_system": ("CONTENT", "SYSTEM"),
    "next_user": ("CONTENT", "context"),
    "tools": ("TOOLS",),
    "tool_call": ("NAME", "ARGUMENTS"),
    "tool": ("CONTENT",),
}
FLAGS = ("bos_each_turn", "later_system")
KEYS = [field.name for field in fields(PieceTemplate)]


def load(path: Path) -> PieceTemplate:
    """The template of a YAML file.

    Raises:
        ConfigError, Problems: the file is missing, not YAML, or one of its keys is wrong.
    """
    values = _read(path)
    problems = Collector()
    for key, value in values.items():
        with problems.gather():
            _check(path, key, value)
    with problems.gather():
        if "user" not in values:
            raise ConfigError(
                f"{path}: no 'user'",
                received=", ".join(map(str, values)),
                expected="user",
                fix='user: "Q: {content}\\n"',
            )
    problems.raise_any()
    return PieceTemplate(**{"name": path.stem, **values})


def _read(path: Path) -> dict[Any, Any]:
    if not path.exists():
        raise ConfigError(f"template {path}: no such file", expected="a YAML file", fix=names_near(path))
    try:
        values = parse_yaml(read_text(path, ConfigError, MOST_YAML))
    except yaml.YAMLError as error:
        raise ConfigError(
            f"template {path}: not YAML",
            received=yaml_reason(error),
            expected='lines such as user: "Q: {content}\\n"',
            fix="put each piece in double quotes, with \\n for a line break",
        ) from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"template {path}: not a list of pieces",
            received=shorten(values),
            expected="key: text",
            fix=f"keys: {KEYS}",
        )
    return values


def _check(path: Path, key: object, value: object) -> None:
    """One key and its piece."""
    where = f"template {path}: {key}"
    if key not in KEYS:
        raise ConfigError(
            f"{where}: unknown key", received=key, expected=", ".join(KEYS), fix=did_you_mean(str(key), KEYS)
        )
    kind, said = (bool, "true or false") if key in FLAGS else (str, "text")
    if not isinstance(value, kind):
        raise ConfigError(f"{where}: not {said}", received=shorten(value), expected=said, fix="put text in quotes")
    allowed = [slot.lower() for slot in SLOTS.get(key, ())]
    used = re.findall(r"\{([A-Za-z_]+)\}", str(value)) if allowed else []
    for slot in used:
        if slot not in allowed:
            raise ConfigError(
                f"{where}: unknown slot", received=f"{{{slot}}}", expected=allowed, fix=did_you_mean(slot, allowed)
            )
    missing = [slot.lower() for slot in SLOTS.get(key, ()) if slot.isupper() and slot.lower() not in used]
    if missing:
        raise ConfigError(
            f"{where}: no place for {', '.join(f'{{{slot}}}' for slot in missing)}",
            received=shorten(value),
            expected=f"text with {', '.join(f'{{{slot}}}' for slot in missing)}",
            fix="write the slot where the text belongs",
        )
