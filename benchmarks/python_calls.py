"""Calls of Python in one training step, counted on a CPU: what a GPU waits for while its work is short.

    python benchmarks/python_calls.py [--blocks 32] [--width 64] [--targets all-linear] [--longest 12] [--json]

A random Llama of so many blocks with LoRA on all linear layers, float32, four documents of 16 tokens. The third step
is counted, by cProfile, so that what is prepared once is there. Calls depend on blocks and methods, not on widths; on
a GPU attention and norms are other functions. A generator's next value counts as a call. With 8 blocks: 16,882, and
35,921 as long as each step went through `named_parameters` twice.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fitune.core.config import build
from fitune.core.records import Sample
from fitune.data.batches import flat
from fitune.engine import optim
from fitune.engine.step_runner import StepRunner
from fitune.models import adapters, methods
from fitune.models.parts import trainable
from fitune.models.prepare import ready


def stepping(blocks: int, width: int, targets: str) -> Callable[[], object]:
    """Makes a step each time it is called."""
    shape = LlamaConfig(
        vocab_size=512, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=blocks,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    config = build({"model": "-", "data": ["-"], "precision": "fp32", "lora": {"rank": 4, "targets": targets}})
    model = adapters.attach(ready(LlamaForCausalLM(shape)), config).train()
    rates = lambda name: methods.find(config.method).rates(config, name)  # noqa: E731
    optimizer = optim.make(trainable(model), config=config, rates=rates)
    runner = StepRunner(model, "flat", 1.0, lambda _: None, lambda _: None)
    random = np.random.default_rng(0)
    rows = [Sample(random.integers(0, 512, 16).astype(np.int32), np.arange(16) > 7) for _ in range(4)]
    batches = [flat(rows, range(4))]
    return lambda: runner.step(batches, optimizer)


def counted(step: Callable[[], object], longest: int) -> dict[str, Any]:
    """Calls of a step, and the functions that are called most."""
    for _ in range(2):
        step()
    profile = cProfile.Profile()
    profile.runcall(step)
    found: Any = pstats.Stats(profile)
    most = sorted(((calls, place) for place, (_, calls, *_) in found.stats.items()), reverse=True)[:longest]
    names = {f"{file.rpartition('/')[2]}:{line} {name}": calls for calls, (file, line, name) in most}
    return {"calls": found.total_calls, "most": names}


def main() -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--targets", default="all-linear")
    parser.add_argument("--longest", type=int, default=12)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = counted(stepping(args.blocks, args.width, args.targets), args.longest)
    if args.json:
        print(json.dumps(found))
        return 0
    print(f"{found['calls']:,} calls in a step of {args.blocks} blocks")
    for name, calls in found["most"].items():
        print(f"{calls:>9,}  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
