"""Several processes that make one run: what they exchange, and in which order.

In: gradients and loss of each process's share of a step. Out: those of the whole step, the same on all. Frozen weights
never travel. A step has two collectives: a few float64 numbers (loss, tokens, which tensors have a gradient, whether
the run ends), and one flat buffer of all gradients in float32. Sums of the same number of processes have the same
order, so that the same run again gives the same bits.

Process 0 is the run: it writes, prints, evaluates and decides. The others (`commands/follow.py`) get what it resolved,
start from its tensors, and make their shares of the steps until it ends.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.distributed import FileStore, PrefixStore  # type: ignore[attr-defined]  # torch names them in no __all__
from torch.distributed.rendezvous import rendezvous

from fitune.core.errors import ConfigError, TrainingError
from fitune.core.parallel import STORE
from fitune.engine import optim
from fitune.engine.step import Made

MINUTES = 30.0  # that a process waits for the others: process 0 evaluates and saves meanwhile
LONG = 60 * 24.0  # minutes that it waits before the first step: process 0 prepares the data, and evaluates the base
DIGEST = 32  # bytes


class EndedError(Exception):
    """Process 0 has ended the run."""


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them.

    rank: this one. size: how many. store: where they leave what others read. local: the number of this process on its
    machine.
    """

    rank: int = 0
    size: int = 1
    store: Any = None
    local: int = 0

    @cached_property
    def counted(self) -> dict[str, int]:
        """How many collectives there were, and their bytes."""
        return {"collectives": 0, "bytes": 0}

    # ---- before the first step ----

    def publish(self, name: str, value: object) -> None:
        """Leave something for the others; JSON."""
        if self.size > 1:
            self.store.set(name, json.dumps(value))

    def published(self, name: str) -> Any:
        """What process 0 left, once it is there."""
        self.store.wait([name], timedelta(minutes=LONG))
        return json.loads(self.store.get(name))

    def connect(self, device: torch.device) -> None:
        """Connect the processes: NCCL between GPUs, else gloo."""
        if self.size > 1 and not distributed.is_initialized():
            backend = "nccl" if device.type == "cuda" else "gloo"
            wait = timedelta(minutes=MINUTES)
            distributed.init_process_group(
                backend, store=PrefixStore("group", self.store), rank=self.rank, world_size=self.size,
                timeout=wait,
            )  # fmt: skip

    def check_same(self, digests: Mapping[str, bytes], device: torch.device) -> None:
        """Do all processes have the same settings, data, weights, versions?

        Args:
            digests: SHA-256 of each, by its name; the same names everywhere.
            device: of the model.

        Raises:
            TrainingError: names the processes that differ from process 0, and in what.
        """
        if self.size == 1:
            return
        mine = torch.tensor(list(b"".join(digests.values())), dtype=torch.uint8, device=device)
        all_: list[Tensor] = [torch.empty_like(mine) for _ in range(self.size)]
        with self._together("comparing settings and inputs"):
            distributed.all_gather(all_, mine)
        rows = torch.stack(all_).cpu().view(self.size, len(digests), DIGEST)
        wrong = [
            f"process {rank}: another {name}"
            for rank in range(1, self.size)
            for at, name in enumerate(digests)
            if not torch.equal(rows[rank, at], rows[0, at])
        ]
        if wrong:
            raise TrainingError(
                "the processes of this run do not work on the same", received="; ".join(wrong),
                expected="what process 0 has, in each of them",
                fix="the same files, packages and processors on every machine",
            )  # fmt: skip

    def begin(
        self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, progress: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Give all processes what process 0 begins with: its trainable tensors, the states of its optimizer, and how
        far it is.

        Args:
            parameters: what is trained, by name.
            optimizer: of process 0 with its states, of the others without.
            progress: numbers, of process 0; JSON.

        Returns:
            The progress of process 0.
        """
        if self.size == 1:
            return dict(progress)
        tensors, scalars = optim.state_tensors(optimizer, parameters) if self.rank == 0 else ({}, {})
        if self.rank == 0:
            form = {name: [str(one.dtype).removeprefix("torch."), list(one.shape)] for name, one in tensors.items()}
            self.publish("begin", {"states": form, "scalars": scalars, "progress": dict(progress)})
        begun = self.published("begin")
        device = next(iter(parameters.values())).device
        for parameter in parameters.values():
            self._broadcast(parameter.data)
        for name, (dtype, shape) in begun["states"].items():
            one = tensors[name].to(device) if self.rank == 0 else torch.empty(
                shape, dtype=getattr(torch, dtype), device=device
            )  # fmt: skip
            self._broadcast(one)
            tensors[name] = one
        if self.rank:
            optim.load_state(optimizer, parameters, tensors, begun["scalars"])
        progress_: dict[str, Any] = begun["progress"]
        return progress_

    def _broadcast(self, tensor: Tensor) -> None:
        with self._together("starting from the same weights"):
            whole = tensor.contiguous()
            distributed.broadcast(whole, 0)
            if whole is not tensor:
                tensor.copy_(whole)

    # ---- a step ----

    def seed(self, seed: int, step: int) -> None:
        """Random numbers of this process in this step: they follow from both, so that a resumed run has them again."""
        if self.size > 1:
            (drawn,) = np.random.SeedSequence([seed, step, self.rank]).generate_state(1, np.uint64)
            torch.manual_seed(int(drawn) >> 1)

    def summed(self, made: Made, parameters: Sequence[nn.Parameter]) -> Made:
        """The whole step's loss and gradients, of those of each process.

        Args:
            made: of this process, its loss divided by the weight of the whole step.
            parameters: what is trained, in the same order everywhere. Their gradients become those of the whole step;
                one that has none anywhere stays without.

        Raises:
            EndedError: process 0 has ended the run.
            TrainingError: another process is gone.
        """
        if self.size == 1:
            return made
        device = made.total.device
        there = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float64, device=device)
        sums = torch.tensor([0, made.tokens, made.targets], dtype=torch.float64, device=device)
        seen = made.total.new_empty(0) if made.seen is None else made.seen
        small = torch.cat([sums, made.total[None], there, seen.to(device)])
        self._reduce(small, "the losses of a step")
        if small[0] > 0:
            raise EndedError
        at = len(sums) + 1 + len(parameters)
        trained = [p for p, found in zip(parameters, small[len(sums) + 1 : at].tolist(), strict=True) if found]
        in_one_buffer(trained, partial(self._reduce, what="the gradients of a step"))
        _, tokens, targets, total, *_ = small
        rewards = None if made.seen is None else small[at:]
        return replace(made, total=total, tokens=int(tokens), targets=int(targets), seen=rewards)

    def added(self, numbers: Tensor) -> Tensor:
        """The sum of these numbers over all processes, which must all ask."""
        if self.size > 1:
            self._reduce(numbers, "a check of a step")
        return numbers

    def end(self, parameters: Sequence[nn.Parameter], rewards: int = 0) -> None:
        """Process 0 ends the run before its last step: the others find it in the sums of the next.

        Args:
            parameters: what is trained.
            rewards: numbers that an objective on preferences has in these sums.
        """
        if self.size > 1:
            small = torch.zeros(4 + len(parameters) + rewards, dtype=torch.float64, device=parameters[0].device)
            small[0] = 1
            self._reduce(small, "the end of the run")

    def _reduce(self, tensor: Tensor, what: str) -> None:
        self.counted["collectives"] += 1
        self.counted["bytes"] += tensor.nbytes
        with self._together(what):
            distributed.all_reduce(tensor)

    @contextmanager
    def _together(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise TrainingError(
                f"another process of this run is gone, or late by more than {MINUTES:g} minutes: {what}",
                received=" ".join(str(error).split())[:200],
                fix="look at what it wrote last; the run goes on from its last checkpoint with --resume",
            ) from error


def in_one_buffer(trained: Sequence[nn.Parameter], exchange: Callable[[Tensor], object]) -> None:
    """Exchange the gradients of these parameters in one buffer of float32, and put them back; those in float32 stay in
    it. A parameter without one has zeros there."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    flat = torch.empty(sum(p.numel() for p in trained), dtype=torch.float32, device=trained[0].device)
    torch.cat([gradient.reshape(-1) for gradient in gradients], out=flat)
    del gradients
    for parameter in trained:
        parameter.grad = None
    exchange(flat)
    for parameter, part in zip(trained, flat.split([p.numel() for p in trained]), strict=True):
        parameter.grad = part.view_as(parameter).to(parameter.dtype)


ALONE = World()


def join() -> World:
    """This process's place in a run of several, by its environment: RANK and WORLD_SIZE, as torchrun and
    `fitune train --workers` set them; alone where they are not set."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        return ALONE
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        torch.cuda.set_device(local % torch.cuda.device_count())
    if STORE in os.environ:
        return World(rank, size, FileStore(os.environ[STORE], size), local)
    try:
        store, _, _ = next(rendezvous("env://"))
    except ValueError as error:
        raise ConfigError(
            "RANK and WORLD_SIZE say that this is one of several processes, but not where they meet",
            received=str(error).partition(":")[2].strip() or str(error),
            expected="MASTER_ADDR and MASTER_PORT too, as torchrun sets them",
            fix="start it with torchrun or --workers; or unset RANK and WORLD_SIZE",
        ) from error
    return World(rank, size, store, local)
