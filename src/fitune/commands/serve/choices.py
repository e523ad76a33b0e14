"""One choice of a response: what an answer is to a client of a chat, and to one that goes on from a text.

In: a live answer. Out: the choice as a whole, or its chunks. A chat's thought is apart from its answer
(`reasoning_content`), and calls of tools are read from it.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fitune.commands.serve.asked import Asked, AskedChat, AskedText
from fitune.commands.serve.live import Live, Piece
from fitune.commands.serve.response import Json, chat_logprobs, text_logprobs
from fitune.core.records import Conversation, Message, ToolCall
from fitune.data.templates.called import calls_in
from fitune.engine.drawing import Token
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
class Taken:
    """What every choice has.

    Args:
        number: of the choice in its response, from 0.
        live: the answer while it comes.
        tuned: what answers.
        pieces: of the answer, once it was taken.
    """

    number: int
    live: Live
    tuned: Tuned
    pieces: list[Piece] = field(default_factory=list, init=False)

    async def take(self) -> None:
        """See Choice."""
        self.pieces = [piece async for piece in self.live.pieces()]

    def all_tokens(self) -> list[Token]:
        """Of all pieces."""
        return [token for piece in self.pieces for token in piece.tokens]


@dataclass
class TextChoice(Taken):
    """Of /v1/completions."""

    asked: AskedText

    def whole(self) -> Json:
        """See Choice."""
        return self._choice(
            "".join(piece.text for piece in self.pieces), Piece("", self.all_tokens(), self.pieces[-1].finish), 0
        )

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
class ChatChoice(Taken):
    """Of /v1/chat/completions."""

    asked: AskedChat
    question: Conversation

    def whole(self) -> Json:
        """See Choice."""
        message = self._message()
        finish = "tool_calls" if message.tool_calls else self.pieces[-1].finish
        reply: Json = {"role": "assistant", "content": message.content or (None if message.tool_calls else "")}
        if message.thought:
            reply["reasoning_content"] = message.thought
        if message.tool_calls:
            reply["tool_calls"] = [_call(call) for call in message.tool_calls]
        return self._choice("message", reply, Piece("", self.all_tokens(), finish))

    async def chunks(self) -> AsyncIterator[Json]:
        """See Choice. Where calls may come, or the answer stands in a frame that only its end closes, it comes in one
        piece."""
        yield self._choice("delta", {"role": "assistant", "content": ""}, Piece(""))
        if self.question.tools or getattr(self.tuned.template, "framed", False):
            await self.take()
            choice = self.whole()
            reply = choice.pop("message")
            calls = [{"index": n, **call} for n, call in enumerate(reply.pop("tool_calls", []))]
            yield {**choice, "delta": {**reply, **({"tool_calls": calls} if calls else {})}}
            return
        thinking = Thinking(self.tuned, self.live.prompt)
        async for piece in self.live.pieces():
            thought, content = thinking.add(piece.text)
            if piece.finish is not None:
                rest = thinking.end()
                thought, content = thought + rest[0], content + rest[1]
            delta: Json = {"reasoning_content": thought} if thought else {}
            if content:
                delta["content"] = content
            yield self._choice("delta", delta, piece)

    def _message(self) -> Message:
        """The whole answer, its thought apart, and its calls."""
        text = "".join(piece.text for piece in self.pieces)
        calls: tuple[ToolCall, ...] = ()
        raw = str(self.tuned.tokenizer.decode([token.id for token in self.live.tokens]))
        if self.question.tools:
            before, calls = calls_in(raw, self.question.tools)
            text = self.tuned.encoder.without_special(before) if calls else text
        if getattr(self.tuned.template, "framed", False) and not calls and not self.live.speech.stopped:
            return self.tuned.template.read_answer(raw)
        thinking = Thinking(self.tuned, self.live.prompt)
        thought, content = map("".join, zip(thinking.add(text), thinking.end(), strict=True))
        return Message("assistant", content.strip() if calls else content, thought=thought, tool_calls=calls)

    def _choice(self, name: str, message: Json, piece: Piece) -> Json:
        logprobs = chat_logprobs(self.tuned.encoder, piece.tokens) if self.asked.logprobs else None
        more = _ids(self.asked, self.live, piece)
        return {"index": self.number, name: message, "logprobs": logprobs, "finish_reason": piece.finish, **more}


def _call(call: ToolCall) -> Json:
    """A call of a tool as OpenAI's API has it."""
    what = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": what}


def _ids(asked: Asked, live: Live, piece: Piece) -> Json:
    """The ids of prompt and answer, where they are asked for; the prompt's with the last piece."""
    if not asked.return_token_ids:
        return {}
    ids: Sequence[int] = [token.id for token in piece.tokens]
    return {"token_ids": ids, **({"prompt_token_ids": list(live.prompt)} if piece.finish else {})}
