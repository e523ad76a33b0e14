"""The largest memory that a piece of work takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from support import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("base") / "llama")


def _peak(make: Any, folder: Path) -> tuple[int, Any]:
    """The most bytes that were allocated at once on the CPU while something ran, and what it gave. A file that is
    mapped into memory counts as allocated for the profiler, though its pages are the system's to drop: left out."""
    mapped = (folder / "model.safetensors").stat().st_size
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        made = make()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]" and abs(event.nbytes()) < mapped - 2**16:
            now += event.nbytes()
            peak = max(peak, now)
    return peak, made
