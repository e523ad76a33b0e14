"""What is measured of a system while it trains, the same way for all: every driver of this folder imports it.

In: the settings that `benchmarks/against.py` wrote as JSON. Out: one JSON of results. A driver calls `ready` right
before the first optimizer step and `step` behind each; what lies between two calls is a step's time. A run that counts
(`settings["count"]`) is another process than the timed ones: torch's counter, the hooks on what is saved for the
backward pass and the hook on the embedding cost time.

Nothing of fitune here: this file runs in the environment of every system.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

VERSIONS = ("torch", "transformers", "peft", "accelerate", "trl", "llamafactory", "bitsandbytes", "datasets")


def settings() -> dict[str, Any]:
    """What the driver is to do: the JSON that its first argument names."""
    found: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    return found


class Meter:
    """Clocks and counters of one run.

    Args:
        settings: of the run; `began` is the time at which its command was given.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings
        self.before = 0.0
        self.marks: list[dict[str, float]] = []
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.counters: Counters | None = None

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Inside, work is counted, where this run is to count."""
        if not self.settings["count"]:
            yield
            return
        self.counters = Counters()
        with self.counters:
            yield

    def ready(self) -> None:
        """The first step is about to begin."""
        self.before = time.time() - self.settings["began"]
        if self.counters is not None:
            self.counters.know_parameters()
        self._mark()

    def step(self) -> None:
        """A step has ended."""
        self._mark()

    def loss(self, loss: float, norm: float) -> None:
        """Of a step: its loss per label, and the norm of its gradients before they were clipped."""
        self.losses.append(float(loss))
        self.norms.append(float(norm))

    def _mark(self) -> None:
        if self.settings["device"] != "cpu":
            import torch

            torch.cuda.synchronize()
        found = {"wall": time.perf_counter(), "cpu": time.process_time()}
        if self.counters is not None:
            found |= self.counters.mark()
        self.marks.append(found)

    def write(self, **more: object) -> None:
        """The results, as the JSON that the settings name."""
        found = {
            "before": self.before,
            "marks": self.marks,
            "losses": self.losses,
            "norms": self.norms,
            "resident_mib": resident_mib(),
            "cuda": None if self.settings["device"] == "cpu" else cuda_mib(),
            "versions": versions(),
            **more,
        }
        Path(self.settings["result"]).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def resident_mib() -> float:
    """The most memory that this process held, in MiB."""
    if sys.platform == "win32":
        import psutil  # accelerate needs it too

        return round(psutil.Process().memory_info().peak_wset / 2**20, 1)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


def cuda_mib() -> dict[str, float]:
    """The most that torch's allocator gave out, and the most that it held, in MiB."""
    import torch

    peaks = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    return {name: round(peak / 2**20, 1) for name, peak in peaks.items()}


def versions() -> dict[str, str]:
    """Of the packages that are installed beside the driver."""
    found = {}
    for name in VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


class Counters:
    """Operations, tokens that went through the embedding, and bytes saved for the backward pass."""

    def __init__(self) -> None:
        self.flops = operations()
        self.saved = Saved()
        self.processed = 0
        self.stack = ExitStack()

    def __enter__(self) -> Counters:
        import torch

        self.stack.enter_context(self.flops)
        self.stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self.saved.pack, self.saved.unpack))
        hook = torch.nn.modules.module.register_module_forward_pre_hook(self._see)
        self.stack.callback(hook.remove)
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def _see(self, module: Any, inputs: tuple[Any, ...]) -> None:
        """The embedding is the module that takes ids."""
        import torch

        if isinstance(module, torch.nn.Embedding) and inputs:
            self.processed += inputs[0].numel()

    def know_parameters(self) -> None:
        """What is a parameter is held anyway: saving it takes nothing."""
        import torch

        for one in gc.get_objects():
            if isinstance(one, torch.nn.Parameter) and not one.is_meta:
                with suppress(RuntimeError):  # its storage was given away
                    self.saved.held.add(one.untyped_storage().data_ptr())

    def mark(self) -> dict[str, float]:
        """What was counted up to now, and the most bytes that were saved since the last mark."""
        found: dict[str, float] = {
            "flops": self.flops.get_total_flops(),
            "processed": self.processed,
            "saved": self.saved.most,
        }
        self.saved.most = self.saved.now
        return found


def operations() -> Any:
    """torch's counter of operations, for code that calls `torch.autograd.grad` inside and attention on a CPU."""
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False, custom_mapping=attention_formulas())
    counter.mod_tracker = Nowhere()  # type: ignore[assignment]  # all that is asked of a tracker
    return counter


def flops_of(work: Callable[[], object]) -> int:
    """The operations that some work takes, by torch's counter."""
    counter = operations()
    with counter:
        work()
    return int(counter.get_total_flops())


class Nowhere:
    """In the place of the tracker of modules, which torch's counter needs for a count of each module, and which fails
    inside `torch.autograd.grad`: all that is counted belongs to the whole."""

    parents = ("Global",)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        return None


def attention_formulas() -> dict[Any, Any]:
    """torch's counter has no formula for attention on a CPU. A causal kernel leaves out the blocks above the diagonal,
    so half of the square counts; a masked one computes all of it. Before torch 2.13 its formulas refuse keys and values
    of fewer heads than the queries have, which kernels take: they are asked with as many heads."""
    import torch
    from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

    def forward(
        query: Any, key: Any, value: Any, dropout: float = 0.0, causal: bool = False, *rest: Any, **more: Any
    ) -> int:
        return int(sdpa_flop_count(query, *of_all_heads(query, key, value))) // (2 if causal else 1)

    def backward(
        grad: Any, query: Any, key: Any, value: Any, out: Any, log: Any, dropout: float, causal: bool, **more: Any
    ) -> int:
        return int(sdpa_backward_flop_count(grad, query, *of_all_heads(query, key, value))) // (2 if causal else 1)

    def asked(formula: Any, first: int, heads: int) -> Any:
        def count(*args: Any, **more: Any) -> int:
            many, (query, *others) = list(args), (args[at].shape for at in range(first, first + 3))
            for at, shape in enumerate(of_all_heads(query, *others, heads=heads), first + 1):
                many[at] = torch.empty(shape, device="meta")
            return int(formula(*many, **more))

        count._get_raw = True  # type: ignore[attr-defined]  # torch's mark of a formula that takes tensors
        return count

    aten = torch.ops.aten
    names = {packet: str(packet) for packet in flop_registry}
    return {
        **{
            packet: asked(
                flop_registry[packet],
                first=1 if name.endswith("_backward") else 0,
                heads=1 if "scaled_dot_product" in name else -2,
            )
            for packet, name in names.items()
            if name.startswith("aten.") and "attention" in name
        },
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }


def of_all_heads(query: Any, *others: Any, heads: int = 1) -> list[list[int]]:
    """Shapes of keys and values with as many heads as the queries have; heads: which dimension they are."""
    found = [list(shape) for shape in others]
    for shape in found:
        shape[heads] = query[heads]
    return found


class Saved:
    """Bytes of storages that wait for a backward pass. now, most: at this moment, and the most since the last mark.
    held: addresses of parameters, which take nothing."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self.held: set[int] = set()
        self.users: dict[int, int] = {}

    def pack(self, tensor: Any) -> Any:
        """A tensor is saved."""
        return Held(self, tensor)

    @staticmethod
    def unpack(held: Any) -> Any:
        """It is taken back."""
        return held.tensor

    def add(self, address: int, size: int) -> None:
        """One more saved tensor stands in the storage at that address."""
        self.users[address] = self.users.get(address, 0) + 1
        if self.users[address] == 1:
            self.now += size
            self.most = max(self.most, self.now)

    def drop(self, address: int, size: int) -> None:
        """One less."""
        self.users[address] -= 1
        if not self.users[address]:
            del self.users[address]
            self.now -= size


class Held:
    """A tensor that is saved, until the graph lets it go; its storage stays where it is for so long."""

    def __init__(self, saved: Saved, tensor: Any) -> None:
        self.saved, self.tensor, self.counts = saved, tensor, False
        storage = tensor.untyped_storage()
        self.address, self.size = storage.data_ptr(), storage.nbytes()
        self.counts = self.address != 0 and self.address not in saved.held
        if self.counts:
            saved.add(self.address, self.size)

    def __del__(self) -> None:
        if self.counts:
            self.saved.drop(self.address, self.size)


def hugging_face_callback(meter: Meter) -> Any:
    """A callback of transformers' Trainer that calls the meter, sets the learning rate of each step, and counts in
    `tokens` and `labels` what the model is given."""
    from transformers import TrainerCallback

    class Marks(TrainerCallback):  # type: ignore[misc]  # transformers has no types
        """on_step_begin comes before the forward pass, on_step_end behind the optimizer's step, on_log behind that."""

        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.labels: list[int] = []

        def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            """From here on the model's inputs are seen."""
            more["model"].register_forward_pre_hook(self._see, with_kwargs=True)

        def _see(self, model: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            mask = named.get("attention_mask")
            real = named["input_ids"].numel() if mask is None else int(mask.sum())
            self.tokens[-1] += real
            self.labels[-1] += int((named["labels"][:, 1:] >= 0).sum())

        def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            """Learning rates are those of the settings, whatever the Trainer's schedule says."""
            if state.global_step == 0:
                meter.ready()
            self.tokens.append(0)
            self.labels.append(0)
            for group in more["optimizer"].param_groups:
                group["lr"] = meter.settings["lr"][state.global_step]

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            """See `Meter.step`."""
            meter.step()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
            """See `Meter.loss`; the last line of a run is of all its steps, and has no norm."""
            if logs and "grad_norm" in logs:
                meter.loss(logs["loss"], logs["grad_norm"])

    return Marks()


def rows_of(settings: Mapping[str, Any]) -> list[list[dict[str, list[int]]]]:
    """The rows of each step, as ids and labels; what is not trained has the label -100."""
    found: list[list[dict[str, list[int]]]] = json.loads(Path(settings["rows"]).read_text(encoding="utf-8"))["steps"]
    return found[: settings["steps"]]


def counts(steps: list[list[dict[str, list[int]]]]) -> dict[str, list[int]]:
    """Real and label tokens of each step; a row's first token is never a label."""
    return {
        "tokens": [sum(len(row["ids"]) for row in rows) for rows in steps],
        "labels": [sum(label >= 0 for row in rows for label in row["labels"][1:]) for rows in steps],
    }
