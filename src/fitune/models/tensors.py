"""Whole tensors looked at in small pieces, so that a check takes next to no memory beside a large model.

In: a tensor of any size. Out: views or small copies of it, and what they say together.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

ITEMS = 2**20  # numbers in a piece: 8 MiB as int64; a multiple of what a fingerprint's factors repeat after


def here(tensor: Tensor) -> Tensor:
    """What this process has of a tensor: of one in shards its part, which shares its memory; else the tensor."""
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def pieces(tensor: Tensor, items: int = ITEMS) -> Iterator[tuple[int, Tensor]]:
    """(place of the first number, numbers) of each stretch of a tensor, flat and in its order.

    Args:
        tensor: of any shape; one that is contiguous is not copied, of another only a piece at a time.
        items: the most numbers in a piece.
    """
    if tensor.is_contiguous():
        flat = tensor.view(-1)
        for start in range(0, flat.numel(), items):
            yield start, flat[start : start + items]
        return
    each = tensor[0].numel()
    if each > items:
        for row in range(len(tensor)):
            for start, piece in pieces(tensor[row], items):
                yield row * each + start, piece
        return
    rows = items // max(1, each)
    for row in range(0, len(tensor), rows):
        yield row * each, tensor[row : row + rows].reshape(-1)


@torch.no_grad()
def finite(tensor: Tensor) -> bool:
    """Is every number of a floating-point tensor finite?"""
    return all(bool(piece.isfinite().all()) for _, piece in pieces(tensor))


BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of a number


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Have two tensors the same shape, dtype and bits?"""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    kind = BITS[one.element_size()]
    return torch.equal(one.contiguous().view(kind), other.contiguous().view(kind))


@torch.no_grad()
def bit_sum(tensor: Tensor) -> int:
    """An exact sum over the bits of a tensor, each number times 1 + its place modulo 1,024, in 64 bits that wrap."""
    total = 0
    for start, piece in pieces(tensor):
        bits = piece.view(BITS[piece.element_size()])
        long = bits.to(torch.int64, copy=True)
        long *= torch.arange(start, start + len(long), device=long.device).remainder_(1024).add_(1)
        total += int(long.sum())
    return (total + 2**63) % 2**64 - 2**63
