"""What fine-tuning takes of this machine's CUDA GPU: what fitune says before, and what is measured then.

    python benchmarks/memory_gpu.py [--quick] [--budget-seconds N] [--output FILE] [--json]

The matrix: full, freeze, lora, qlora (lora on nf4), int8 (lora on int8) and prefix, each with and without activation
checkpointing, rows of three lengths, in the shapes of Llama 1B, 3B and 8B; nothing is downloaded, weights are random.
Measured are torch's most bytes allocated and reserved, and what the driver says that the process takes.

Around limits: the card is capped at 8, 12, 16, 24 and 48 GiB, and configurations are looked for whose plan lies within
10 % of the limit, below and above. None that was said to fit may die; those that were said not to fit and ran are
counted too. The cap holds for torch's allocator (`torch.cuda.set_per_process_memory_fraction`), which gets the limit
less what the plan counts beside the tensors; a run that goes through but takes more than the limit by the driver's
figure counts as dead.

Each configuration has a process of its own. It makes its plan without touching the GPU, waits for its turn, and then
does the same work for real: three steps, an ordinary one, the largest, the ordinary one again, and a checkpoint's
copies, with deterministic algorithms as in a run. Weights are made on the GPU one tensor at a time; a quantized layer
is made from a plain weight that comes from main memory, as when a model is loaded, but without the one large block that
transformers reserves before it loads a quantized model.

Exit code: 1 where a configuration that was said to fit died, or one could not be measured; 0 else, and without a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import queue
import random
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import IO, Any
from unittest.mock import patch

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from fitune.core import catalog
from fitune.core.config import RunConfig, build
from fitune.core.files import write_json
from fitune.core.options import QuantOptions
from fitune.memory import device, plan, steps, storage, trace
from fitune.models import adapters, configs, determinism, devices, families, load, methods, prepare
from fitune.models import quant as quants
from fitune.models.interfaces import CausalLM
from fitune.models.precision import DTYPES
from fitune.models.quant.base import sizes

MIB, GIB = 2**20, 2**30
MODELS = ("llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b")
METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "freeze": {"method": "freeze"},
    "lora": {"method": "lora"},
    "qlora": {"method": "lora", "quant": "nf4"},
    "int8": {"method": "lora", "quant": "int8"},
    "prefix": {"method": "prefix"},
}
VARIANTS: dict[str, dict[str, Any]] = {  # of scripts/gpu_accept.py, beside those
    "dpo": {"method": "lora", "objective": "dpo"},
    "lora, blocks 0-15 recomputed": {"method": "lora", "checkpointing": "0-15"},
    "lora, blocks 0-15 in main memory": {"method": "lora", "offload": "0-15"},
}
ROWS, LENGTHS = 2, (512, 1024, 2048)
CAPS = tuple(size * GIB for size in (8, 12, 16, 24, 48))
MOST, MOST_QUICK = 4, 2  # configurations around a limit
NEAR = 0.10  # how near to the limit their plans are
AIMS = ((0.99, 1.02), (0.94, 1.07))  # what is looked for, in limits: one below and one above
TRIED = 12  # kinds of configurations that are tried around a limit
# About so many bytes a parameter take weights, gradients and states
WEIGHT_BYTES = {"full": 18.0, "freeze": 2.8, "lora": 2.0, "qlora": 0.75, "int8": 1.2, "prefix": 2.0}
SHORT, LONG = 64, 1024  # lengths of which a plan is made first, to find another
LONGEST, MOST_TOKENS = 8192, 32_768  # of a row, of a micro-batch: more would take too long
LARGE = 100 * GIB  # a limit above which micro-batches may be twice as large
STEPS, CLOSE = 5, 0.008  # how often a length is bettered, and when it is good
SPREAD = 0.02  # of random weights
PATIENCE = 600  # seconds that a process may take
GO = "go"
LATE = "no time left"
OUTPUT = Path(__file__).parent.parent / "results" / "memory_gpu.json"

Row = dict[str, Any]


# ---- what is run ----


@dataclass(frozen=True)
class Case:
    """One configuration. model: of the catalog; method: of METHODS or VARIANTS; rows, length: of the largest
    micro-batch; cap: bytes of the card that it may take, None: all of them."""

    model: str
    method: str
    checkpointing: bool
    rows: int
    length: int
    cap: int | None = None

    @property
    def name(self) -> str:
        """For people."""
        saver = ", checkpointing" if self.checkpointing else ""
        limit = f", in {self.cap / GIB:g} GiB" if self.cap else ""
        return f"{self.model} {self.method} {self.rows} x {self.length}{saver}{limit}"


@dataclass(frozen=True)
class Card:
    """The GPU. total, budget: bytes, all and what is free for a run; precision: bf16 where it computes that."""

    name: str
    uuid: str
    total: int
    budget: int
    precision: str

    def device(self, cap: int | None = None) -> device.Device:
        """As a plan wants it, capped or not."""
        return device.Device(self.name, "cuda", cap or self.budget, self.precision == "bf16")


def matrix(*, quick: bool = False) -> list[Case]:
    """Every combination once, in an order that mixes them: a matrix that is cut short still has some of each.

    Args:
        quick: a third of it: each model, method and checkpointing with one of the lengths.
    """
    found = []
    for (a, model), (b, method), (c, checkpointing), (d, length) in itertools.product(
        enumerate(MODELS), enumerate(METHODS), enumerate((False, True)), enumerate(LENGTHS)
    ):
        if not quick or (a + b + c) % len(LENGTHS) == d:
            found.append(Case(model, method, checkpointing, ROWS, length))
    random.Random(0).shuffle(found)
    return found


def work_of(case: Case, precision: str) -> plan.Work:
    """Three steps of a configuration: rows of half the length, of the whole, of half again."""
    shape = configs.config_of(catalog.find(case.model).config)
    how = {"precision": precision, "checkpointing": case.checkpointing, **(METHODS | VARIANTS)[case.method]}
    config = build({"model": case.model, "data": ["-"], **how})
    ordinary, largest = (
        steps.made_up(case.rows, length, shape.vocab_size, wanted=config.wanted)
        for length in (max(2, case.length // 2), case.length)
    )
    return plan.Work(config, shape, [[ordinary], [largest], [ordinary]])


# ---- a model with random weights ----


def build_model(config: RunConfig, shape: Any, where: torch.device) -> Any:
    """A random model with its method on it, as a run has it once it is loaded.

    Args:
        config: resolved.
        shape: the transformers config.
        where: the weights are made there, one tensor after the other.
    """
    method = methods.find(config.method)
    storage = config.storage_dtype if method.low_precision_base else config.trainable_dtype
    base = random_base(shape, config.precision, config.quant, storage, where)
    model = adapters.attach(base, config)
    prepare.checkpoint_blocks(model, families.of(base), config.checkpointing, config.offload)
    return model


def random_base(shape: Any, precision: str, quant: QuantOptions, storage: str, where: torch.device) -> Any:
    """The model that `load_model` would give, with random weights."""
    model = configs.without_weights(shape)
    fill(model, quant, DTYPES[precision if storage == "auto" else storage], where)
    model.initialize_weights()
    if quant.name != "none":
        setattr(model, "is_loaded_in_8bit" if quant.name == "int8" else "is_loaded_in_4bit", True)  # PEFT asks for it
        load._adopt(model, quant.name, precision, storage)
    return prepare.ready(model, precision)


def fill(model: CausalLM, quant: QuantOptions, dtype: torch.dtype, where: torch.device) -> None:
    """Give a model on meta its tensors, in the order of its modules: quantized layers random ones, the rest without
    values. Tensors that modules share stay one."""
    planned = set(quants.planned(model, quant))
    there = list(model.named_modules())
    made: dict[int, nn.Parameter] = {}
    for name, module in there:
        if name in planned:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, random_layer(module, quant, dtype, where))
            continue
        for key, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = empty(parameter, dtype, where)
                module._parameters[key] = made[id(parameter)]
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = torch.empty_like(buffer, device=where)


def empty(like: Tensor, dtype: torch.dtype, where: torch.device) -> nn.Parameter:
    """A frozen parameter of that shape."""
    return nn.Parameter(torch.empty_like(like, dtype=dtype, device=where), requires_grad=False)


def random_layer(layer: Any, quant: QuantOptions, dtype: torch.dtype, where: torch.device) -> nn.Module:
    """A quantized layer in the shape of a plain one on meta, made by the project's own quantizer."""
    inputs, outputs = sizes(layer)
    with patch.object(nn.Linear, "reset_parameters"):  # values that nobody will see
        made: Any = quants.find(quant.name).make(random_weight(outputs, inputs), quant, where)
    made.bias = None if layer.bias is None else nn.Parameter(torch.zeros_like(layer.bias, dtype=dtype, device=where))
    made.source_cls = type(layer)
    made._is_hf_initialized = True  # transformers is to leave it alone
    quantized: nn.Module = made
    return quantized


@cache
def _values() -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return (torch.randn(MIB, generator=draw) * SPREAD).to(torch.bfloat16)


def random_weight(outputs: int, inputs: int) -> Tensor:
    """(outputs, inputs) in main memory; the same numbers over and over, since only its size matters."""
    count = outputs * inputs
    return _values().repeat(-(-count // MIB))[:count].view(outputs, inputs)


# ---- one configuration, in a process of its own ----


def predict(work: plan.Work, where: device.Device, name: str) -> dict[str, Any]:
    """What the plan says, in bytes; the GPU is not touched. peak: the phase of it."""
    made = plan.plan(work, where, name=name)
    return {
        "allocated": made.allocated,
        "reserved": made.reserved,
        "smallest": made.smallest,
        "outside": sum(made.outside.values()),
        "needed": made.needed,
        "fits": made.fits,
        "peak": made.peak.phase,
        "how": made.how,
    }


def measure(work: plan.Work, card: Card, limit: int | None) -> tuple[dict[str, Any], str | None]:
    """Do the work on the GPU: what it took, in bytes, and why it died, or None.

    Args:
        work: what is done.
        card: the GPU.
        limit: the most bytes that torch's allocator may reserve.
    """
    touched = has_context()
    before = None if touched else driver_says(card.uuid)  # what is there already may be this process'
    torch.cuda.init()
    if limit is not None:
        whole = max(0, limit) + 512  # torch cuts a fraction of all bytes off to a whole number of them
        torch.cuda.set_per_process_memory_fraction(min(1.0, whole / card.total))
    where = devices.pick_device("cuda")
    died, began, seen = None, time.perf_counter(), Updates()
    try:
        with determinism.exact(where):
            determinism.strict(True)
            plan.go(build_model(work.config, work.model_config, where), work, seen, on_gpu=True)
        torch.cuda.synchronize()
        seen.check()
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        died = "out of memory"
    seconds = round(time.perf_counter() - began, 1)
    return {**taken(card, before), "seconds": seconds, "context_before_its_turn": touched}, died


class Updates(trace.Blind):
    """Sees nothing but the optimizer's states, which are not there where a loss was not finite."""

    states = 0

    def own(self, tensor: Tensor, category: str) -> None:
        """See Tracer."""
        self.states += category == storage.STATES

    def check(self) -> None:
        """Raises RuntimeError where nothing was ever updated."""
        if not self.states:
            raise RuntimeError("nothing was updated: the loss was not finite")


def has_context() -> bool | None:
    """Does this process hold a CUDA context already? None: this torch does not know."""
    ask = getattr(torch._C, "_cuda_hasPrimaryContext", None)
    return None if ask is None else bool(ask(0))


def out_of_memory(error: RuntimeError) -> bool:
    """Does an error say that the GPU's memory is used up?"""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "alloc_failed" in text


def taken(card: Card, before: int | None) -> dict[str, Any]:
    """What this process has taken of the GPU so far, in bytes.

    Args:
        card: the GPU.
        before: what the driver said of all processes before this one came; None: nobody knows.

    Returns:
        driver: what the GPU's memory is used for more than before, by nvidia-smi; where that is not there, all that is
        used of it. outside: of it what is not torch's allocator's.
    """
    free, total = torch.cuda.mem_get_info()
    after = driver_says(card.uuid)
    own = after - before if after is not None and before is not None else 0
    driver = own if own > 0 else total - free
    return {
        "max_allocated": torch.cuda.max_memory_allocated(),
        "max_reserved": torch.cuda.max_memory_reserved(),
        "driver": driver,
        "driver_by": "nvidia-smi, less what was used before" if own > 0 else "mem_get_info, all processes",
        "mem_get_info": total - free,
        "outside": max(0, driver - torch.cuda.memory_reserved()),
    }


def smi(uuid: str, field: str) -> str | None:
    """What nvidia-smi says of a GPU; None: it is not there, or says nothing."""
    command = ["nvidia-smi", "-i", uuid, f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return shown.splitlines()[0].strip() if shown else None


def driver_says(uuid: str) -> int | None:
    """Bytes of a GPU's memory that all processes use, by nvidia-smi."""
    shown = smi(uuid, "memory.used")
    return int(shown) * MIB if shown is not None and shown.isdecimal() else None


def judged(case: Case, predicted: Mapping[str, Any], measured: Mapping[str, Any], died: str | None) -> Row:
    """What came of a configuration: under a cap the driver's figure must stay below it too."""
    whole = measured["max_reserved"] + measured["outside"]
    if died is None and case.cap is not None and whole > case.cap:
        died = f"{(whole - case.cap) / MIB:,.0f} MiB above the limit by the driver's figure"
    return {"case": asdict(case), "name": case.name, "predicted": predicted, "measured": measured, "died": died}


def run_one(
    case: Case, card: Card, say: Callable[[Any], None], *, wait: bool, measure: Callable[..., Any] = measure
) -> None:
    """Say a plan, and measure.

    Args:
        case: the configuration.
        card: the GPU.
        say: is given the plan (where there is a turn to wait for), then all that was found.
        wait: stay away from the GPU until a line comes in that says GO.
        measure: does the work; another for a stand-in.
    """
    work = work_of(case, card.precision)
    predicted = predict(work, card.device(case.cap), case.model)
    row = {"case": asdict(case), "name": case.name, "predicted": predicted}
    if case.cap is None and not predicted["fits"]:
        short = predicted["needed"] - card.budget
        say({**row, "left_out": f"{short / MIB:,.0f} MiB more than this card has"})
        return
    if wait:
        say(row)
        if sys.stdin.readline().strip() != GO:
            return
    limit = None if case.cap is None else case.cap - predicted["outside"]
    say(judged(case, predicted, *measure(work, card, limit)))


def probe() -> Card:
    """This machine's GPU, looked at in a process of its own, so that no context of it stays."""
    found = device.here("cuda")
    uuid = str(torch.cuda.get_device_properties(0).uuid)
    total = torch.cuda.get_device_properties(0).total_memory  # of which torch takes a fraction
    return Card(
        found.name, f"GPU-{uuid.removeprefix('GPU-')}", total, found.budget or 0, "bf16" if found.bf16 else "fp16"
    )


def serve(text: str) -> None:
    """What a process of its own does: print one line of JSON (before it, where it waits for its turn, the plan's)."""
    job, out = json.loads(text), sys.stdout

    def say(value: Any) -> None:
        print(json.dumps(value), file=out, flush=True)

    with redirect_stdout(sys.stderr):  # libraries print too
        if job["do"] == "probe":
            say(asdict(probe()))
        elif job["do"] == "choose":
            say([asdict(case) for case in around(job["cap"], Card(**job["card"]), job["most"])])
        else:
            run_one(Case(**job["case"]), Card(**job["card"]), say, wait=job.get("wait", False))


# ---- configurations around a limit ----


def kinds(cap: int) -> list[Case]:
    """Configurations whose length is open, one of each method first, beginning with other methods at each limit; left
    out are those that hardly meet the limit with any length."""
    rows = itertools.cycle((1, 4, 2, 8, 3))
    axes = itertools.product(MODELS, METHODS, (False, True))
    every = [Case(model, method, checkpointing, next(rows), SHORT) for model, method, checkpointing in axes]
    found = [kind for kind in every if SHORT * kind.rows <= tokens_at(cap, kind) <= most_tokens(kind.rows, cap)]
    random.Random(cap // GIB).shuffle(found)
    names, before, order = list(METHODS), Counter[str](), {}
    for kind in found:
        first = 2 * CAPS.index(cap) if cap in CAPS else 0
        order[kind] = (before[kind.method], (names.index(kind.method) - first) % len(names))
        before[kind.method] += 1
    return sorted(found, key=order.__getitem__)


def most_tokens(rows: int, cap: float) -> int:
    """Of a micro-batch of so many rows, under a limit in bytes."""
    return min(MOST_TOKENS * (2 if cap > LARGE else 1), rows * LONGEST)


def tokens_at(cap: int, kind: Case) -> float:
    """About how many tokens a micro-batch has that meets a limit, by what blocks keep of each (memory/closed.py)."""
    entry = catalog.find(kind.model)
    shape = configs.config_of(entry.config)
    keys = shape.num_key_value_heads * shape.hidden_size // shape.num_attention_heads
    block = 4 * shape.hidden_size + 2 * keys + 3 * shape.intermediate_size
    blocks = 2 if kind.method == "freeze" else shape.num_hidden_layers
    kept = blocks * shape.hidden_size + block if kind.checkpointing else blocks * block
    tokens: float = (cap - device.CONTEXT - entry.parameters * WEIGHT_BYTES[kind.method]) / (2 * kept)
    return tokens


def around(cap: int, card: Card, most: int, aims: Sequence[tuple[float, float]] = AIMS) -> list[Case]:
    """Configurations whose plans lie around a limit; see `choose`."""

    @cache
    def needed(case: Case) -> int:
        size: int = predict(work_of(case, card.precision), card.device(), case.model)["needed"]
        return size

    return choose(cap, kinds(cap)[:TRIED], needed, most, aims)


def choose(
    cap: int,
    open_kinds: Sequence[Case],
    needed: Callable[[Case], int],
    most: int,
    aims: Sequence[tuple[float, float]] = AIMS,
) -> list[Case]:
    """Pairs of configurations: one that should just fit under a limit, and the same with longer rows that should not.

    Args:
        cap: the limit in bytes.
        open_kinds: what is tried, in this order; their length is changed.
        needed: the bytes that a plan says.
        most: how many configurations.
        aims: what is looked for, in limits: one below and one above, for each pair in turn.
    """
    found: list[Case] = []
    for kind in open_kinds:
        if len(found) + 2 > most:
            break
        below, above = (length_for(kind, aim * cap, needed) for aim in aims[len(found) // 2 % len(aims)])
        if below is None or above is None:
            continue
        if (1 - NEAR) * cap <= needed(below) <= cap < needed(above) <= (1 + NEAR) * cap:
            found += [replace(below, cap=cap), replace(above, cap=cap)]
    return found


def length_for(kind: Case, target: float, needed: Callable[[Case], int]) -> Case | None:
    """A configuration with the length of row at which it needs about so many bytes; None: there is none.

    What is needed grows nearly in a line with the length, so a line through two lengths is followed, and again.
    """
    one, other = replace(kind, length=SHORT), replace(kind, length=LONG)
    for _ in range(STEPS):
        slope = (needed(other) - needed(one)) / (other.length - one.length)
        if slope <= 0:
            return None
        length = round(one.length + (target - needed(one)) / slope)
        if not SHORT <= length <= most_tokens(kind.rows, target) // kind.rows:
            return None
        found = replace(kind, length=length)
        if abs(needed(found) / target - 1) <= CLOSE or length in (one.length, other.length):
            return found
        one, other = (found, other) if abs(one.length - length) > abs(other.length - length) else (one, found)
    return found


# ---- all of them ----


COMMAND = (sys.executable, str(Path(__file__).resolve()), "--one")


class Runs:
    """Every configuration in a process of its own: several make their plans side by side, one is on the GPU.

    Args:
        card: the GPU.
        on_row: is given each row as soon as it is known, one at a time.
        ends: when to begin nothing more, in seconds of time.monotonic(); None: never.
        command: what starts a process, before its job.
    """

    def __init__(
        self,
        card: Card,
        on_row: Callable[[Row], None],
        ends: float | None = None,
        command: Sequence[str] = COMMAND,
    ) -> None:
        self.card, self.on_row, self.ends, self.command = card, on_row, ends, command
        self.workers = max(1, min(6, (os.cpu_count() or 2) // 2))
        self.most = MOST
        self.problems: list[str] = []
        self._turn, self._reporting = threading.Lock(), threading.Lock()
        self._jobs: queue.PriorityQueue[tuple[int, int, Case | int]] = queue.PriorityQueue()
        self._numbers = itertools.count()

    def all(self, cases: Sequence[Case], caps: Sequence[int]) -> None:
        """Run the configurations, and those around the limits, which are looked for first and run before the rest."""
        for cap in caps:
            self._put(0, cap)
        for case in cases:
            self._put(2, case)
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self.workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _put(self, rank: int, job: Case | int) -> None:
        self._jobs.put((rank, next(self._numbers), job))

    def _work(self) -> None:
        with suppress(queue.Empty):
            while True:
                _, _, job = self._jobs.get_nowait()
                if isinstance(job, int):
                    for case in self.around(job):
                        self._put(1, case)
                    continue
                row = self.row(job)
                with self._reporting:
                    self.on_row(row)

    def _late(self) -> bool:
        return self.ends is not None and time.monotonic() > self.ends

    def around(self, cap: int) -> list[Case]:
        """The configurations around a limit; where there are none, `problems` says why."""
        limit = f"{cap / GIB:g} GiB"
        if self._late():
            self.problems.append(f"{limit}: {LATE}")
            return []
        found, why = ask({"do": "choose", "cap": cap, "card": asdict(self.card), "most": self.most}, self.command)
        if found is None or len(found) < self.most:
            self.problems.append(f"{limit}: {why or f'{len(found)} configurations found, not {self.most}'}")
        return [Case(**values) for values in found or []]

    def row(self, case: Case) -> Row:
        """What came of a configuration."""
        row: Row = {"case": asdict(case), "name": case.name}
        if self._late():
            return {**row, "left_out": LATE}
        job = {"do": "run", "case": asdict(case), "card": asdict(self.card), "wait": True}
        with child(job, self.command, self.workers) as (process, errors):
            assert process.stdout is not None
            first = parsed(process.stdout.readline())
            row |= first or {}
            if first is None or "left_out" in first:
                finished(process)
                return row if first is not None else {**row, "failed": last_line(errors)}
            with self._turn:
                late = self._late()
                last, ended = finished(process, "" if late else GO)
            if late:
                return {**row, "left_out": LATE}
            if last is None:
                return {**row, "failed": last_line(errors) if ended else f"no answer in {PATIENCE} s"}
            return {**row, **last}


@contextmanager
def child(job: Mapping[str, Any], command: Sequence[str], share: int = 1) -> Iterator[tuple[Any, IO[str]]]:
    """A process that does a job, and what it writes to standard error; torch's allocator has its default settings."""
    environment = {name: value for name, value in os.environ.items() if "_ALLOC_CONF" not in name}
    threads = str(max(1, (os.cpu_count() or 1) // share))
    environment |= {"OMP_NUM_THREADS": threads, "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,
        subprocess.Popen([*command, json.dumps(job)], stderr=errors, **pipes) as process,  # type: ignore[call-overload]
    ):
        try:
            yield process, errors
        finally:
            process.kill()  # where it has not ended by itself


def finished(process: Any, line: str = "") -> tuple[Any, bool]:
    """The last line of a process that is given a line, as JSON or None; False: it had to be stopped."""
    try:
        text, _ = process.communicate(f"{line}\n", timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return None, False
    lines = text.strip().splitlines()
    return (parsed(lines[-1]) if lines and process.returncode == 0 else None), True


def ask(job: Mapping[str, Any], command: Sequence[str] = COMMAND) -> tuple[Any, str]:
    """What a process that needs no turn answers, or None and why."""
    with child(job, command) as (process, errors):
        found, ended = finished(process)
        why = "" if found is not None else last_line(errors) if ended else f"no answer in {PATIENCE} s"
        return found, why


def parsed(line: str) -> Any:
    """A line of JSON; None: it is none."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def last_line(errors: IO[str]) -> str:
    """The last thing that a process said before it ended."""
    errors.seek(0)
    lines = [line.strip() for line in errors if line.strip()]
    return lines[-1][:300] if lines else "it ended without a word"


# ---- what is reported ----


def errors_of(row: Row) -> dict[str, float]:
    """How far each figure of a run that went through without a cap is off, as a share of what was measured."""
    if row["case"]["cap"] is not None or "measured" not in row or row["died"]:
        return {}
    predicted, found = row["predicted"], row["measured"]
    return {
        "allocated": predicted["allocated"] / found["max_allocated"] - 1,
        "reserved": predicted["reserved"] / found["max_reserved"] - 1,
        "driver": (predicted["reserved"] + predicted["outside"]) / found["driver"] - 1,
    }


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """The figures over all rows: errors, and how often what was said was wrong."""
    ran = [row for row in rows if "measured" in row]
    capped = [row for row in ran if row["case"]["cap"] is not None]
    return {
        "configurations": len(rows),
        "measured": len(ran),
        "errors": {name: spread([errors_of(row)[name] for row in ran if errors_of(row)])
                   for name in ("allocated", "reserved", "driver")},
        "said_fits": sum(row["predicted"]["fits"] for row in ran),
        "said_fits_and_died": [row["name"] for row in ran if row["predicted"]["fits"] and row["died"]],
        "around_limits": len(capped),
        "around_limits_said_fits": sum(row["predicted"]["fits"] for row in capped),
        "said_no_and_ran": [row["name"] for row in capped if not row["predicted"]["fits"] and not row["died"]],
        "failed": {row["name"]: row["failed"] for row in rows if "failed" in row},
        "left_out": {row["name"]: row["left_out"] for row in rows if "left_out" in row},
    }  # fmt: skip


def spread(found: Sequence[float]) -> dict[str, Any] | None:
    """Errors in short: the mean with its sign, and of their sizes median, 95th percentile and worst."""
    if not found:
        return None
    absolute = np.abs(found)
    return {
        "rows": len(found),
        "mean": float(np.mean(found)),
        "median_absolute": float(np.median(absolute)),
        "p95_absolute": float(np.quantile(absolute, 0.95)),
        "worst_absolute": float(absolute.max()),
    }


def line(row: Row) -> str:
    """A row in words."""
    why = row.get("left_out") or row.get("failed")
    if why:
        return f"{row['name']:<58} {'left out' if 'left_out' in row else 'FAILED'}: {why}"
    predicted, found = row["predicted"], row["measured"]
    if row["case"]["cap"] is not None:
        share = predicted["needed"] / row["case"]["cap"]
        text = f"said {'fits' if predicted['fits'] else 'no':<4} ({share:.1%} of the limit)"
        return f"{row['name']:<58} {text}: {'ran' if not row['died'] else 'died: ' + row['died']}"
    if row["died"]:
        return f"{row['name']:<58} DIED: {row['died']}"
    pairs = {
        "allocated": (predicted["allocated"], found["max_allocated"]),
        "reserved": (predicted["reserved"], found["max_reserved"]),
        "driver": (predicted["reserved"] + predicted["outside"], found["driver"]),
    }
    off = errors_of(row)
    text = "  ".join(f"{n} {a / MIB:>7,.0f} / {b / MIB:>7,.0f} {off[n]:>+7.2%}" for n, (a, b) in pairs.items())
    return f"{row['name']:<58} {text}"


def versions() -> dict[str, str | None]:
    """Of what the figures depend on."""
    found: dict[str, str | None] = {"python": sys.version.split()[0], "cuda": torch.version.cuda}
    for name in ("torch", "transformers", "peft", "bitsandbytes", "fitune"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


class Record:
    """Everything that was found, reported row by row and kept in a file that is whole at any time."""

    def __init__(self, card: Card, output: Path, *, quick: bool) -> None:
        self.output, self.rows = output, list[Row]()
        self.head = {
            "command": f"python benchmarks/memory_gpu.py{' --quick' if quick else ''}",
            "date": datetime.now(UTC).date().isoformat(),
            "device": {**asdict(card), "driver": smi(card.uuid, "driver_version")},
            "calibration": asdict(device.calibration(card.name)),
            "versions": versions(),
        }

    def add(self, row: Row) -> None:
        """One more row."""
        self.rows.append(row)
        print(line(row), file=sys.stderr, flush=True)
        self.write(finished=False)

    def write(self, *, finished: bool, problems: Sequence[str] = ()) -> dict[str, Any]:
        """Everything so far, into the file too. finished: nothing more comes. problems: limits not tried, and why."""
        rows = sorted(self.rows, key=lambda row: (row["case"]["cap"] or 0, row["name"]))
        result = {**self.head, "finished": finished, "summary": summary(rows), "limits": list(problems), "rows": rows}
        self.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.output, result)
        return result


def without_gpu(*, as_json: bool) -> str:
    """What is reported where there is no GPU."""
    limits = ", ".join(f"{cap / GIB:g}" for cap in CAPS)
    counts = [(len(matrix(quick=quick)), most * len(CAPS)) for quick, most in ((False, MOST), (True, MOST_QUICK))]
    text = (
        f"no CUDA GPU here: nothing was run. With one: {counts[0][0]} configurations and up to {counts[0][1]} more "
        f"around {limits} GiB ({counts[1][0]} and {counts[1][1]} with --quick)"
    )
    return json.dumps({"gpu": None, "configurations": counts[0][0], "why": text}) if as_json else text


def main() -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a third of it")
    parser.add_argument(
        "--budget-seconds", type=float, help="begin nothing more after so long; what is left is reported"
    )
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--json", action="store_true", help="print what is written")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    if args.one:
        serve(args.one)
        return 0
    if not torch.cuda.is_available():
        print(without_gpu(as_json=args.json))
        return 0
    return run_all(args)


def run_all(args: argparse.Namespace) -> int:
    """All of it on this machine's GPU: the exit code."""
    ends = None if args.budget_seconds is None else time.monotonic() + args.budget_seconds
    found, why = ask({"do": "probe"})
    if found is None:
        print(f"this machine's GPU cannot be used: {why}", file=sys.stderr)
        return 1
    card = Card(**found)
    record = Record(card, args.output, quick=args.quick)
    runs = Runs(card, record.add, ends)
    runs.most = MOST_QUICK if args.quick else MOST
    caps = [cap for cap in CAPS if cap <= card.budget]
    runs.problems += [f"{cap / GIB:g} GiB: this card has {card.budget / GIB:,.1f}" for cap in CAPS if cap not in caps]
    runs.all(matrix(quick=args.quick), caps)
    result = record.write(finished=True, problems=runs.problems)
    print(json.dumps(result if args.json else {**result["summary"], "limits": result["limits"]}, indent=1))
    return 1 if result["summary"]["said_fits_and_died"] or result["summary"]["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
