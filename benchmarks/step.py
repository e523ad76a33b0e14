"""CPU seconds of a training step, what is saved in it, and how near it comes to its matrix products alone.

    python benchmarks/step.py [--shape llama-46m qwen2-0.5b] [--precision fp32 bf16] [--json FILE]

LoRA on random weights in a published shape, real rows. Each way is measured in turn, A B C A B C, the same rows in the
same order; CPU seconds of this process, so that what others do on the machine counts little. The floor is every matrix
product of the step done once more alone, on tensors of the same shapes, those of the output head on 512 rows at once.
Ways: `now` as it is; each of the others takes one thing back to the plain way (see WAYS).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from fitune.core.config import RunConfig, build
from fitune.core.records import Batch
from fitune.data import pipeline, tokenizer
from fitune.data.batches import Loader
from fitune.engine import optim
from fitune.engine.step import training_step
from fitune.models import adapters
from fitune.models.determinism import exact
from fitune.models.parts import trainable
from fitune.models.precision import DTYPES
from fitune.models.prepare import ready

VOCABULARY = 151_936
SHAPES: dict[str, Any] = {
    "llama-46m": LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=912, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=4, tie_word_embeddings=True,
    ),
    "qwen2-0.5b": Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=True,
    ),
}  # fmt: skip
HEAD_ROWS = 512  # of the output head's product in the floor


# ---- the ways ----


def _plain_loss(
    head: nn.Module, hidden: Tensor, labels: Tensor, vocabulary: int, weights: Tensor | None = None, rows: int = 0
) -> Tensor:
    """The loss of 32 MiB of float32 logits at once, by autograd alone, gradients chunk by chunk."""
    rows = max(1, 2**25 // (4 * vocabulary))
    leaf, total = hidden.detach().requires_grad_(), hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, len(labels), rows):
        here = slice(start, start + rows)
        each = F.cross_entropy(head(leaf[here]).float(), labels[here], reduction="none")
        one = each.sum() if weights is None else (each * weights[here]).sum()
        one.backward()
        total += one.detach()
    found: Tensor = _Given.apply(hidden, total, leaf.grad)
    return found


class _Given(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, total: Tensor, grad: Tensor) -> Tensor:
        ctx.save_for_backward(grad)
        return total.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.saved_tensors[0] * grads[0], None, None


def _loss_by_autograd() -> AbstractContextManager[object]:
    return patch("fitune.engine.step.label_loss", _plain_loss)


WAYS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "now": nullcontext,
    "loss by autograd": _loss_by_autograd,
}


# ---- a step ----


def batches(data: str, folder: Path, rows: int, count: int) -> list[Batch]:
    """The first micro-batches of a run on real rows."""
    words = tokenizer.load(folder)
    config = build({"model": str(folder), "data": [data], "skip_bad": True})
    found = pipeline.read(config, pipeline.Target(folder, words, limit=4096, vocabulary=VOCABULARY))
    loader = Loader(found.samples, rows, 1, 0)
    return [batch for _, step in loader.steps(0, count) for batch in step]


def tuned(shape: str, config: RunConfig) -> Any:
    """A random model with its method on it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SHAPES[shape], dtype=DTYPES[config.precision])
    return adapters.attach(ready(model, config.precision), config).train()


def seconds(model: Any, some: Sequence[Batch], optimizer: torch.optim.Optimizer, way: str) -> tuple[float, float]:
    """CPU seconds of some steps, and the loss of the last one."""
    with exact(torch.device("cpu")), WAYS[way]():
        began = time.process_time()
        for batch in some:
            done = training_step(model, [batch], optimizer, 1.0)
        return time.process_time() - began, done.loss


# ---- the floor ----

Product = tuple[str, tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...], torch.dtype]


class Products(TorchDispatchMode):
    """Counts matrix products by their shapes and strides."""

    NAMES = ("aten::mm", "aten::addmm", "aten::addmm_")

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[Product] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in self.NAMES:
            one, other = args[-2:]
            self.seen[(func._schema.name, (one.shape, other.shape), (one.stride(), other.stride()), one.dtype)] += 1
        return func(*args, **(kwargs or {}))


def floor(seen: Counter[Product], vocabulary: int) -> tuple[float, float]:
    """CPU seconds of all products, each as fast as it goes alone, and their GFLOP."""
    total = work = 0.0
    for (_, shapes, strides, dtype), times in seen.items():
        (m, k), n = shapes[0], shapes[1][1]
        rows = HEAD_ROWS if vocabulary in (k, n) and vocabulary != m else m
        one = torch.ones(rows, k, dtype=dtype) if strides[0][1] == 1 else torch.ones(k, rows, dtype=dtype).t()
        other = torch.ones(k, n, dtype=dtype) if strides[1][1] == 1 else torch.ones(n, k, dtype=dtype).t()
        out = torch.empty(rows, n, dtype=dtype)
        torch.mm(one, other, out=out)
        repeats = max(1, int(1e9 / (2 * rows * k * n)))
        best = float("inf")
        for _ in range(3):
            began = time.process_time()
            for _ in range(repeats):
                torch.mm(one, other, out=out)
            best = min(best, (time.process_time() - began) / repeats)
        total += times * best * m / rows
        work += times * 2 * m * k * n / 1e9
    return total, work


def measure(shape: str, precision: str, args: argparse.Namespace) -> dict[str, Any]:
    """One table: for each way tokens per CPU second, and the share of the floor."""
    settings = {"model": "m", "data": ["d"], "precision": precision, "lora": {"rank": args.rank}}
    config = build(settings)
    some = batches(args.data, args.tokenizer, args.rows, args.steps)
    model = tuned(shape, config)
    optimizer = optim.make(trainable(model), config)
    optim.set_learning_rate(optimizer, 1e-4)
    tokens = sum(len(batch.ids) for batch in some)
    took: dict[str, list[float]] = {way: [] for way in args.ways}
    for way in args.ways:
        seconds(model, some[:1], optimizer, way)
    for _ in range(args.rounds):
        for way in args.ways:
            took[way].append(seconds(model, some, optimizer, way)[0])
    with Products() as products:
        seconds(model, some, optimizer, "now")
    least, work = floor(products.seen, VOCABULARY)
    found = {way: statistics.median(times) for way, times in took.items()}
    return {
        "shape": shape,
        "precision": precision,
        "tokens": tokens,
        "gflop": round(work, 1),
        "floor_seconds": round(least, 3),
        "ways": {
            way: {
                "seconds": [round(one, 3) for one in took[way]],
                "tokens_per_cpu_second": round(tokens / spent, 1),
                "of_floor": round(least / spent, 3),
                "times_now": round(spent / found["now"], 3),
            }
            for way, spent in found.items()
        },
    }


def main() -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data/alpaca_zh_demo.json")
    parser.add_argument("--tokenizer", type=Path, default=Path("../shared/tokenizers/qwen2"))
    parser.add_argument("--shape", nargs="+", default=["llama-46m"], choices=[*SHAPES])
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--ways", nargs="+", default=[*WAYS], choices=[*WAYS])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="in a round")
    parser.add_argument("--rows", type=int, default=8, help="of a step")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    tables = []
    for shape in args.shape:
        for precision in args.precision:
            tables.append(measure(shape, precision, args))
            show(tables[-1])
    if args.json:
        found = {"machine": machine(), "tables": tables}
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def show(table: dict[str, Any]) -> None:
    """Prints a table."""
    alone = f"{table['gflop']:,} GFLOP of products, {table['floor_seconds']:.2f} CPU seconds alone"
    print(f"{table['shape']}, {table['precision']}: {table['tokens']:,} tokens, {alone}")
    for way, row in table["ways"].items():
        shares = f"{row['of_floor']:.0%} of the floor, {row['times_now']:.2f} times now's time"
        print(f"  {way:>20}: {row['tokens_per_cpu_second']:>8,.1f} tokens a CPU second, {shares}", flush=True)


def machine() -> dict[str, Any]:
    """What it was measured on."""
    return {
        "processor": platform.processor() or platform.machine(),
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    sys.exit(main())
