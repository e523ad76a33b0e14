"""Operations of one training step on a CUDA GPU, counted without one: how many, and how they grow with the documents.

    python benchmarks/operations.py [--model llama-3.1-8b] [--tokens 4096] [--documents 1 8 64] [--quant none] [--json]

LoRA on all linear layers, rank 16, bf16; the step's own code goes over shadows (memory/trace.py), with the kernels that
a GPU of compute capability 8.0 takes; the second step is counted, which makes no optimizer states. `operations` are
those that compute something, each a launch or more; views take none. `copies` of the batch go from main memory to the
GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

from fitune.core import catalog
from fitune.core.config import build
from fitune.memory import plan, steps, trace
from fitune.memory.counted import shadows
from fitune.memory.cuda import Cuda
from fitune.models.configs import config_of
from fitune.models.kernels import placed
from fitune.models.kernels.target import AMPERE


class Counting(trace.Tracer):
    """A tracer that counts operations too, of the last step alone."""

    def __init__(self) -> None:
        super().__init__(AMPERE)
        self.operations: Counter[str] = Counter()

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """See Tracer."""
        if phase == "step":
            self.operations.clear()
        with super().during(phase):
            yield

    def _count(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any, *rest: Any) -> None:
        schema = func._schema
        view = any(one.alias_info is not None and not one.alias_info.is_write for one in schema.returns)
        if not view and self.phase in ("step", "update"):
            self.operations[schema.name] += 1
        super()._count(func, args, kwargs, out, *rest)


def count(name: str, tokens: int, documents: int, quant: str) -> dict[str, Any]:
    """Operations, copies and waits of a step with so many documents of the same length."""
    lora = {"rank": 16, "targets": "all-linear"}
    config = build({"model": name, "data": ["-"], "precision": "bf16", "quant": quant, "lora": lora})
    shape = config_of(catalog.find(name).config)
    batch = steps.made_up(documents, tokens // documents, shape.vocab_size)
    work = plan.Work(config, shape, [[batch], [batch]])
    model = plan.without_values(work)
    tracer, copies = Counting(), []
    shadows(model, tracer)
    pack = placed.pack

    def packed(parts: Any, *, pin: bool) -> torch.Tensor:
        copies.append(len(parts))
        return pack(parts, pin=pin)

    # as on a GPU: through the buffer that is copied in one
    with (
        patch.object(placed, "send", lambda parts, device: placed.views(packed(parts, pin=False), parts)),
        Cuda(AMPERE),
    ):
        plan.go(model, work, tracer, on_gpu=True)
    tracer.close()
    return {
        "documents": documents,
        "operations": tracer.operations.total(),
        "copies": len(copies) / len(work.steps),
        "most": dict(tracer.operations.most_common(8)),
    }


def main() -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--documents", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--quant", default="none", choices=["none", "int8", "nf4"])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = [count(args.model, args.tokens, documents, args.quant) for documents in args.documents]
    if args.json:
        print(json.dumps(rows))
        return 0
    for row in rows:
        most = ", ".join(f"{name.removeprefix('aten::')} {n:,}" for name, n in row["most"].items())
        print(
            f"{row['documents']:>3} documents: {row['operations']:,} operations "
            f"({row['operations'] / rows[0]['operations']:.2f}), {row['copies']:g} copy; {most}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
