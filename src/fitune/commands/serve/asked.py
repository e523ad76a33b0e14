"""What a client asks for, as OpenAI's API has it.

In: the JSON of a body. Out: checked records; Refused names the field that is wrong. What would change the answer and is
not done here is refused, and never ignored in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fitune.commands.serve.errors import Refused
from fitune.core.errors import shorten

STOPS, CHOICES, TOP = 16, 16, 20  # the most of each
# what changes nothing of the answer; the rest of OpenAI's fields is taken at a value that changes nothing
IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
}

Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class StreamOptions(BaseModel):
    """How an answer is streamed."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class Asked(BaseModel):
    """What both kinds of requests have."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=10)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: Seed | None = None
    n: int | None = Field(default=None, ge=1, le=CHOICES)
    stop: str | Annotated[list[str], Field(max_length=STOPS)] | None = None
    return_token_ids: bool | None = None  # as vLLM has it

    @property
    def stops(self) -> list[str]:
        """The texts that end the answer."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def top(self) -> int | None:
        """How many probable tokens come with each one; None: no probabilities."""
        raise NotImplementedError

    @property
    def most(self) -> int | None:
        """The most tokens of the answer that are wanted."""
        return self.max_tokens

    @property
    def with_usage(self) -> bool:
        """Does a stream end in the numbers of tokens?"""
        return self.stream_options is not None and self.stream_options.include_usage


class AskedChat(Asked):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=TOP)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto"] | None = None

    @property
    def top(self) -> int | None:
        """See Asked."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def most(self) -> int | None:
        """See Asked."""
        return self.max_completion_tokens or self.max_tokens


class AskedText(Asked):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(default=None, ge=0, le=TOP)

    @property
    def top(self) -> int | None:
        """See Asked."""
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """One after the other."""
        given = self.prompt
        if isinstance(given, str):
            return [given]
        ids = [one for one in given if isinstance(one, int)]
        return [ids] if ids else [one for one in given if not isinstance(one, int)]


A = TypeVar("A", bound=Asked)


def read(kind: type[A], body: object) -> A:
    """The record of a body.

    Raises:
        Refused: a field is wrong, unknown, or not done here.
    """
    if not isinstance(body, dict):
        raise Refused(400, f"the body is no JSON object; received: {shorten(body)}")
    given = {name: value for name, value in body.items() if name not in IGNORED}
    for name, values in NEUTRAL.items():
        if name in given and (value := given.pop(name)) is not None and value not in values:
            raise Refused(
                400, f"{name} is not done here; received: {shorten(value)}", param=name, code="unsupported_value"
            )
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        problems = [_problem(one) for one in error.errors(include_url=False)]
        raise Refused(400, "; ".join(text for _, text in problems[:5]), param=problems[0][0]) from None


def _problem(error: Any) -> tuple[str, str]:
    """The field, and what is wrong with it."""
    field = str(error["loc"][0]) if error["loc"] else "body"
    path = ".".join(map(str, error["loc"]))
    if error["type"] == "missing":
        return field, f"{path} is missing"
    if error["type"] == "extra_forbidden":
        return field, f"{path} is no field that is known here; received: {shorten(error['input'])}"
    return field, f"{path}: {error['msg']}; received: {shorten(error['input'])}"
