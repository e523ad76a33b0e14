"""The server's paths: /v1/models, /v1/chat/completions, /v1/completions, /health.

In: HTTP requests that the guard let through. Out: JSON, or a stream of server-sent events. Everything here runs in one
event loop; the models run in the worker's thread.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from fitune.commands.serve import prompts
from fitune.commands.serve.asked import Asked, AskedChat, AskedText, read
from fitune.commands.serve.choices import ChatChoice, Choice, TextChoice
from fitune.commands.serve.errors import Refused
from fitune.commands.serve.guard import Guard, Rules
from fitune.commands.serve.live import Live, submit
from fitune.commands.serve.response import Frame, Json, usage
from fitune.core.errors import did_you_mean
from fitune.engine.batching import Batcher
from fitune.engine.worker import Worker


@dataclass(frozen=True)
class Server:
    """What the paths answer with. models: by the names that clients give. most: tokens of an answer."""

    worker: Worker
    models: Mapping[str, Batcher]
    most: int
    started: int

    def model(self, name: str) -> Batcher:
        """The model of that name.

        Raises:
            Refused: there is none.
        """
        if name not in self.models:
            hint = did_you_mean(name, self.models)
            raise Refused(404, f"no model {name!r} here; {hint}", param="model", code="model_not_found")
        return self.models[name]

    def described(self, name: str) -> Json:
        """A model as /v1/models lists it."""
        more = {"max_model_len": self.models[name].limit}
        return {"id": name, "object": "model", "created": self.started, "owned_by": "fitune", **more}

    async def health(self, request: Request) -> Response:
        """GET /health."""
        return JSONResponse({"status": "ok", "requests": self.worker.open})

    async def listed(self, request: Request) -> Response:
        """GET /v1/models."""
        return JSONResponse({"object": "list", "data": [self.described(name) for name in self.models]})

    async def one(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        name = request.path_params["name"]
        self.model(name)
        return JSONResponse(self.described(name))

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        asked = read(AskedChat, await _json(request))
        batcher = self.model(asked.model)
        question, ids = prompts.of_chat(batcher.tuned, asked)
        lives = self._asked(batcher, asked, [ids])
        choices = [ChatChoice(number, live, batcher.tuned, asked, question) for number, live in enumerate(lives)]
        return await _answered(request, asked, Frame(asked.model, chat=True), choices)

    async def text(self, request: Request) -> Response:
        """POST /v1/completions."""
        asked = read(AskedText, await _json(request))
        batcher = self.model(asked.model)
        lives = self._asked(batcher, asked, [prompts.of_text(batcher.tuned, one) for one in asked.prompts])
        choices = [TextChoice(number, live, batcher.tuned, asked) for number, live in enumerate(lives)]
        return await _answered(request, asked, Frame(asked.model, chat=False), choices)

    def _asked(self, batcher: Batcher, asked: Asked, each: Sequence[Sequence[int]]) -> list[Live]:
        """The answers that one request asks for, on their way.

        Raises:
            Refused: too many tokens are wanted, a prompt is too long, or too many requests wait.
        """
        if asked.most is not None and asked.most > self.most:
            raise Refused(400, f"max_tokens {asked.most}; expected: at most {self.most}", param="max_tokens")
        lives = [Live.of(batcher, ids, asked, self.most, number) for ids in each for number in range(asked.n or 1)]
        submit(self.worker, batcher, lives)
        return lives


async def _json(request: Request) -> object:
    try:
        found: object = json.loads(await request.body())
    except (ValueError, RecursionError):
        raise Refused(400, "the body is not JSON") from None
    return found


async def _answered(request: Request, asked: Asked, frame: Frame, choices: Sequence[Choice]) -> Response:
    if asked.stream:
        stream = _stream(asked, frame, choices)
        return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
    try:
        await _unless_gone(request, choices)
        return JSONResponse(frame.around([one.whole() for one in choices], usage=usage([one.live for one in choices])))
    finally:
        _cancel(choices)


async def _unless_gone(request: Request, choices: Sequence[Choice]) -> None:
    """Take all answers in; a client that goes away ends it.

    Raises:
        Refused: it went away, and nobody will see this.
    """

    async def taken() -> None:
        await asyncio.gather(*(one.take() for one in choices))

    answers, gone = asyncio.create_task(taken()), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({answers, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answers.done():
            raise Refused(499, "the client went away")
        await answers
    finally:
        for task in (answers, gone):
            task.cancel()
            with suppress(asyncio.CancelledError, Refused):
                await task


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _stream(asked: Asked, frame: Frame, choices: Sequence[Choice]) -> AsyncIterator[str]:
    """Server-sent events, the chunks of all choices in the order in which they come."""
    more: Json = {"usage": None} if asked.with_usage else {}
    try:
        async for chunk in _together(choices):
            yield _event(frame.around([chunk], chunk=True, **more))
        if asked.with_usage:
            yield _event(frame.around([], chunk=True, usage=usage([one.live for one in choices])))
        yield "data: [DONE]\n\n"
    except Refused as refused:
        yield _event(refused.body())
    finally:
        _cancel(choices)


async def _together(choices: Sequence[Choice]) -> AsyncIterator[Json]:
    """What all choices say, as it comes."""
    queue: asyncio.Queue[Json | Refused | None] = asyncio.Queue()

    async def pump(one: Choice) -> None:
        try:
            async for chunk in one.chunks():
                await queue.put(chunk)
            await queue.put(None)
        except Refused as refused:
            await queue.put(refused)

    tasks = [asyncio.create_task(pump(one)) for one in choices]
    left = len(tasks)
    try:
        while left:
            came = await queue.get()
            if isinstance(came, Refused):
                raise came
            if came is None:
                left -= 1
            else:
                yield came
    finally:
        for task in tasks:
            task.cancel()


def _event(value: Json) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _cancel(choices: Sequence[Choice]) -> None:
    for one in choices:
        one.live.request.cancelled = True


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return error.response()


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    texts = {404: f"nothing at {where}", 405: f"{where} is not done here"}
    return Refused(error.status_code, texts.get(error.status_code, error.detail)).response(error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    return Refused(500, f"the server failed: {type(error).__name__}").response()


def app_of(worker: Worker, models: Mapping[str, Batcher], *, rules: Rules, most: int) -> Guard:
    """The ASGI app.

    Args:
        worker: answers; it runs already.
        models: by the names that clients give.
        rules: who may ask.
        most: the most tokens of an answer.
    """
    server = Server(worker, models, most, int(time.time()))
    routes = [
        Route("/health", server.health),
        Route("/v1/models", server.listed),
        Route("/v1/models/{name:path}", server.one),
        Route("/v1/chat/completions", server.chat, methods=["POST"]),
        Route("/v1/completions", server.text, methods=["POST"]),
    ]
    handlers = {Refused: _refused, HTTPException: _http_error, Exception: _failed}
    return Guard(Starlette(routes=routes, exception_handlers=handlers), rules)
