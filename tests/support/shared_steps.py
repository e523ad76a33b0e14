"""One of several processes that make the same steps: `python shared_steps.py CASES`, a JSON list of cases.

A case is a variant of a method, a kind of model, a precision, a quantizer, and perhaps "shard" or an objective. For
each a line of JSON is printed: how far the weights are off those that this process alone makes of whole steps, their
SHA-256, the losses of both, and the collectives of a step.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import sys
import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
sys.path[:0] = [str(Path(__file__).parents[1])]

from fitune.core import imports  # noqa: E402

with imports.for_good():
    import numpy as np
    import torch
    from torch import distributed
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # torch names it in no __all__

    from fitune.checks import stepchecks
    from fitune.commands.sharing_out import share
    from fitune.core.errors import TrainingError
    from fitune.core.records import Units
    from fitune.data.batches import Loader
    from fitune.engine import objectives, optim, parallel
    from fitune.engine.held_out import held_out
    from fitune.engine.loss_scale import LossScale
    from fitune.engine.parallel import ALONE, World
    from fitune.engine.shards import Shards
    from fitune.engine.step import Objective
    from fitune.engine.step_runner import StepRunner
    from fitune.models import adapters, by_blocks, determinism, methods
    from fitune.models.load import load_files, opened
    from fitune.models.parts import trainable
    from support import contract, preferred

RATE = 3e-2
LENGTHS = ((9, 14), (5, 4), (20, 11), (7, 7), (12, 30))
FAR = 20  # that the reference is below the model, for KTO's distance not to be 0
DROPPED = 0.3  # added to what process 1 has at first: it must not matter


def main(cases: list[list[str]]) -> None:
    world = parallel.join()
    for kind in {kind for _, kind, _, quant, *ways in cases if quant != "none" or "read" in ways}:
        contract.folder_of(kind)  # transformers saves nothing in a later process of a group
    for number, case in enumerate(cases):
        store = PrefixStore(str(number), world.store)
        here = World(world.rank, world.size, store, world.local)
        world.connect(torch.device("cpu"))
        print(json.dumps({"case": case, "rank": world.rank, **steps(here, *case)}), flush=True)
    try:
        world.check_same({"settings": bytes(32), "data": bytes([world.rank]) * 32})
    except TrainingError as error:
        print(json.dumps({"differs": str(error)}), flush=True)
    given = world.gathered({"rank": world.rank, "padding": "x" * world.rank}, "a test")
    print(json.dumps({"case": ["given"], "given": [one["rank"] for one in given]}), flush=True)
    if world.size == 2:
        print(json.dumps({"case": ["late"], "rank": world.rank, "late": late(world)}), flush=True)


def late(world: World) -> str:
    """What is said where process 1 does not come."""
    distributed.destroy_process_group()
    here = World(world.rank, world.size, PrefixStore("late", world.store))
    here.connect(torch.device("cpu"), 2.0 / 60)
    here.log_to(Path(os.environ["RUN"]), all_of_it=False)
    here.seed(0, 6)
    here.added(torch.ones(1))
    if world.rank:
        keep_the_others_waiting()
    try:
        here.added(torch.ones(1))
    except TrainingError as error:
        return str(error)
    return ""


def keep_the_others_waiting() -> None:
    time.sleep(4)


def steps(world: World, variant: str, kind: str, precision: str, quant: str, *ways: str) -> dict[str, Any]:
    """The same two epochs by all processes, and by this one alone."""
    # not Adam, whose first steps make as much of a gradient's rounding as of a gradient
    preferences = [way for way in ways if way in preferred.SETTINGS]
    more = {key: value for way in preferences for key, value in (("objective", way), (way, preferred.SETTINGS[way]))}
    config = contract.config_for(variant, precision, quant=quant, optimizer="sgd", **more)
    unread = None
    if "read" in ways:
        files = opened(contract.folder_of(kind), precision=precision, device="cpu", quant=config.quant)
        unread = by_blocks.opened(files, config, lambda part: None)
        assert unread is not None
        model, twin = (adapters.attach(base, config) for base in (unread.begun(), load_files(files)))
    else:
        model = adapters.attach(contract.make_base(kind, precision, methods.find(config.method), quant), config)
        twin = copy.deepcopy(model)
    if world.rank:
        with torch.no_grad():
            for parameter in trainable(model).values():
                if 0 not in parameter.stride():  # what stands in for a tensor of the files
                    parameter.add_(DROPPED)
    shards = Shards(model, world, unread) if "shard" in ways else None
    shared, counted, parts = trained(world, model, config, shards)
    if shards is not None:
        model = gathered(model, copy.deepcopy(twin), config)
    alone, _, _ = trained(ALONE, twin, config)
    ours, theirs = (torch.cat([p.detach().double().flatten() for p in trainable(m).values()]) for m in (model, twin))
    bits = b"".join(p.detach().contiguous().view(torch.uint8).numpy().tobytes() for p in trainable(model).values())
    return {
        "off": float((ours - theirs).norm() / theirs.norm()), "losses": shared, "alone": alone,
        "sha256": hashlib.sha256(bits).hexdigest(), "collectives": counted, "again": parts > 1,
    }  # fmt: skip


def gathered(model: Any, whole: Any, config: Any) -> Any:
    """The model in shards, whole; its held-out loss is the same."""
    (_, step) = next(iter(Loader(rows_of(config.objective), batch_size=2, accumulation=2, seed=0).steps(0, 1)))
    with determinism.exact(torch.device("cpu")):
        held = [held_out(model, [step[0]], "flat", objectives.of(config)).loss]  # gathers, too
        with torch.no_grad():
            for name, parameter in trainable(whole).items():
                one: Any = trainable(model)[name]
                parameter.copy_(one.full_tensor() if hasattr(one, "full_tensor") else one)
        held.append(held_out(whole.train(), [step[0]], "flat", objectives.of(config)).loss)
    assert held[0] == held[1], held
    return whole


def trained(world: World, model: Any, config: Any, shards: Shards | None = None) -> tuple[list[float], list[int], int]:
    """Losses, and collectives, of each step; in how many parts micro-batches are at the end."""
    parameters = trainable(model)
    make = partial(optim.make, config=config, rates=partial(methods.find(config.method).rates, config))
    optimizer = make(parameters)
    scale = LossScale(LossScale.START if precision_of(config) == "fp16" else 1.0)
    loader = Loader(rows_of(config.objective), batch_size=2, accumulation=2, seed=0)
    if shards is not None:
        optimizer, _ = shards.begin(make, {})
    else:
        world.begin(parameters, optimizer, {})
    optim.set_learning_rate(optimizer, RATE)
    objective: Any = objectives.of(config)
    if world.size > 1 and config.objective == "kto" and shards is None:
        objective = Full(objective, world.rank)
    runner = StepRunner(
        model, "flat", 1.0, lambda _: None, lambda _: None, scale=scale, objective=objective, world=world, shards=shards
    )
    model.train()
    losses, counted = [], []
    with determinism.exact(torch.device("cpu")):
        for number, (_, step) in enumerate(loader.steps(0, 4)):
            before = world.counted["collectives"]
            with stepchecks.step_equality(runner, optimizer) if number == 0 else nullcontext():
                losses.append(runner.step(*share(step, loader, world, shards, optimizer)).loss)
            if number:
                counted.append(world.counted["collectives"] - before)
    return losses, counted, runner.parts


def rows_of(objective: str) -> Units:
    """The last step of an epoch has one row, so that a process has none."""
    if objective != "sft":
        found = preferred.pairs(objective, LENGTHS)
        assert found.reference is not None
        return found.with_reference(found.reference - np.float32(FAR))
    rows = [sample for sample in contract.samples() if sample.mask.any()]
    return [*rows, rows[0]]


@dataclass
class Full:
    """An objective for which memory runs out: in process 0 before the sums of the whole step are known, in process 1
    between them and the gradients. Each then makes its half of the step again, alone."""

    real: Objective
    rank: int
    failed: bool = False

    @property
    def figures(self) -> int:
        return self.real.figures

    @property
    def first(self) -> int:
        return self.real.first

    def sums(self, model: Any, batch: Any, layout: Any) -> Any:
        self._runs_out(0, batch)
        return self.real.sums(model, batch, layout)

    def of_step(self, sums: Any) -> Objective:
        return replace(self, real=self.real.of_step(sums))

    def loss(self, model: Any, batch: Any, layout: Any) -> Any:
        self._runs_out(1, batch)
        return self.real.loss(model, batch, layout)

    def _runs_out(self, rank: int, batch: Any) -> None:
        if rank == self.rank and not self.failed and len(batch.rows) > 1:
            self.failed = True
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def precision_of(config: Any) -> str:
    return str(config.precision)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(json.loads(sys.argv[1]))
