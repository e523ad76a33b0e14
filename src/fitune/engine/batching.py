"""Requests that one model answers together, continuously: each begins when there is room and ends when it is done.

In: prompts as ids. Out: their tokens, handed over one by one. Each is answered bit for bit as if it were alone: its
prompt goes through the model alone, its answer in tiles of a fixed size (`forward.py`), and its draws have a generator
of their own. What a model cannot do that way (`trial.tile` says 0) it answers one request after the other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from fitune.core.errors import ModelError
from fitune.engine import trial
from fitune.engine.drawing import Drawer, Sampling, Token
from fitune.engine.forward import PIECE, Forward, answering
from fitune.models.configs import longest_row
from fitune.models.interfaces import causal_lm
from fitune.models.kernels.cached import Cache, rooms
from fitune.models.load import Tuned
from fitune.models.methods import virtual
from fitune.models.switches import SDPA, attention, computing, evaluating


@dataclass(frozen=True)
class Ended:
    """Why an answer ended; text: what went wrong."""

    reason: Literal["stop", "length", "cancelled", "failed"]
    text: str = ""


@dataclass(eq=False)
class Request:
    """A prompt, how its answer is drawn, and who gets it.

    ids: the prompt. top: how many of the most probable tokens come with each one; None: no probabilities. on_token is
    called with each token of the answer, the stop token left out; on_end once, with why it ended; both in the thread
    that answers. cancelled: set from any thread; the request then ends at the next token.
    """

    ids: Sequence[int]
    sampling: Sampling
    on_token: Callable[[Token], None]
    on_end: Callable[[Ended], None] = lambda ended: None
    top: int | None = None
    cancelled: bool = False


@dataclass(eq=False)
class _Running:
    """A request that has its place."""

    request: Request
    cache: Cache
    drawer: Drawer
    most: int  # tokens of its answer
    read: int = 0  # tokens of its prompt that went through the model
    drawn: int = 0
    last: int = 0  # the token that is not in the cache yet

    @property
    def answering(self) -> bool:
        """Its prompt went through the model."""
        return self.read == len(self.request.ids)


@dataclass(frozen=True)
class Room:
    """How much is answered at once. running: requests; tokens: of their prompts and longest answers, which all have
    their place in caches; None: as many as there are."""

    running: int = 64
    tokens: int | None = None


class Batcher:
    """Answers requests to one model; all that it does is done in `step`, by whoever calls that.

    Args:
        tuned: the model.
        room: how much it answers at once.

    Example:
        >>> with Batcher.open(tuned) as batcher:
        ...     batcher.add(Request(ids, Sampling(), on_token=print))
        ...     while batcher.busy:
        ...         batcher.step()
    """

    def __init__(self, tuned: Tuned, room: Room = Room()) -> None:
        self.tuned, self.room = tuned, room
        self.rows = trial.tile(tuned.model)
        self.waiting: deque[Request] = deque()
        self._running: list[_Running] = []
        self._forward = Forward.of(tuned.model) if self.rows else None
        before = virtual.of(tuned.model)
        self.limit = longest_row(causal_lm(tuned.model).config, before.count if before else 0)

    @classmethod
    @contextmanager
    def open(cls, tuned: Tuned, room: Room = Room()) -> Iterator[Batcher]:
        """A batcher whose model is ready to answer until the context ends."""
        batcher = cls(tuned, room)
        with batcher.ready():
            yield batcher

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Inside, the model can answer, in the thread that enters it."""
        with answering(self.tuned.model) if self.rows else torch.no_grad():
            yield

    @property
    def busy(self) -> bool:
        """There is something to do."""
        return bool(self.waiting or self._running)

    @property
    def running(self) -> int:
        """Requests that have their place."""
        return len(self._running)

    def bytes_per_token(self) -> float | None:
        """What a token's keys and values take, tried with one; None: a model whose cache is transformers'."""
        if self._forward is None:
            return None
        with self.ready():
            self._forward.prompt(cache := self._forward.start(), [0])
        return cache.bytes() / rooms(cache.length)

    def most_of(self, request: Request) -> int:
        """The most tokens that the answer to a request may have.

        Raises:
            ModelError: the prompt is longer than the model can hold, or there are no ids.
        """
        length = len(request.ids)
        if not length:
            raise ModelError("the prompt is empty", received="no token", expected="at least one")
        if length >= self.limit:
            raise ModelError(
                "the prompt is longer than the model can hold",
                received=f"{length} tokens",
                expected=f"fewer than {self.limit}",
                fix="shorten it; in a chat, /reset starts a new conversation",
            )
        most = min(request.sampling.max_new_tokens, self.limit - length)
        if self.room.tokens is not None and length + most > self.room.tokens:
            raise ModelError(
                "prompt and answer together are longer than there is room for",
                received=f"{length} tokens and up to {most} of the answer",
                expected=f"{self.room.tokens} at most",
                fix="shorten the prompt, or ask for fewer tokens",
            )
        return most

    def add(self, request: Request) -> None:
        """Take a request; it begins when there is room.

        Raises:
            ModelError: see `most_of`.
        """
        self.most_of(request)
        self.waiting.append(request)

    def step(self) -> None:
        """Go on with everything by one token: requests that are cancelled leave, others take their places."""
        self._leave()
        self._enter()
        if self._forward is None:
            if self._running:
                self._alone(self._running[0])
            return
        self._read(self._forward)
        self._tiles(self._forward, [one for one in self._running if one.answering])

    def fail(self, text: str) -> None:
        """End every request that is there, because something went wrong."""
        dropped = [*(one.request for one in self._running), *self.waiting]
        self._running.clear()
        self.waiting.clear()
        for request in dropped:
            request.on_end(Ended("failed", text))

    def _leave(self) -> None:
        for one in [*self._running]:
            if one.request.cancelled:
                self._end(one, Ended("cancelled"))
        for request in [*self.waiting]:
            if request.cancelled:
                self.waiting.remove(request)
                request.on_end(Ended("cancelled"))

    def _enter(self) -> None:
        most_running = self.room.running if self._forward is not None else 1
        while self.waiting and len(self._running) < most_running:
            request = self.waiting[0]
            most = self.most_of(request)
            taken = sum(len(one.request.ids) + one.most for one in self._running)
            if self.room.tokens is not None and taken + len(request.ids) + most > self.room.tokens:
                return
            self.waiting.popleft()
            cache = Cache() if self._forward is None else self._forward.start()
            self._running.append(_Running(request, cache, Drawer(request.sampling, request.top), most))

    def _read(self, forward: Forward) -> None:
        """Pieces of prompts, PIECE tokens in one step: what is being answered does not wait for a long prompt."""
        left = PIECE
        for one in [*self._running]:
            while not one.answering and left > 0:
                piece = one.request.ids[one.read : one.read + PIECE]
                logits = forward.prompt(one.cache, piece)
                one.read += len(piece)
                left -= len(piece)
                if one.answering:
                    self._drew(one, one.drawer.draw(logits))

    def _tiles(self, forward: Forward, answering: Sequence[_Running]) -> None:
        """The next token of each answer."""
        there = [one for one in answering if one in self._running]
        for start in range(0, len(there), self.rows):
            some = there[start : start + self.rows]
            logits = forward.tile([one.cache for one in some], [one.last for one in some], self.rows)[: len(some)]
            greedy = logits.argmax(dim=-1).tolist()
            for one, row, best in zip(some, logits, greedy, strict=True):
                self._drew(one, Token(best) if one.drawer.greedy else one.drawer.draw(row))

    def _drew(self, one: _Running, token: Token) -> None:
        if token.id in self.tuned.encoder.stop_ids:
            self._end(one, Ended("stop"))
            return
        one.last, one.drawn = token.id, one.drawn + 1
        one.request.on_token(token)
        if one.drawn == one.most:
            self._end(one, Ended("length"))

    def _end(self, one: _Running, ended: Ended) -> None:
        self._running.remove(one)
        one.request.on_end(ended)

    def _alone(self, one: _Running) -> None:
        """One request from its first token to its last, by transformers' `generate`."""
        request, model = one.request, self.tuned.model
        ids = torch.tensor([list(request.ids)], device=self.tuned.device)
        hand = _Hand(one.drawer, self.tuned.encoder.stop_ids, request)
        stop = self.tuned.encoder.stop_ids
        generation = GenerationConfig(do_sample=False, max_new_tokens=one.most, eos_token_id=stop, pad_token_id=stop[0])
        with evaluating(model), attention(model, SDPA), computing(model):
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=generation,
                logits_processor=LogitsProcessorList([hand]),
                stopping_criteria=StoppingCriteriaList([_Cancelled(request)]),
            )
        self._end(one, Ended("cancelled" if request.cancelled else "stop" if hand.stopped else "length"))


class _Hand(LogitsProcessor):
    """Draws in place of transformers and hands the tokens over."""

    def __init__(self, drawer: Drawer, stops: Sequence[int], request: Request) -> None:
        self.drawer, self.stops, self.request, self.stopped = drawer, stops, request, False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(1, V): minus infinity but at the token that was drawn."""
        token = self.drawer.draw(scores[0])
        self.stopped = token.id in self.stops
        if not self.stopped:
            self.request.on_token(token)
        return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([token.id], device=scores.device), 0.0)


class _Cancelled(StoppingCriteria):
    """Ends an answer that nobody waits for any more."""

    def __init__(self, request: Request) -> None:
        self.request = request

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        """(1,): whether it is to end."""
        return torch.tensor([self.request.cancelled], device=input_ids.device)
