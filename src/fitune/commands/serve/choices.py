"""One choice of a response: what an answer is to a client of a chat, and to one that goes on from a text.

In: a live answer. Out: the choice as a whole, or its chunks. A chat's thought is apart from its answer
(`reasoning_content`), and calls of tools are read from it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fitune.commands.serve.asked import Asked, AskedChat, AskedText
from fitune.commands.serve.live import Live, Piece
from fitune.commands.serve.said import Json, chat_logprobs, text_logprobs
from fitune.core.records import Conversation
from fitune.engine.thinking import Thinking
from fitune.models.load import Tuned


class Choice(Protocol):
    """What the app needs of a choice."""

    live: Live

    async def take(self) -> None:
        """Wait until the answer is whole."""

    def whole(self) -> Json:
        """The whole choice, once it was taken."""
        ...

    def chunks(self) -> AsyncIterator[Json]:
        """The choice as the chunks of a stream."""
        ...


@dataclass
class TextChoice:
    """Of /v1/completions."""

    number: int
    live: Live
    tuned: Tuned
    asked: AskedText
    pieces: list[Piece] = field(default_factory=list)

    async def take(self) -> None:
        """See Choice."""
        self.pieces = [piece async for piece in self.live.pieces()]

    def whole(self) -> Json:
        """See Choice."""
        tokens = [token for piece in self.pieces for token in piece.tokens]
        return self._choice("".join(piece.text for piece in self.pieces), Piece("", tokens, self.pieces[-1].finish), 0)

    async def chunks(self) -> AsyncIterator[Json]:
        """See Choice."""
        start = 0
        async for piece in self.live.pieces():
            yield self._choice(piece.text, piece, start)
            start += len(piece.text)

    def _choice(self, text: str, piece: Piece, start: int) -> Json:
        logprobs = None if self.asked.logprobs is None else text_logprobs(self.tuned.encoder, piece.tokens, start)
        more = _ids(self.asked, self.live, piece)
        return {"index": self.number, "text": text, "logprobs": logprobs, "finish_reason": piece.finish, **more}


@dataclass
class ChatChoice:
    """Of /v1/chat/completions."""

    number: int
    live: Live
    tuned: Tuned
    asked: AskedChat
    question: Conversation
    pieces: list[Piece] = field(default_factory=list)

    async def take(self) -> None:
        """See Choice."""
        self.pieces = [piece async for piece in self.live.pieces()]

    def whole(self) -> Json:
        """See Choice."""
        tokens = [token for piece in self.pieces for token in piece.tokens]
        thinking = Thinking(self.tuned, self.live.prompt)
        thought, content = thinking.add("".join(piece.text for piece in self.pieces))
        rest = thinking.end()
        message: Json = {"role": "assistant", "content": content + rest[1]}
        if thought + rest[0]:
            message["reasoning_content"] = thought + rest[0]
        return self._choice("message", message, Piece("", tokens, self.pieces[-1].finish))

    async def chunks(self) -> AsyncIterator[Json]:
        """See Choice."""
        thinking = Thinking(self.tuned, self.live.prompt)
        yield self._choice("delta", {"role": "assistant", "content": ""}, Piece(""))
        async for piece in self.live.pieces():
            thought, content = thinking.add(piece.text)
            if piece.finish is not None:
                rest = thinking.end()
                thought, content = thought + rest[0], content + rest[1]
            delta: Json = {"reasoning_content": thought} if thought else {}
            if content:
                delta["content"] = content
            yield self._choice("delta", delta, piece)

    def _choice(self, name: str, message: Json, piece: Piece) -> Json:
        logprobs = chat_logprobs(self.tuned.encoder, piece.tokens) if self.asked.logprobs else None
        more = _ids(self.asked, self.live, piece)
        return {"index": self.number, name: message, "logprobs": logprobs, "finish_reason": piece.finish, **more}


def _ids(asked: Asked, live: Live, piece: Piece) -> Json:
    """The ids of prompt and answer, where they are asked for; the prompt's with the last piece."""
    if not asked.return_token_ids:
        return {}
    ids: Sequence[int] = [token.id for token in piece.tokens]
    return {"token_ids": ids, **({"prompt_token_ids": list(live.prompt)} if piece.finish else {})}
