"""A watcher that keeps the messages of a run."""

from __future__ import annotations

from fitune.core.events import Watcher


class Messages(Watcher):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)
