"""Task five of the page: the base model and the tuned one, side by side, as they answer.

In: a run, a conversation. Out: the answer piece by piece, as `fitune chat` gives it. One model is held at a time; it is
dropped for another one.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import Field

from fitune.commands.ui.settings import Form
from fitune.core.errors import FituneError
from fitune.core.records import Message
from fitune.engine.drawing import Sampling
from fitune.engine.generation import reply
from fitune.engine.loading import load
from fitune.engine.turns import Turns
from fitune.models.load import Tuned

MOST_TOKENS = 4096  # of an answer


class Turn(Form):
    """A turn of the conversation."""

    role: Literal["system", "user", "assistant"]
    content: str = Field(max_length=200_000)


class Question(Form):
    """What is to be answered. base: by the model without what was tuned."""

    run: str = Field(max_length=400)
    messages: list[Turn] = Field(min_length=1, max_length=400)
    base: bool = False
    temperature: float = Field(default=0.0, ge=0, le=10, strict=False)
    max_new_tokens: int = Field(default=256, ge=1, le=MOST_TOKENS)
    seed: int | None = Field(default=None, ge=0, lt=2**32)


class _GoneError(Exception):
    """Nobody listens any more."""


@dataclass
class Talk:
    """The model that talks, by the folder of its run. Its answers take turns at it, token by token, so that base and
    tuned model answer side by side; another model waits for their end. running: answers that have begun."""

    turns: Turns
    folder: Path | None = None
    tuned: Tuned | None = None
    loaded: float = field(default=0.0)
    running: int = 0

    def model(self, folder: Path) -> Tuned:
        """The run's model, loaded where it is another one, or was written anew. Whoever calls it holds the turn.

        Raises:
            FituneError: it cannot be loaded.
        """
        written = (folder / "seal.json").stat().st_mtime if (folder / "seal.json").is_file() else 0.0
        if self.tuned is None or self.folder != folder or self.loaded != written:
            self._alone()
            self.tuned = None  # the one before goes first: there may be no room for both
            self.tuned, self.folder, self.loaded = load(folder), folder, written
        return self.tuned

    def drop(self) -> None:
        """Give the memory back."""
        with self.turns:
            self._alone()
            self.tuned = self.folder = None

    def _alone(self) -> None:
        """Let the answers that have begun come to their end."""
        while self.running:
            self.turns.give()

    def answer(self, asked: Question, folder: Path, put: Callable[[str], None]) -> str:
        """The whole answer; each piece of it is given to `put`, which may raise to end it.

        Raises:
            FituneError: no model, or a prompt that it has no room for.
        """
        messages = [Message(turn.role, turn.content) for turn in asked.messages]
        sampling = Sampling(asked.temperature, 1.0, asked.max_new_tokens, asked.seed)
        with self.turns:
            tuned = self.model(folder)
            self.running += 1
            try:
                return reply(tuned, messages, sampling, on_text=put, base=asked.base, turns=self.turns)[0]
            finally:
                self.running -= 1


async def stream(talk: Talk, asked: Question, folder: Path) -> AsyncIterator[str]:
    """A JSON object a line: {"text": a piece}, in the end {"answer": the whole} or {"error": ...}."""
    loop, queue, gone = asyncio.get_running_loop(), asyncio.Queue[dict[str, str]](), threading.Event()

    def put(piece: str) -> None:
        if gone.is_set():
            raise _GoneError
        loop.call_soon_threadsafe(queue.put_nowait, {"text": piece})

    def work() -> None:
        try:
            last = {"answer": talk.answer(asked, folder, put)}
        except _GoneError:
            return
        except FituneError as error:
            last = {"error": str(error)}
        except Exception as error:  # the page shows it; its server goes on
            last = {"error": f"{type(error).__name__}: {error}"}
        if not loop.is_closed():
            loop.call_soon_threadsafe(queue.put_nowait, last)

    threading.Thread(target=work, daemon=True).start()
    try:
        while True:
            came = await queue.get()
            yield json.dumps(came, ensure_ascii=False) + "\n"
            if "text" not in came:
                return
    finally:
        gone.set()
