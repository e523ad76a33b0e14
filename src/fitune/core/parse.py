"""JSON back into records: one checked step, so that no reader handles a mapping of anything.

In: a value as JSON has it. Out: the record, or an error that names each field that is wrong.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TypeVar

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
        return _adapter(kind).validate_python(value)
    except ValidationError as error:
        wrong = error.errors(include_url=False)
        reason = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in wrong[:4])
        raise RunFolderError(
            f"{where}: not as fitune writes it", received=reason[:300], expected=kind.__name__, fix=FIX
        ) from None


@lru_cache(maxsize=256)  # as many kinds as there are, and kinds that a caller makes do not pile up
def _adapter(kind: type[T]) -> TypeAdapter[T]:
    """pydantic reads the fields of a kind, and compiles what checks them, in some milliseconds."""
    return TypeAdapter(kind)
