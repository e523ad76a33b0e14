"""Runs that crash where a test wants it, and digests of what they leave."""

from __future__ import annotations

from pathlib import Path

from fitune.core.events import Watcher
from fitune.core.files import sha256
from fitune.core.records import StepRecord


class Crash(Exception):
    pass


class CrashAt(Watcher):
    def __init__(self, step: int) -> None:
        self.at = step

    def step(self, record: StepRecord) -> None:
        if record.step == self.at:
            raise Crash


def digest(run: Path) -> str:
    return sha256(run / "adapter" / "adapter_model.safetensors")
