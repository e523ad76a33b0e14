"""How many operations a kernel takes: attention whose keys and values have fewer heads than its queries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from fitune.memory import work

aten = torch.ops.aten
HEADS, KEY_HEADS, LENGTH, WIDTH = 8, 2, 5, 16
BOUNDS = (0, 5, 10)


def of(heads: int, *, documents: bool) -> Tensor:
    """(1, heads, 5, 16); of two documents side by side (10, heads, 16)."""
    return torch.empty((2 * LENGTH, heads, WIDTH) if documents else (1, heads, LENGTH, WIDTH), device="meta")


def arguments(*, backward: bool, documents: bool, heads: int) -> list[Any]:
    """Of a kernel, with `heads` heads of keys and values."""
    query, key = of(HEADS, documents=documents), of(heads, documents=documents)
    bounds = [torch.tensor(BOUNDS, dtype=torch.int32)] * 2 + [LENGTH] * 2 if documents else []
    if not backward:
        return [query, key, key, *bounds]
    return [query, query, key, key, *([query, query] if documents else []), *bounds]


def as_before_2_13(given: Callable[..., int], *, first: int, heads: int) -> Callable[..., int]:
    """A formula that refuses what those of older versions refuse."""

    def asked(*args: Any, **more: Any) -> int:
        assert args[first].shape[heads] == args[first + 1].shape[heads], "shapes are incompatible"
        return given(*args, **more)

    return asked


KERNELS: Sequence[tuple[Any, bool, bool]] = (
    (aten._scaled_dot_product_flash_attention, False, False),
    (aten._scaled_dot_product_flash_attention_backward, True, False),
    (aten._scaled_dot_product_efficient_attention, False, False),
    (aten._scaled_dot_product_cudnn_attention_backward, True, False),
    (aten._flash_attention_forward, False, True),
    (aten._flash_attention_backward, True, True),
)


@pytest.mark.parametrize(("packet", "backward", "documents"), KERNELS, ids=str)
def test_fewer_heads_of_keys_take_as_many_operations(
    packet: Any, backward: bool, documents: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, heads = work.FUSED[packet]
    kept = as_before_2_13(flop_registry[packet], first=first, heads=heads)
    monkeypatch.setitem(flop_registry, packet, kept)
    fewer = arguments(backward=backward, documents=documents, heads=KEY_HEADS)
    with pytest.raises(AssertionError, match="incompatible"):
        kept(*fewer, out_val=None)
    found = work.formula(packet.default)
    assert found is not None
    # scores and what comes out; backwards the scores again, and four gradients
    expected = (5 if backward else 2) * 2 * HEADS * LENGTH * LENGTH * WIDTH * (2 if documents else 1)
    assert found(*fewer, out_val=None) == expected
