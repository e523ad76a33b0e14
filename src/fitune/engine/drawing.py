"""The next token from logits: the most probable one, or a draw with a seed of its own.

In: a row of logits. Out: a token, with its log probability and the most probable ones where they are asked for. Every
request has its own generator, so what it draws does not depend on the requests beside it.

Shapes: V = vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fitune.core.options import check_drawing


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. temperature 0 is greedy; top_p: from the smallest set of tokens with this much probability
    (nucleus sampling, Holtzman et al. 2020).

    Raises:
        ConfigError: a value is out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    seed: int | None = None

    def __post_init__(self) -> None:
        check_drawing(self.temperature, self.top_p, self.max_new_tokens)


@dataclass(frozen=True)
class Token:
    """A token that was drawn. logprob: natural logarithm of its probability, before temperature and top_p; top: the
    most probable ids with theirs. Both only where they were asked for."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Drawer:
    """Draws the tokens of one answer.

    Args:
        sampling: how.
        top: how many of the most probable tokens come with each; None: no probabilities at all.
    """

    def __init__(self, sampling: Sampling, top: int | None = None) -> None:
        self.sampling, self.top = sampling, top
        self._generator: torch.Generator | None = None  # None: torch's own, which torch.manual_seed sets
        if sampling.seed is not None:
            self._generator = torch.Generator().manual_seed(sampling.seed)

    @property
    def greedy(self) -> bool:
        """The most probable token and nothing else: what `draw` is not needed for."""
        return self.sampling.temperature == 0 and self.top is None

    def draw(self, logits: Tensor) -> Token:
        """The token behind a row of logits, (V,), on any device."""
        row = logits.to("cpu", torch.float32)
        chosen = int(row.argmax()) if self.sampling.temperature == 0 else self._drawn(row)
        if self.top is None:
            return Token(chosen)
        logs = row.log_softmax(dim=-1)
        values, ids = logs.topk(min(self.top, len(logs)))
        return Token(chosen, float(logs[chosen]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))

    def _drawn(self, row: Tensor) -> int:
        chances = (row / self.sampling.temperature).softmax(dim=-1)
        if self.sampling.top_p < 1:
            falling, order = chances.sort(descending=True, stable=True)
            before = falling.cumsum(dim=-1) - falling  # of all more probable ones; the first one always stays
            falling[before >= self.sampling.top_p] = 0
            chances = torch.zeros_like(chances).scatter(0, order, falling)
        return int(torch.multinomial(chances, 1, generator=self._generator))
