"""Files that others wrote, read within limits: JSON, YAML and plain text.

In: a path. Out: its content, of the type that was asked for. What is no ordinary file (a pipe or a device never ends),
is larger than such a file ever is, nested deeper than anybody writes, or grows when its aliases are expanded, is
refused with its name. Every reader of a small file goes through here; rows are read as a stream (readers.py).
"""

from __future__ import annotations

import copy
import json
import os
import stat
from collections.abc import Hashable
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from fitune.core.errors import FituneError, ModelError, shorten
from fitune.core.units import MIB

MOST_JSON = 256 * MIB  # tokenizer.json of a large vocabulary has 30
MOST_YAML = MIB
DEEPEST = 100  # levels of lists and objects; a JSON schema of a tool has 10
MOST_NODES = 100_000  # of a YAML file, its aliases expanded
KINDS: dict[type, str] = {dict: "a JSON object", list: "a JSON list", str: "a JSON text"}


def check_file(path: Path, error: type[FituneError] = ModelError, most: int | None = None) -> None:
    """Refuse what cannot be read as a file.

    Args:
        path: must be there, a folder or not.
        error: its kind.
        most: bytes that such a file may have.

    Raises:
        FituneError: a folder, a pipe, a device, a file of too many bytes, or one that may not be looked at. What is
            not there raises FileNotFoundError: the caller knows what it means.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as problem:
        raise error(f"{path}: cannot be read", received=reason(problem)) from None
    if kind := odd_kind(found.st_mode):
        raise error(f"{path}: is {kind}", expected="a file")
    if most is not None and found.st_size > most:
        raise error(
            f"{path}: too large for such a file",
            received=f"{found.st_size / MIB:,.0f} MiB",
            expected=f"{most // MIB} MiB at most",
        )


def odd_kind(mode: int) -> str | None:
    """What a path is that is no ordinary file: `a folder`, `a pipe`, `a device`; None: it is a file."""
    kinds = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket", stat.S_ISREG: None}
    return next((kind for test, kind in kinds.items() if test(mode)), "a device")


def reason(problem: Exception) -> str:
    """An error of the system or of a parser in one line."""
    if isinstance(problem, RecursionError):
        return "nested too deeply"
    if isinstance(problem, OSError) and problem.errno:
        return os.strerror(problem.errno)
    return " ".join(str(problem).split())[:200] or type(problem).__name__


def read_text(path: Path, error: type[FituneError] = ModelError, most: int = MOST_JSON) -> str:
    """A file's text in UTF-8, a byte order mark left out.

    Raises:
        FituneError: see `check_file`; and bytes that are no UTF-8.
        FileNotFoundError: there is no such file.
    """
    check_file(path, error, most)
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as problem:
        raise error(f"{path}: cannot be read", received=reason(problem), fix="copy the file again") from None


def read_json(path: Path, error: type[FituneError] = ModelError, kind: type = dict, most: int = MOST_JSON) -> Any:
    """The value of a JSON file.

    Args:
        path: the file.
        error: what is raised.
        kind: the type that it must be of: dict, list or str; object: any.
        most: bytes that it may have.

    Raises:
        FituneError: it cannot be read, is no JSON, or of another type.
        FileNotFoundError: there is no such file.
    """
    text = read_text(path, error, most)
    try:
        value = json.loads(text)
        check_depth(value)
    except (ValueError, RecursionError) as problem:
        received = reason(problem) if text.strip() else "an empty file"
        if "\0" in text[:MIB]:
            received = "NUL characters: the file was never written to its end"
        raise error(f"{path}: not JSON", received=received, expected="a whole JSON file", fix=COPY) from None
    if not isinstance(value, kind):
        raise error(
            f"{path}: not {KINDS.get(kind, kind.__name__)}",
            received=shorten(value),
            expected=KINDS.get(kind, kind.__name__),
            fix=COPY,
        )
    return value


COPY = "copy the file again from where it came"


def check_depth(value: object, most: int = DEEPEST) -> None:
    """Raises RecursionError where lists and objects stand deeper in each other than anybody writes."""
    level = [value]
    for _ in range(most + 1):
        level = [
            inner
            for one in level
            if isinstance(one, (dict, list))
            for inner in (one.values() if isinstance(one, dict) else one)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return
    raise RecursionError


# ---- YAML ----


class Loader(yaml.SafeLoader):
    """A safe loader that counts what it makes: aliases expanded, levels, keys given twice."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """One node; too deep a one is refused before Python's own stack ends."""
        self._depth += 1
        if self._depth > DEEPEST:
            raise yaml.MarkedYAMLError(problem="nested too deeply", problem_mark=self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def get_single_data(self) -> Any:
        """The document's value, when its nodes are few enough."""
        node = self.get_single_node()
        if node is None:
            return None
        _count(node, {}, ())
        return self.construct_document(node)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        """A mapping whose keys are texts, each once."""
        seen: dict[str, Any] = {}
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                got = repr(key.value) if isinstance(key, yaml.ScalarNode) else "a list or mapping"
                raise yaml.MarkedYAMLError(
                    problem=f"the key {shorten(got)} is no text: put it in quotes", problem_mark=key.start_mark
                )
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {shorten(key.value)} is given twice, first in line {seen[key.value].line + 1}",
                    problem_mark=key.start_mark,
                )
            seen[key.value] = key.start_mark
        return super().construct_mapping(node, deep)


def _count(node: Any, known: dict[int, int], above: tuple[int, ...]) -> int:
    """Nodes of a tree with its aliases expanded.

    Raises:
        yaml.MarkedYAMLError: more than MOST_NODES, or one inside itself.
    """
    if id(node) in above:
        raise yaml.MarkedYAMLError(problem="an alias stands inside of what it stands for", problem_mark=node.start_mark)
    if id(node) not in known:
        inner = node.value if isinstance(node, yaml.SequenceNode) else []
        if isinstance(node, yaml.MappingNode):
            inner = [one for pair in node.value for one in pair]
        known[id(node)] = 1 + sum(_count(one, known, (*above, id(node))) for one in inner)
    if known[id(node)] > MOST_NODES:
        problem = f"more than {MOST_NODES:,} values when its aliases are expanded"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    return known[id(node)]


def parse_yaml(text: str) -> Any:
    """The value of a YAML text, the caller's own.

    Raises:
        yaml.YAMLError: whatever is wrong with it.
    """
    return copy.deepcopy(_parsed(text))


@lru_cache(maxsize=16)  # a run's settings are read by its seal, its report and whoever goes on with it: 30 ms each
def _parsed(text: str) -> Any:
    loader = Loader(text)
    try:
        return loader.get_single_data()
    except yaml.YAMLError:
        raise
    except Exception as problem:  # dates, numbers and tags that PyYAML's own functions fail at, each in its own way
        raise yaml.YAMLError(f"a value that cannot be read: {reason(problem)}") from None
    finally:
        loader.dispose()


def read_yaml(path: Path, error: type[FituneError], kind: type | None = dict) -> Any:
    """The value of a YAML file; None for an empty one.

    Raises:
        FituneError: it cannot be read, is no YAML, or of another type.
        FileNotFoundError: there is no such file.
    """
    text = read_text(path, error, MOST_YAML)
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as problem:
        raise error(f"{path}: cannot be read as YAML", received=yaml_reason(problem)) from None
    if kind is not None and value is not None and not isinstance(value, kind):
        raise error(
            f"{path}: wrong content", received=shorten(value), expected="a mapping of settings: lines of `name: value`"
        )
    return value


def yaml_reason(problem: yaml.YAMLError) -> str:
    """What is wrong with a YAML text, in one line with its place."""
    mark = getattr(problem, "problem_mark", None)
    if mark is None or not getattr(problem, "problem", None):
        return reason(problem)
    return f"line {mark.line + 1}, column {mark.column + 1}: {getattr(problem, 'problem', '')}"
