"""The section of `scripts/gpu_checks.py` on runs of several processes: what their exchanges cost one GPU.

A group of one process goes through all that one of several does in a step: the sums of losses, and of all gradients in
one buffer over NCCL; and the model in shards (FSDP2). Steps with and without it take turns, on copies of one model.
"""

from __future__ import annotations

import copy
import os
import statistics
import sys
import time
from typing import Any

from gpu_checks import Here, section
from gpu_figures import TINY

MOST = 0.01  # share of a step that the exchanges may take
TURNS, WARM = 24, 4
MINUTES = 1.0  # that a collective may take: one that hangs ends the section with its name
BIG = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 8, "vocab_size": 32_000,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
}  # fmt: skip


@section
def parallel(here: Here) -> None:
    """LoRA on all linear layers: the share of a step that exchanges with nobody take, and that they change no bit; one
    step in shards gives the same gradients."""
    import torch

    from fitune.core.parallel import LOOPBACK
    from fitune.engine.parallel import World
    from fitune.models import determinism
    from fitune.models.devices import pick_device

    device = pick_device(here.device)
    if sys.platform in LOOPBACK:  # gloo would look the machine's name up, which waits where there is no network
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK[sys.platform])
    world = World(store=_store(here), measured=True)
    world.connect(device, MINUTES)
    try:
        with determinism.exact(device):  # as in a run: else two steps of one process already differ
            determinism.strict(True)
            _checks(here, world, device)
    finally:
        torch.distributed.destroy_process_group()


def _checks(here: Here, world: Any, device: Any) -> None:
    import torch

    from fitune.engine.parallel import ALONE
    from fitune.engine.shards import Shards

    here.say("gloo in a group of one", world.added(torch.ones(1)).item() == 1.0)
    there = world.added(torch.ones(1, device=device))
    here.say("a group of one", there.item() == 1.0, backend=torch.distributed.get_backend())
    plain = Stepping(here, device)
    shared = copy.deepcopy(plain)
    seconds: dict[str, list[float]] = {"alone": [], "exchanging": []}
    for turn in range(TURNS if not here.dry else 4):
        for name, steps, who in (("alone", plain, ALONE), ("exchanging", shared, world)):
            took = steps.step(who)
            if turn >= WARM or here.dry:
                seconds[name].append(took)
    ours, theirs = (torch.cat([p.detach().flatten() for p in one.parameters.values()]) for one in (plain, shared))
    here.say("the exchanges change no bit", bool(torch.equal(ours, theirs)), **dict(world.counted))
    alone, exchanging = (statistics.median(seconds[name]) for name in ("alone", "exchanging"))
    share = exchanging / alone - 1
    here.say("what exchanges take of a step", here.dry or share <= MOST, share=round(share, 4), most=MOST,
             ms=round(1000 * alone, 2), backend=torch.distributed.get_backend())  # fmt: skip
    for name, parameter in shared.parameters.items():  # of the same weights, whatever was found above
        parameter.data.copy_(plain.parameters[name])
    before = plain.gradients()
    shards = Shards(shared.model, world)
    after = shared.gradients(shards)
    off = max(float((after[name] - one).norm() / one.norm().clamp_min(1e-30)) for name, one in before.items())
    here.say("gradients of a model in shards", off < 1e-2, off=off)


def _store(here: Here) -> Any:
    from torch.distributed import FileStore  # type: ignore[attr-defined]  # torch names it in no __all__

    here.work.mkdir(parents=True, exist_ok=True)
    return FileStore(str(here.work / "store"), 1)


class Stepping:
    """A random model with LoRA on it, and its step of a made-up batch."""

    def __init__(self, here: Here, device: Any) -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        from fitune.core.config import build
        from fitune.engine import optim
        from fitune.memory.steps import made_up
        from fitune.models import adapters
        from fitune.models.parts import trainable

        config = build({
            "model": "m", "data": ["d.jsonl"], "lora": {"targets": "all-linear"}, "optimizer": "adamw",
            "precision": "fp32" if here.dry else "bf16",
        })  # fmt: skip
        torch.manual_seed(0)
        with device:  # filling half a billion random numbers on the processor takes longer than all that is measured
            made = LlamaForCausalLM(LlamaConfig(**(TINY if here.dry else BIG), attn_implementation="sdpa"))
        base = made.to(device, torch.float32 if here.dry else torch.bfloat16).requires_grad_(False)
        self.model: Any = adapters.attach(base, config).train()
        self.parameters = trainable(self.model)
        self.optimizer = optim.make(self.parameters, config)
        optim.set_learning_rate(self.optimizer, 1e-3)
        rows, length = (2, 16) if here.dry else (8, 512)
        self.batch, self.device = made_up(rows, length, 500), device

    def step(self, world: Any) -> float:
        """One step; seconds."""
        import torch

        from fitune.engine.step_runner import StepRunner

        runner = StepRunner(self.model, "flat", 1.0, lambda _: None, lambda _: None, world=world)
        began = time.perf_counter()
        runner.step([self.batch], self.optimizer, self.batch.weight)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def gradients(self, shards: Any = None) -> dict[str, Any]:
        """Of a step, by name; the model keeps none."""
        from fitune.engine.step import make_gradients

        make_gradients(self.model, [self.batch], "flat")
        if shards is None:
            held = self.parameters
        else:
            shards.gradients()
            held = shards.local
        found = {name: p.grad.detach().clone() for name, p in held.items() if p.grad is not None}
        for parameter in held.values():
            parameter.grad = None
        return found
