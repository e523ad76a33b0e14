"""One answer while it is made: from the thread of the model to the client's connection.

In: a prompt, how to draw. Out: pieces of text with their tokens, until the answer has ended. A client that goes away
cancels its requests, and their places are free at the next token.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from fitune.commands.serve.asked import Asked
from fitune.commands.serve.errors import Refused
from fitune.core.errors import ModelError
from fitune.engine.batching import Batcher, Ended, Request
from fitune.engine.drawing import Sampling, Token
from fitune.engine.speech import Speech
from fitune.engine.worker import Full, Worker


@dataclass(frozen=True)
class Piece:
    """What came at once. finish: why the answer ended, with its last piece."""

    text: str
    tokens: Sequence[Token] = ()
    finish: str | None = None


@dataclass
class Live:
    """One answer.

    Attributes:
        tokens: all of them so far.
    """

    prompt: Sequence[int]
    speech: Speech
    request: Request
    queue: asyncio.Queue[Token | Ended]
    tokens: list[Token] = field(default_factory=list)

    @classmethod
    def of(cls, batcher: Batcher, ids: Sequence[int], asked: Asked, most: int, number: int) -> Live:
        """An answer that is not asked for yet.

        Args:
            batcher: of the model.
            ids: the prompt.
            asked: how it is drawn.
            most: the most tokens that the server gives.
            number: of this answer among those to one request; each has a seed of its own.
        """
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Token | Ended]()

        def put(one: Token | Ended) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(queue.put_nowait, one)

        sampling = Sampling(
            temperature=1.0 if asked.temperature is None else asked.temperature,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            max_new_tokens=most if asked.most is None else asked.most,
            seed=None if asked.seed is None else asked.seed + number,
        )
        request = Request(ids, sampling, put, put, asked.top)
        return cls(ids, Speech(batcher.tuned.encoder, asked.stops), request, queue)

    async def pieces(self) -> AsyncIterator[Piece]:
        """The answer, piece by piece; the last one says why it ended.

        Raises:
            Refused: answering failed.
        """
        held: list[Token] = []
        while True:
            came = await self.queue.get()
            if isinstance(came, Ended):
                if came.reason == "failed":
                    raise Refused(503 if "memory" in came.text else 500, came.text)
                yield Piece(self.speech.end(), held, came.reason)
                return
            self.tokens.append(came)
            held.append(came)
            text = self.speech.add(came.id)
            if self.speech.stopped:
                self.request.cancelled = True
                yield Piece(text, held, "stop")
                return
            if text:
                yield Piece(text, held)
                held = []


def submit(worker: Worker, batcher: Batcher, lives: Sequence[Live]) -> None:
    """Ask for answers.

    Raises:
        Refused: a prompt is too long, or too many requests wait.
    """
    try:
        worker.submit(batcher, [live.request for live in lives])
    except ModelError as error:
        raise Refused(400, str(error), param="messages", code="context_length_exceeded") from None
    except Full:
        raise Refused(429, f"too many requests; at most {worker.waiting} wait", code="queue_full") from None
