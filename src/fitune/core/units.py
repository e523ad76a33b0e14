"""Units of memory, in bytes. In: nothing. Out: MIB and GIB, which stand here once."""

from __future__ import annotations

MIB, GIB = 2**20, 2**30
