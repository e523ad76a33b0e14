"""What later epochs take where hidden states of frozen blocks are kept: in memory, on the disk, and nowhere.

    python benchmarks/frozen_cache.py [--rounds 3] [--blocks 16] [--out results/frozen_cache.json] [--table]

A random Llama of 16 blocks (40M parameters), 32 rows of 20 to 220 tokens in batches of 8, on a CPU. Methods that leave
most blocks frozen: freeze (the last 2), tail (2 new blocks behind the last), tail with an MLP. An epoch with nothing
kept, one from memory and one from the disk come one after the other, the same rows in the same order, so that what else
the machine does meets all of them: CPU seconds over those of the epoch with nothing kept, their median. Operations are
those of torch's counter, planned those that `fitune plan` names. Losses and gradients are compared bit for bit.
`--table` prints the rows of docs/memory.md from the file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import recorded
from fitune.core.config import build
from fitune.core.records import Batch, Sample
from fitune.core.units import MIB
from fitune.data.batches import flat
from fitune.engine.frozen_states import FrozenStates
from fitune.engine.state_store import InMemory, OnDisk
from fitune.engine.step import SFT, Answers, Objective, last_block_is_ready, make_gradients
from fitune.memory import frozen
from fitune.models import adapters
from fitune.models.interfaces import CausalLM
from fitune.models.prepare import ready

ROOT = Path(__file__).parents[1]
OUT = ROOT / "results" / "frozen_cache.json"
METHODS: dict[str, dict[str, Any]] = {
    "freeze": {"method": "freeze", "freeze": {"blocks": 2}},
    "tail": {"method": "tail", "tail": {"blocks": 2}},
    "tail, mlp": {"method": "tail", "tail": {"kind": "mlp"}},
}
ROWS, BATCH, VOCABULARY, SHORTEST, LONGEST = 32, 8, 2000, 20, 220


def shape(blocks: int) -> LlamaConfig:
    """Blocks that outweigh the head, as those of large models do."""
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=384, intermediate_size=1536, num_hidden_layers=blocks,
        num_attention_heads=6, num_key_value_heads=6, max_position_embeddings=1024,
    )  # fmt: skip


def batches(rows: int) -> list[Batch]:
    """Rows of many lengths, half of each with labels."""
    random = np.random.default_rng(0)
    lengths = random.integers(SHORTEST, LONGEST, rows)
    samples = [Sample(random.integers(0, VOCABULARY, n).astype(np.int32), np.arange(n) > n // 2) for n in lengths]
    return [flat(samples, range(start, min(start + BATCH, rows))) for start in range(0, rows, BATCH)]


def epoch(model: CausalLM, some: Sequence[Batch], objective: Objective) -> tuple[float, list[torch.Tensor]]:
    """CPU seconds of the gradients of some batches, and the losses and gradients."""
    model.zero_grad(set_to_none=True)
    began = time.process_time()
    totals = [make_gradients(model, [batch], "flat", objective=objective).total for batch in some]
    spent = time.process_time() - began
    return spent, [*totals, *(p.grad for p in model.parameters() if p.grad is not None)]


def executed(model: CausalLM, some: Sequence[Batch], objective: Objective) -> int:
    """Operations of an epoch."""
    sys.path.append(str(ROOT / "benchmarks" / "systems"))  # drivers, each of which runs alone
    from meter import operations

    with operations() as counted:
        epoch(model, some, objective)
    return int(counted.get_total_flops())


def measured(method: str, blocks: int, rows: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each place."""
    config = build({"model": "-", "data": ["-"], "precision": "fp32", **METHODS[method]})
    torch.manual_seed(0)
    model = adapters.attach(ready(LlamaForCausalLM(shape(blocks))), config).train()
    last_block_is_ready(model)  # tried here, so that the plan knows
    some = batches(rows)
    found = frozen.of_model(model, config, max(some, key=lambda batch: len(batch.ids)))
    lengths = np.concatenate([np.diff(batch.bounds) for batch in some])
    total = int(lengths.sum())
    with tempfile.TemporaryDirectory() as folder:
        kept = {
            "memory": FrozenStates(found.blocks, lengths, lambda width, dtype: InMemory(total, width, dtype)),
            "disk": FrozenStates(found.blocks, lengths, lambda width, dtype: OnDisk(Path(folder), width, dtype)),
        }
        places: dict[str, Objective] = {"off": SFT, **{name: Answers(states) for name, states in kept.items()}}
        for objective in places.values():  # the first epoch, and one whose first batch is computed both ways
            epoch(model, some, objective)
            epoch(model, some, objective)
        expected = [one.clone() for one in epoch(model, some, SFT)[1]]
        times: dict[str, list[float]] = {name: [] for name in places}
        same = dict.fromkeys(places, True)
        for _ in range(rounds):
            for name, objective in places.items():
                spent, figures = epoch(model, some, objective)
                times[name].append(spent)
                same[name] &= all(map(torch.equal, figures, expected))
        work = {name: executed(model, some, objective) for name, objective in places.items()}
        for states in kept.values():
            states.close()
    size = {"off": 0, "memory": total * found.each, "disk": total * found.each}
    return [
        {
            "kept": name, "blocks": found.blocks, "mib": round(size[name] / MIB, 1), "operations": work[name],
            "work": round(work[name] / work["off"], 4), "same_bits": same[name],
            "planned_work": 1.0 if name == "off" else round(found.later_work, 4),
            "time": round(statistics.median(a / b for a, b in zip(times[name], times["off"], strict=True)), 3),
        }
        for name in places
    ]  # fmt: skip


def lines(record: dict[str, Any]) -> list[str]:
    """The record as a Markdown table."""
    head = ["", "blocks that run once", "kept", "MiB", "operations", "planned", "time"]
    rows = [head, ["---"] * len(head)]
    for method, found in record["methods"].items():
        for row in found:
            ratios = [f"{row[what]:.2f}" for what in ("work", "planned_work", "time")]
            rows.append([method, f"{row['blocks']}", row["kept"], f"{row['mib']:,.1f}", *ratios])
    return [f"| {' | '.join(cells)} |" for cells in rows]


def problems(record: dict[str, Any]) -> list[str]:
    """What is not as it should be: bits, and operations beside the plan."""
    found = []
    for method, rows in record["methods"].items():
        found += [f"{method}, {row['kept']}: other bits" for row in rows if not row["same_bits"]]
        found += [
            f"{method}, {row['kept']}: {row['work']} of the operations, planned {row['planned_work']}"
            for row in rows
            if abs(row["work"] - row["planned_work"]) > 0.02
        ]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", action="store_true", help="print the table of the file, and measure nothing")
    given = parser.parse_args(arguments)
    if given.table:
        print("\n".join(lines(json.loads((given.out or OUT).read_text(encoding="utf-8")))))
        return 0
    command = f"python benchmarks/frozen_cache.py --rounds {given.rounds} --blocks {given.blocks}"
    record = {
        **recorded.where(command, "torch", "transformers"),
        "methods": {name: measured(name, given.blocks, given.rows, given.rounds) for name in METHODS},
    }  # fmt: skip
    return recorded.finish(record, lines(record), problems(record), given.out)


if __name__ == "__main__":
    sys.exit(main())
