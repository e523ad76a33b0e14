"""What recomputation costs as memory gets scarce: budgets between nothing and everything recomputed, in one run.

    python benchmarks/recompute.py [--rounds 7] [--budgets 6] [--out results/recompute.json] [--table]

A random Llama of 8 blocks (20M parameters), LoRA on all linear layers and full tuning, 8 rows of 160 tokens, on a CPU.
For each budget `--checkpointing auto` chooses the blocks, by a plan of the tensors alone. Planned is that plan;
allocated is what torch's profiler counts; operations are those of torch's counter; time is the CPU time of a step, over
that of a step with nothing recomputed in the same round: rounds go through all budgets one after the other, so that
what else the machine does meets all of them. Losses and gradients of all sets are compared bit for bit. `--table`
prints the rows of docs/memory.md from the file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import recorded
from fitune.core.blocks import AUTO, named, text
from fitune.core.config import RunConfig, build
from fitune.core.plan import Plan
from fitune.core.units import MIB
from fitune.engine.step import make_gradients
from fitune.memory import heap, plan, steps, trace
from fitune.memory.counted import count
from fitune.memory.device import Device
from fitune.memory.measure import most_allocated
from fitune.models import adapters, families
from fitune.models.interfaces import CausalLM, causal_lm
from fitune.models.prepare import checkpoint_blocks, ready

ROOT = Path(__file__).parents[1]
OUT = ROOT / "results" / "recompute.json"
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "lora": {"targets": "all-linear"}},
    "full": {"method": "full"},
}
ROWS, LENGTH, VOCABULARY = 8, 160, 2000


def shape(blocks: int) -> LlamaConfig:
    """Blocks whose activations outweigh their weights at this many tokens, as those of large models do."""
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=384, intermediate_size=1536, num_hidden_layers=blocks,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=1024,
    )  # fmt: skip


def work_of(method: str, blocks: int, length: int) -> plan.Work:
    """A step on one row, and one on all of them."""
    config = build({"model": "-", "data": ["-"], "precision": "fp32", "checkpointing": AUTO, **METHODS[method]})
    first, all_ = (steps.made_up(rows, length, VOCABULARY) for rows in (1, ROWS))
    return plan.Work(config, shape(blocks), [[first], [all_]])


def planned(work: plan.Work, budget: int | None) -> Plan:
    """The plan of the tensors, for a machine with so much memory."""
    with patch.object(heap, "beside", lambda events, course: {}):
        return plan.plan(work, Device("this machine", "cpu", budget), name="random", outside={})


def sets(work: plan.Work, budgets: int) -> list[tuple[int, Plan]]:
    """Budgets from all blocks to none, and their plans; of those with the same blocks the largest budget."""
    none = planned(work, None)
    least = planned(replace(work, config=work.config.model_copy(update={"checkpointing": True})), None)
    step = (none.needed - least.needed) / (budgets - 1)
    found: dict[tuple[int, ...], tuple[int, Plan]] = {}
    for number in range(budgets):
        budget = least.needed + round(number * step)
        made = planned(work, budget)
        found[tuple(made.recomputed)] = budget, made
    return list(found.values())


def model_of(config: RunConfig, blocks: int) -> CausalLM:
    """The model with its method, the same each time."""
    torch.manual_seed(0)
    model: CausalLM = adapters.attach(ready(LlamaForCausalLM(shape(blocks))), config)
    return model.train()


def recompute(model: CausalLM, made: Plan) -> None:
    """Let a model recompute the blocks of a plan."""
    checkpoint_blocks(model, families.of(causal_lm(model)), named(made.recomputed))


def allocated(work: plan.Work, made: Plan, blocks: int) -> int:
    """The most bytes that torch's profiler saw of the model and its steps."""
    model = model_of(work.config, blocks)
    recompute(model, made)
    there = count(model, trace.Tracer())
    return most_allocated(lambda: plan.go(model, work, trace.Blind()), there)


def step(model: CausalLM, work: plan.Work) -> tuple[float, list[torch.Tensor]]:
    """The loss and the gradients of the largest step."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    made = make_gradients(model, work.steps[-1], work.layout)
    return made.loss, [p.grad for p in model.parameters() if p.grad is not None]


def executed(model: CausalLM, work: plan.Work) -> int:
    """Operations of the largest step."""
    sys.path.append(str(ROOT / "benchmarks" / "systems"))  # drivers, each of which runs alone
    from meter import operations

    with operations() as counted:
        step(model, work)
    return int(counted.get_total_flops())


def timed(model: CausalLM, work: plan.Work) -> float:
    """Seconds of all cores that the largest step takes."""
    began = time.process_time()
    step(model, work)
    return time.process_time() - began


def measured(method: str, blocks: int, length: int, budgets: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each set of blocks, the most memory first."""
    work = work_of(method, blocks, length)
    found = sorted(sets(work, budgets), key=lambda one: -one[0])
    model = model_of(work.config, blocks)
    rows: list[dict[str, Any]] = []
    loss, gradients = 0.0, list[torch.Tensor]()
    for budget, made in found:
        recompute(model, made)
        one, arrived = step(model, work)
        if not rows:
            loss, gradients = one, [gradient.clone() for gradient in arrived]
        real, did = allocated(work, made, blocks), executed(model, work)
        rows.append({
            "budget_mib": round(budget / MIB, 1), "recomputed": made.recomputed, "blocks": blocks,
            "planned_mib": round(made.allocated / MIB, 1), "allocated_mib": round(real / MIB, 1),
            "off": round(made.allocated / real - 1, 5), "operations": did, "planned_work": round(1 + made.more_work, 4),
            "same_bits": one == loss and all(map(torch.equal, arrived, gradients)), "times": [],
        })  # fmt: skip
    for _ in range(rounds):
        spent = []
        for row, (_, made) in zip(rows, found, strict=True):
            recompute(model, made)
            spent.append(timed(model, work))
            row["times"].append(round(spent[-1] / spent[0], 4))
    for row in rows:
        row["work"] = round(row["operations"] / rows[0]["operations"], 4)
        row["time"] = round(statistics.median(row.pop("times")), 3)
    return rows


def lines(record: dict[str, Any]) -> list[str]:
    """The record as a Markdown table."""
    head = ["", "budget, MiB", "recomputed", "plan, MiB", "allocated, MiB", "operations", "planned", "time"]
    rows = [head, ["---"] * len(head)]
    for method, found in record["methods"].items():
        for row in found:
            which = text(row["recomputed"]) if row["recomputed"] else "none"
            sizes = [f"{row[what]:,.1f}" for what in ("planned_mib", "allocated_mib")]
            ratios = [f"{row[what]:.2f}" for what in ("work", "planned_work", "time")]
            rows.append([method, f"{row['budget_mib']:,.1f}", which, *sizes, *ratios])
    return [f"| {' | '.join(cells)} |" for cells in rows]


def problems(record: dict[str, Any]) -> list[str]:
    """What is not as it should be: bits, plans, and operations that do not fall as the budget grows."""
    found = []
    for method, rows in record["methods"].items():
        found += [f"{method} {row['recomputed']}: other bits" for row in rows if not row["same_bits"]]
        found += [
            f"{method} {row['recomputed']}: plan off by {row['off']:.2%}" for row in rows if abs(row["off"]) > 0.005
        ]
        work = [row["work"] for row in rows]  # the most memory first
        found += [f"{method}: operations {work}"] if work != sorted(set(work)) else []
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--budgets", type=int, default=6)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", action="store_true", help="print the table of the file, and measure nothing")
    given = parser.parse_args(arguments)
    if given.table:
        print("\n".join(lines(json.loads((given.out or OUT).read_text(encoding="utf-8")))))
        return 0
    command = f"python benchmarks/recompute.py --rounds {given.rounds} --budgets {given.budgets}"
    record = {
        **recorded.where(command, "torch", "transformers", "peft"),
        "methods": {
            name: measured(name, given.blocks, given.length, given.budgets, given.rounds) for name in given.methods
        },
    }  # fmt: skip
    return recorded.finish(record, lines(record), problems(record), given.out)


if __name__ == "__main__":
    sys.exit(main())
