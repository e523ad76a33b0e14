"""Frozen blocks at the bottom of a model: their hidden states are looked at, or given from elsewhere.

In: a model whose first blocks are all frozen. Out: contexts. In one, what the last of these blocks gives is seen; in
the other these blocks compute nothing, and the last of them gives hidden states that were kept. No module is left
changed.

Shapes: R = rows of the model, W = width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fitune.models import families
from fitune.models.interfaces import causal_lm
from fitune.models.parts import block_count, first_trained


@dataclass(frozen=True)
class Output:
    """What a block gave. states: (1, R, W). others: how many Nones stand behind them in a tuple; None: no tuple."""

    states: Tensor
    others: int | None = None

    def with_states(self, states: Tensor) -> Any:
        """The same form around other states."""
        return states if self.others is None else (states, *[None] * self.others)


class Enough(Exception):
    """What ends a forward pass once the states that it is made for are there."""


def below(model: nn.Module) -> int:
    """How many blocks give every row the same in each epoch: those below the first trained one, but for the last block
    of all, which works on label rows alone."""
    return min(first_trained(model), block_count(model) - 1)


def _first(model: nn.Module, count: int) -> list[nn.Module]:
    inner = causal_lm(model)
    return list(families.of(inner).block_list(inner))[:count]


@contextmanager
def seen(model: nn.Module, count: int, look: Callable[[Output], object]) -> Iterator[None]:
    """Inside, what the last of the first `count` blocks gives is handed to `look`.

    Raises:
        NotImplementedError: the block gives more than hidden states.
    """

    def there(module: nn.Module, inputs: object, output: Any) -> None:
        several = isinstance(output, tuple)
        if several and any(one is not None for one in output[1:]):
            raise NotImplementedError(f"{type(module).__name__} gives more than hidden states")
        look(Output(output[0], len(output) - 1) if several else Output(output))

    handle = _first(model, count)[-1].register_forward_hook(there)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def given(model: nn.Module, count: int, output: Output) -> Iterator[None]:
    """Inside, the first `count` blocks compute nothing, and the last of them gives this."""
    *others, last = _first(model, count)

    def passes(hidden_states: Tensor, *args: object, **kwargs: object) -> Any:
        return output.with_states(hidden_states)

    def gives(hidden_states: Tensor, *args: object, **kwargs: object) -> Any:
        return output.with_states(output.states)

    own = {block: vars(block)["forward"] for block in (*others, last) if "forward" in vars(block)}
    try:
        for block in others:
            block.forward = passes
        last.forward = gives
        yield
    finally:
        for block in (*others, last):
            vars(block).pop("forward", None)
            if block in own:
                block.forward = own[block]
