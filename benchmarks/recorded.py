"""What every record of a benchmark says of where it was made, and how the small benchmarks end."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def where(command: str, *packages: str) -> dict[str, Any]:
    """The command, the day, the machine and the versions of packages, as a record begins."""
    return {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {
            "cores": os.cpu_count(),
            "processor": platform.machine(),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        },
        "versions": {name: metadata.version(name) for name in packages},
    }


def finish(record: dict[str, Any], shown: Sequence[str], wrong: Sequence[str], out: Path | None) -> int:
    """Print the table and what is not as it should be, write the record; the exit code, 1 where anything is wrong."""
    print("\n".join(shown))
    if out:
        out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print("\n".join(wrong))
    return int(bool(wrong))
