"""What torch hands to a mode: an operation, and its arguments, which may be anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Operation = Callable[..., Any]
Args = Sequence[Any]
Kwargs = Mapping[str, Any]
