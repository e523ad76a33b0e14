"""What a folder holds, and what must not be left in one."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fitune.core.scratch import TEMPORARY


def content(folder: Path) -> dict[str, str]:
    """Every file with the sum of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def leftovers(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob(f"{TEMPORARY}*")]
