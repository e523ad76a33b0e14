"""The variable-length kernel written out, so that a CPU can stand in for a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from fitune.models.kernels import attention, flash
from support import contract as contract

FLASH = "_flash_attention_forward"


@contextmanager
def flash_by_hand(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict]]:
    """The kernel's own contract, written out in float64 on a CPU: so that what is handed to it is checked."""
    calls: list[dict] = []

    def kernel(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bounds_q: Tensor,
        bounds_k: Tensor,
        max_q: int,
        max_k: int,
        p: float,
        causal: bool,
        debug: bool,
        **how: Any,
    ) -> tuple[Tensor]:
        calls.append(how | {"max": (max_q, max_k)})
        assert (p, causal, debug) == (0.0, True, False)
        lengths = [(b - a).max().item() for a, b in ((bounds_q[:-1], bounds_q[1:]), (bounds_k[:-1], bounds_k[1:]))]
        assert lengths == [max_q, max_k]
        outs = []
        for n in range(len(bounds_q) - 1):
            one_q = q[bounds_q[n] : bounds_q[n + 1]].double()
            one_k, one_v = (t[bounds_k[n] : bounds_k[n + 1]].double() for t in (k, v))
            one_k, one_v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (one_k, one_v))
            scores = torch.einsum("qhe,khe->hqk", one_q, one_k) * how["scale"]
            last = torch.arange(len(one_k) - len(one_q), len(one_k))[:, None] - torch.arange(len(one_k))[None]
            seen = last >= 0 if how["window_size_left"] < 0 else (last >= 0) & (last <= how["window_size_left"])
            outs.append(torch.einsum("hqk,khe->qhe", scores.masked_fill(~seen, -torch.inf).softmax(-1), one_v))
        return (torch.cat(outs).to(q.dtype),)

    monkeypatch.setattr(flash, "aten", type("aten", (), {FLASH: staticmethod(kernel)}))
    monkeypatch.setattr(attention, "_refusal", lambda *args: None)
    yield calls
