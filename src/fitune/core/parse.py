"""JSON back into records: one checked step, so that no reader handles a mapping of anything.

In: a value as JSON has it. Out: the record, or an error that names each field that is wrong.
"""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from fitune.core.errors import RunFolderError

T = TypeVar("T")
FIX = "copy the run folder again; a run that was edited by hand is no longer the run"


def parse(kind: type[T], value: object, where: str) -> T:
    """The value as a record; keys that it has no field for are left out.

    Args:
        kind: a dataclass, or a list or mapping of some.
        value: what was read from a file.
        where: the file, for the error.

    Raises:
        RunFolderError: a field is missing, or of another type.
    """
    try:
        checked: T = _adapter(kind).validate_python(value)
        return checked
    except ValidationError as error:
        wrong = error.errors(include_url=False)
        reason = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in wrong[:4])
        raise RunFolderError(
            f"{where}: not as fitune writes it", received=reason[:300], expected=kind.__name__, fix=FIX
        ) from None


ADAPTERS: dict[object, TypeAdapter[Any]] = {}


def _adapter(kind: type[T]) -> TypeAdapter[Any]:
    """Made once: pydantic reads the fields of a kind, and compiles what checks them, in some milliseconds."""
    if kind not in ADAPTERS:
        ADAPTERS[kind] = TypeAdapter(kind)
    return ADAPTERS[kind]
