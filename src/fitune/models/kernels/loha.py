"""LoHa (Hyeon-Woo et al. 2022, arXiv:2108.06098) in the order of products that takes the fewest operations.

In: PEFT's layer. Out: the same object with another forward. LoHa adds x (B1 A1 * B2 A2)^T, where * goes element by
element. PEFT's makes that matrix, (out, in), and trains through it: 6 in out operations for a row, as many as full
tuning takes. It is also B A of rank r x r, whose rows and columns are the products of those of each pair: 6 r^2 (in +
out) for a row. Which is less the layer's sizes say alone, so that a row's bits do not depend on the batch. Parameters,
names and files stay PEFT's.

Shapes: x (..., in), A1, A2 (r, in), B1, B2 (out, r).
"""

from __future__ import annotations

from typing import Any

from peft.tuners.loha.layer import Linear
from torch import Tensor, nn
from torch.nn import functional as F


class CheapLoHa(Linear):  # type: ignore[misc]  # PEFT has no types
    """See the module's text."""

    def _get_delta_activations(self, adapter_name: str, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., out): what is added to the base's output."""
        names = (self.hada_w1_a, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b)
        up, down, other_up, other_down = (one[adapter_name] for one in names)
        rank, drops = up.shape[1], self.training and bool(self.rank_dropout[adapter_name])
        if drops or rank * rank * (len(up) + down.shape[1]) >= len(up) * down.shape[1]:
            plain: Tensor = super()._get_delta_activations(adapter_name, input, *args, **kwargs)
            return plain
        x = self._cast_input_dtype(input, down.dtype)
        low = F.linear(x, (down[:, None] * other_down).flatten(0, 1))
        scale: float = self.scaling[adapter_name]
        return F.linear(low, (up[:, :, None] * other_up[:, None]).flatten(1)) * scale


def in_cheap_order(module: nn.Module) -> None:
    """Give a layer of PEFT's this forward, where it is one of LoHa's."""
    if type(module) is Linear:
        module.__class__ = CheapLoHa
