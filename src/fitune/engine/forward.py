"""Forward passes of conversations that go on: a piece of one prompt, or the next token of several answers at once.

In: token ids and caches. Out: logits. A product's last bits depend on its number of rows, so answers go through the
model in tiles of a fixed number of rows, the rest of them filler: then a row's bits are the same in whatever place of
the tile it stands and whoever stands beside it (`trial.tile` measures that on the model itself). A prompt goes through
alone, in pieces whose borders depend on nothing but the prompt.

Shapes: T = tokens of a piece, R = rows of a tile, W = width, V = vocabulary, k = virtual tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from fitune.models.attached import compute_dtype
from fitune.models.head import output_head
from fitune.models.interfaces import causal_lm, decoder
from fitune.models.kernels.cached import CACHED, Cache, Turn
from fitune.models.methods import virtual
from fitune.models.switches import attention, computing, evaluating

PIECE = 512  # tokens of a prompt that go through the model at once


@contextmanager
def answering(model: nn.Module) -> Iterator[None]:
    """Inside, the model answers: its attention reads caches, nothing of it is trained. In the thread that enters it."""
    with torch.no_grad(), evaluating(model), attention(model, CACHED):
        yield


@dataclass(frozen=True)
class Forward:
    """The passes of one model. before: what stands before each prompt."""

    model: nn.Module
    before: virtual.Virtual | None

    @classmethod
    def of(cls, model: nn.Module) -> Forward:
        """With what the model's method puts before each prompt, made once."""
        with torch.no_grad(), computing(model):
            return cls(model, virtual.of(model))

    def start(self) -> Cache:
        """The cache of a new conversation; a prefix stands in it already."""
        cache = Cache()
        if self.before is not None and self.before.prefix is not None:
            for layer, (key, value) in enumerate(self.before.prefix):
                cache.put(layer, *(one.to(compute_dtype(self.model)) for one in (key, value)))
            cache.length = self.before.count
        return cache

    def prompt(self, cache: Cache, ids: Sequence[int]) -> Tensor:
        """(V,): the logits behind a piece of a prompt, T tokens that follow those in the cache."""
        inner = causal_lm(self.model)
        tokens = torch.tensor(ids, device=self._device)
        inputs = {"input_ids": tokens[None]}
        rows = len(ids)
        if cache.length == 0 and self.before is not None and self.before.embeddings is not None:
            embedded = inner.get_input_embeddings()(tokens)
            inputs = {"inputs_embeds": torch.cat([self.before.embeddings.to(embedded.dtype), embedded])[None]}
            rows += self.before.count
        positions = torch.arange(cache.length, cache.length + rows, device=self._device)
        return self._logits(inputs, positions, [Turn(cache, rows)], last=True)[0]

    def tile(self, caches: Sequence[Cache], last: Sequence[int], rows: int) -> Tensor:
        """(R, V): the logits behind the last token of each answer; those behind the answers are the filler's.

        Args:
            caches: of the answers, `rows` at most.
            last: the token of each that is not in its cache yet.
            rows: R.
        """
        more = rows - len(caches)
        ids = torch.tensor([*last, *[last[0]] * more], device=self._device)
        positions = torch.tensor([cache.length for cache in caches] + [caches[0].length] * more, device=self._device)
        return self._logits({"input_ids": ids[None]}, positions, [Turn(cache, 1) for cache in caches])

    def _logits(
        self, inputs: dict[str, Tensor], positions: Tensor, turns: Sequence[Turn], *, last: bool = False
    ) -> Tensor:
        inner = causal_lm(self.model)
        with computing(self.model):
            hidden = decoder(inner)(
                **inputs, position_ids=positions[None], turns=turns, use_cache=False
            ).last_hidden_state[0]
            for turn in turns:
                turn.cache.length += turn.rows
            return cast(Tensor, output_head(self.model)(hidden[-1:] if last else hidden))

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device
