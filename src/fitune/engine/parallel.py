"""Several processes that make one run: what they exchange, and in which order.

In: gradients and loss of each process's share of a step. Out: those of the whole step, the same on all. Frozen weights
never travel. A step has two collectives: a few float64 numbers (loss, tokens, which tensors have a gradient, whether
the run ends), and one flat buffer of all gradients in float32; before them one more, of two numbers, where the loss
needs sums over the whole step (KTO). None of them is inside what is repeated when a process runs out of memory. Sums of
the same number of processes have the same order, so that the same run again gives the same bits.

Process 0 is the run: it writes, prints, evaluates and decides. The others (`commands/follow.py`) get what it resolved,
start from its tensors, and make their shares of the steps until it ends.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.distributed import FileStore, PrefixStore  # type: ignore[attr-defined]  # torch names them in no __all__
from torch.distributed.rendezvous import rendezvous

from fitune.core.errors import ConfigError, TrainingError
from fitune.core.parallel import STORE
from fitune.core.ranklog import RankLog
from fitune.engine import optim
from fitune.engine.step import SFT, Made, Objective

LONG = 60 * 24.0  # minutes that a process waits for what process 0 resolves: it may prepare data meanwhile
DIGEST = 32  # bytes
DUMP = 0.75  # of the minutes that others wait: then a process that is late writes its stack into its log
AT_ONCE = 0.2  # seconds: an exchange that fails so soon was given up before
HEARD = 3.0  # seconds in which the processes that are there say so, once one is not
GOES_ON, STOPPED, FINISHED = 0, 1, 2  # what process 0 says of the run, in the sums of a step


class EndedError(Exception):
    """Process 0 has ended the run. finished: it has its result, and is not to go on later."""

    def __init__(self, finished: bool) -> None:
        super().__init__()
        self.finished = finished


@dataclass
class Now:
    """Where a process stands. step: it makes. exchange: it comes to, with the others. minutes: that it waits for them.
    wish: somebody asked one of them to stop. log: of this one."""

    step: int = 0
    exchange: int = 0
    minutes: float = 10.0
    wish: Event = field(default_factory=Event)
    log: RankLog | None = None


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them.

    rank: this one. size: how many. store: where they leave what others read. local: the number of this process on its
    machine. now: where it stands. measured: a single process goes through the exchanges as one of several would.
    """

    rank: int = 0
    size: int = 1
    store: Any = None
    local: int = 0
    now: Now = field(default_factory=Now)
    measured: bool = False

    @property
    def alone(self) -> bool:
        """Is this the only process, which exchanges nothing?"""
        return self.size == 1 and not self.measured

    @cached_property
    def counted(self) -> dict[str, int]:
        """How many collectives there were, and their bytes."""
        return {"collectives": 0, "bytes": 0}

    # ---- before the first step ----

    def publish(self, name: str, value: object) -> None:
        """Leave something for the others; JSON."""
        if not self.alone:
            self.store.set(name, json.dumps(value))

    def publish_once(self, name: str, value: object) -> None:
        """The same, unless something is there."""
        with suppress(RuntimeError):  # where the store is gone, so are they
            if not self.alone and not self.store.check([name]):
                self.publish(name, value)

    def published(self, name: str) -> Any:
        """What process 0 left, once it is there."""
        self.store.wait([name], timedelta(minutes=LONG))
        return json.loads(self.store.get(name))

    def connect(self, device: torch.device, minutes: float = 10.0) -> None:
        """Connect the processes: gloo, and NCCL between GPUs for what lies there.

        Args:
            device: of the model.
            minutes: that each waits for the others, in each exchange.
        """
        self.now.minutes = minutes
        if not self.alone and not distributed.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            distributed.init_process_group(
                backend, store=PrefixStore("group", self.store), rank=self.rank, world_size=self.size,
                timeout=timedelta(minutes=minutes),
            )  # fmt: skip

    def check_same(self, digests: Mapping[str, bytes]) -> None:
        """Do all processes have the same settings, data, weights, versions?

        Args:
            digests: SHA-256 of each, by its name; the same names everywhere.

        Raises:
            TrainingError: names the processes that differ from process 0, and in what.
        """
        if self.alone:
            return
        mine = torch.tensor(list(b"".join(digests.values())), dtype=torch.uint8)
        rows = torch.stack(self._gathered(mine, "comparing settings and inputs")).view(self.size, len(digests), DIGEST)
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
        if self.alone:
            return dict(progress)
        tensors, scalars = optim.state_tensors(optimizer, parameters) if self.rank == 0 else ({}, {})
        if self.rank == 0:
            form = {name: [str(one.dtype).removeprefix("torch."), list(one.shape)] for name, one in tensors.items()}
            self.publish("begin", {"states": form, "scalars": scalars, "progress": dict(progress)})
        begun = self.published("begin")
        device = next(iter(parameters.values())).device
        self.spread(parameters)
        for name, (dtype, shape) in begun["states"].items():
            one = tensors[name].to(device) if self.rank == 0 else torch.empty(
                shape, dtype=getattr(torch, dtype), device=device
            )  # fmt: skip
            self.broadcast(one)
            tensors[name] = one
        if self.rank:
            optim.load_state(optimizer, parameters, tensors, begun["scalars"])
        progress_: dict[str, Any] = begun["progress"]
        return progress_

    def spread(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Give all processes the trained tensors of process 0."""
        if not self.alone:
            for parameter in parameters.values():
                self.broadcast(parameter.data)

    def broadcast(self, tensor: Tensor) -> None:
        """Give all processes the values that process 0 has."""
        with self._together("starting from the same weights"):
            whole = tensor.contiguous()
            distributed.broadcast(whole, 0)
            if whole is not tensor:
                tensor.copy_(whole)

    def collected(self, mine: Tensor, shape: torch.Size) -> Tensor | None:
        """A tensor of which each process has some rows, as `chunk` deals them out: whole, in main memory, for process
        0; it alone ever has more than its part. All must ask."""
        with self._together("collecting a tensor"):
            if self.rank:
                if mine.numel():
                    distributed.send(mine.cpu().contiguous(), 0)
                return None
            whole = torch.empty(shape, dtype=mine.dtype)
            for rank, part in enumerate(whole.chunk(self.size)):
                if rank == 0:
                    part.copy_(mine)
                elif part.numel():
                    distributed.recv(part, rank)
        return whole

    def dealt(self, whole: Tensor | None, mine: Tensor) -> None:
        """The other way round: each process gets its rows of a tensor that process 0 has."""
        with self._together("dealing out a tensor"):
            if self.rank:
                if mine.numel():
                    part = torch.empty(mine.shape, dtype=mine.dtype)
                    distributed.recv(part, 0)
                    mine.copy_(part)
                return
            assert whole is not None
            for rank, part in enumerate(whole.to("cpu", mine.dtype).chunk(self.size)):
                if rank == 0:
                    mine.copy_(part)
                elif part.numel():
                    distributed.send(part.contiguous(), rank)

    # ---- a step ----

    def seed(self, seed: int, step: int) -> None:
        """Random numbers of this process in this step: they follow from both, so that a resumed run has them again."""
        if not self.alone:
            self.now.step = step + 1
            if self.now.log is not None:
                self.now.log.line(f"step {step + 1}")
            (drawn,) = np.random.SeedSequence([seed, step, self.rank]).generate_state(1, np.uint64)
            torch.manual_seed(int(drawn) >> 1)

    def before(self, sums: Tensor) -> Tensor:
        """What an objective must know of the whole step before its first gradient, of the sums of each process.

        Raises:
            EndedError: process 0 has ended the run.
            TrainingError: another process is gone.
        """
        if self.alone:
            return sums
        small = torch.cat([torch.tensor([GOES_ON], dtype=torch.float64), sums.cpu()])
        self._reduce(small, "the sums before a step")
        if small[0] != GOES_ON:
            raise EndedError(finished=int(small[0]) == FINISHED)
        return small[1:].to(sums.device)

    def summed(self, made: Made, trained: Callable[[], Sequence[nn.Parameter]]) -> Made:
        """The whole step's loss and gradients, of those of each process.

        Args:
            made: of this process, its loss divided by the weight of the whole step.
            trained: gives what is trained, in the same order everywhere. Their gradients become those of the whole
                step; one that has none anywhere stays without.

        Raises:
            EndedError: process 0 has ended the run.
            TrainingError: another process is gone.
        """
        if self.alone:
            return made
        whole = trained()
        there = torch.tensor([p.grad is not None for p in whole], dtype=torch.float64)
        sums = torch.tensor([GOES_ON, self.now.wish.is_set(), made.tokens, made.targets], dtype=torch.float64)
        seen = there[:0] if made.seen is None else made.seen.cpu()
        small = torch.cat([sums, made.total.cpu()[None], there, seen])  # over gloo, which says so when one is late
        self._reduce(small, "the losses of a step")
        if small[0] != GOES_ON:
            raise EndedError(finished=int(small[0]) == FINISHED)
        if small[1] > 0:
            self.now.wish.set()
        at = len(sums) + 1 + len(whole)
        with_gradient = [p for p, found in zip(whole, small[len(sums) + 1 : at].tolist(), strict=True) if found]
        if with_gradient:
            in_one_buffer(with_gradient, partial(self._reduce, what="the gradients of a step"))
        tokens, targets, total = small[2:5]
        device = made.total.device
        rewards = None if made.seen is None else small[at:].to(device)
        return replace(made, total=total.to(device), tokens=int(tokens), targets=int(targets), seen=rewards)

    def added(self, numbers: Tensor) -> Tensor:
        """The sum of these numbers over all processes, which must all ask."""
        if not self.alone:
            self._reduce(numbers, "a check of a step")
        return numbers

    def end(self, parameters: Sequence[nn.Parameter], objective: Objective = SFT, *, finished: bool) -> None:
        """Process 0 ends the run before its last step: the others find it in the first sums of the next.

        Args:
            parameters: what is trained.
            objective: of the run: how many numbers of it are in these sums.
            finished: the run has its result.
        """
        if not self.alone:
            count = 1 + objective.first if objective.first else 5 + len(parameters) + objective.figures
            small = torch.zeros(count, dtype=torch.float64)
            small[0] = FINISHED if finished else STOPPED
            self._reduce(small, "the end of the run")

    # ---- what is shared out beside the steps ----

    def gathered(self, value: object, what: str) -> list[Any]:
        """What each process gives, by their numbers; all get it.

        Args:
            value: JSON.
            what: they do, for people.
        """
        if self.alone:
            return [value]
        mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        counts = [int(one) for one in self._gathered(torch.tensor([len(mine)]), what)]
        padded = torch.zeros(max(counts), dtype=torch.uint8)
        padded[: len(mine)] = mine
        found = zip(self._gathered(padded, what), counts, strict=True)
        return [json.loads(bytes(one[:count].tolist())) for one, count in found]

    def _gathered(self, mine: Tensor, what: str) -> list[Tensor]:
        found: list[Tensor] = [torch.empty_like(mine) for _ in range(self.size)]
        with self._together(what):
            distributed.all_gather(found, mine)
        return found

    def decided(self, value: object = None) -> Any:
        """What process 0 gives; JSON."""
        return self.gathered(value if self.rank == 0 else None, "what process 0 decides")[0]

    # ---- one that is late, or gone ----

    def log_to(self, run: Path, *, all_of_it: bool) -> None:
        """Write into the run folder from here on which step is made, and the stack of a process that is late.

        Args:
            run: the folder.
            all_of_it: also what this process prints.
        """
        if not self.alone:
            self.now.log = RankLog(run, self.rank, all_of_it=all_of_it)
            self.now.log.line(f"process {self.rank} of {self.size}, id {os.getpid()}")

    def _reduce(self, tensor: Tensor, what: str) -> None:
        self.counted["collectives"] += 1
        self.counted["bytes"] += tensor.nbytes
        with self._together(what):
            distributed.all_reduce(tensor)

    @contextmanager
    def _together(self, what: str) -> Iterator[None]:
        now = self.now
        now.exchange += 1
        if now.log is not None:
            now.log.in_time()
        since = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            missing = self._missing(time.monotonic() - since)
            raise self._is_missing(missing, what, " ".join(str(error).split())) from error
        if now.log is not None:
            now.log.write_stack_after(DUMP * 60 * now.minutes)

    def _is_missing(self, missing: Sequence[int], what: str, error: str) -> TrainingError:
        """The processes that have not come to an exchange, with what their logs end with."""
        who = " and ".join(f"process {rank}" for rank in missing) or "another process"
        verb = "are" if len(missing) > 1 else "is"
        ends = [self.now.log.end_of(rank) for rank in missing] if self.now.log is not None else []
        step = f"step {self.now.step}, " if self.now.step else ""
        return TrainingError(
            f"{who} of this run {verb} gone, or late by more than {self.now.minutes:g} minutes: {step}{what}",
            received="\n".join([error[:200], *ends]),
            fix="the run goes on from its last checkpoint with --resume; where a process is only slow, a longer "
            "--collective-timeout",
        )

    def _missing(self, waited: float) -> list[int]:
        """Those that did not come to the exchange in which this process waited: they do not say within a few seconds
        that it failed for them, too; or, where others waited until they gave up, it failed as they came. None where
        nobody knows."""
        key = f"waited-{self.now.exchange}-"
        seconds: dict[int, float] = {}
        with suppress(RuntimeError, AssertionError):  # the store itself may be gone
            self.store.set(f"{key}{self.rank}", str(waited))
            distributed.destroy_process_group()  # those that wait for this one find out, too
            end = time.monotonic() + HEARD
            while len(seconds) < self.size and time.monotonic() < end:
                there = [rank for rank in range(self.size) if self.store.check([f"{key}{rank}"])]
                seconds = {rank: float(self.store.get(f"{key}{rank}")) for rank in there}
                time.sleep(0.05)
            gave_up = max(seconds.values()) > 0.9 * 60 * self.now.minutes
            came = [rank for rank, waited in seconds.items() if not gave_up or waited > AT_ONCE]
            return [rank for rank in range(self.size) if rank not in came]
        return []


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
