"""States of paged optimizers move between GPU and host; after a resume they do so again, with the same bits."""

from __future__ import annotations

import math
from typing import Any

import bitsandbytes.functional as theirs
import pytest
import torch

from fitune.core.config import build
from fitune.engine import optim


def paged_pair(device: str) -> tuple[dict[str, torch.nn.Parameter], Any, Any]:
    """A large weight, a small one, and two optimizers of theirs."""
    sizes = {"large": (320, 320), "small": (64, 64)}
    named = {name: torch.nn.Parameter(torch.randn(*size, device=device)) for name, size in sizes.items()}
    config = build({"model": "m", "data": ["d"], "optimizer": "paged-adamw-8bit"})
    return named, optim.make(named, config), optim.make(named, config)


def test_states_that_were_paged_come_back_paged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is paged without CUDA: parameters are on meta, and the seam is what bitsandbytes asks its library for."""
    given: list[torch.Tensor] = []

    def get_paged(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        made: Any = torch.empty(*shape, dtype=dtype)
        made.is_paged, made.page_deviceid = True, 0
        given.append(made)
        return made

    monkeypatch.setattr(theirs, "get_paged", get_paged)
    monkeypatch.setattr(theirs, "fill", lambda tensor, value: tensor.fill_(value))
    named, _, optimizer = paged_pair("meta")
    monkeypatch.setattr(optimizer.page_mng, "paged_tensors", [])
    keys = {"state1": torch.uint8, "state2": torch.uint8, "absmax1": torch.float32, "qmap1": torch.float32}
    stored = {}
    for name, p in named.items():
        for key, dtype in keys.items():
            shape = tuple(p.shape) if "state" in key else (256,)
            stored[f"{name}|{key}"] = torch.arange(math.prod(shape)).reshape(shape).to(dtype)
    optim.load_state(optimizer, named, stored, {"large|step": 3, "small|step": 3})
    state = optimizer.state[named["large"]]
    for key in ("state1", "state2"):
        assert state[key].is_paged
        assert torch.equal(state[key], stored[f"large|{key}"])
    assert [tuple(one.shape) for one in given] == [(320, 320), (320, 320)]  # small ones never are
    assert [id(one) for one in optimizer.page_mng.paged_tensors] == [id(one) for one in given]
    assert state["absmax1"].device.type == state["qmap1"].device.type == "meta"
    assert optimizer.state[named["small"]]["state1"].device.type == "meta"
    assert state["step"] == 3


def go_on(device: str) -> None:
    """Two steps, their states through a table of tensors, and a third step of both: the same bits."""
    torch.manual_seed(0)
    named, optimizer, other = paged_pair(device)
    gradients = [{name: torch.randn_like(p) for name, p in named.items()} for _ in range(3)]

    def step(which: torch.optim.Optimizer, number: int) -> None:
        for name, p in named.items():
            p.grad = gradients[number][name].clone()
        which.step()

    for number in range(2):
        optim.set_learning_rate(optimizer, 1e-2)
        step(optimizer, number)
    start = {name: p.detach().clone() for name, p in named.items()}
    tensors, scalars = optim.state_tensors(optimizer, named)
    optim.load_state(other, named, {name: t.clone() for name, t in tensors.items()}, scalars)
    optim.set_learning_rate(other, 1e-2)
    paged = [
        {key for key, value in one.state[named["large"]].items() if getattr(value, "is_paged", False)}
        for one in (optimizer, other)
    ]
    assert paged == [{"state1", "state2"} if device == "cuda" else set()] * 2
    step(optimizer, 2)
    unbroken = {name: p.detach().clone() for name, p in named.items()}
    with torch.no_grad():
        for name, p in named.items():
            p.copy_(start[name])
    step(other, 2)
    assert all(torch.equal(p, unbroken[name]) for name, p in named.items())


def test_a_paged_optimizer_goes_on_to_the_same_bits() -> None:
    go_on("cpu")


@pytest.mark.cuda
def test_on_a_gpu_a_paged_optimizer_goes_on_paged_to_the_same_bits() -> None:
    go_on("cuda")
