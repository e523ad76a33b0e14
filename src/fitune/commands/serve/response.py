"""Answers as OpenAI's API writes them: whole, or as the chunks of a stream.

In: pieces and tokens. Out: JSON objects.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fitune.commands.serve.live import Live
from fitune.data.encode import Encoder
from fitune.engine.drawing import Token

Json = dict[str, Any]


@dataclass(frozen=True)
class Frame:
    """What every object of one response has."""

    model: str
    chat: bool
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def around(self, choices: Sequence[Json], *, chunk: bool = False, **more: object) -> Json:
        """The object with these choices."""
        kind = f"chat.completion{'.chunk' if chunk else ''}" if self.chat else "text_completion"
        return {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": list(choices),
            **more,
        }


def usage(lives: Sequence[Live]) -> Json:
    """How many tokens went in and came out; a prompt with several answers counts once."""
    prompts = sum(len(ids) for ids in {id(live.prompt): live.prompt for live in lives}.values())
    answers = sum(len(live.tokens) for live in lives)
    return {"prompt_tokens": prompts, "completion_tokens": answers, "total_tokens": prompts + answers}


def chat_logprobs(encoder: Encoder, tokens: Sequence[Token]) -> Json:
    """The probabilities of tokens as /v1/chat/completions has them."""
    return {
        "content": [
            {**_named(encoder, token.id, token.logprob), "top_logprobs": [_named(encoder, *one) for one in token.top]}
            for token in tokens
        ],
        "refusal": None,
    }


def _named(encoder: Encoder, token: int, logprob: float | None) -> Json:
    text = _token(encoder, token)
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def text_logprobs(encoder: Encoder, tokens: Sequence[Token], start: int) -> Json:
    """The same as /v1/completions has them.

    Args:
        start: characters of the answer before these tokens.
    """
    texts = [_token(encoder, token.id) for token in tokens]
    offsets = [start + sum(map(len, texts[:n])) for n in range(len(texts))]
    return {
        "tokens": texts,
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [{_token(encoder, i): value for i, value in token.top} for token in tokens],
        "text_offset": offsets,
    }


def _token(encoder: Encoder, token: int) -> str:
    return str(encoder.tokenizer.decode([token]))
