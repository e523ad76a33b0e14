"""How fast packed weights become plain on a CPU, and what that makes of a LoRA step: NF4 and int8 beside bf16.

    python benchmarks/packed.py [--rounds 9] [--steps 3] [--out results/packed.json] [--table]

First the weights of one layer (4864 x 896): each way to its plain weight beside a copy of that weight. Bytes are those
that come out, for all ways alike; the ways take turns, the fastest of all rounds counts. `nf4` and `int8` are what a
run does; behind a comma stand other ways, which must give the same bits: NF4 by a table of 256 pairs in torch's own
operations; int8 some rows at a time, or in one operation. Then a step: LoRA on q and v of a random model of such
widths, 8 rows of 128 tokens, CPU seconds over those of plain bf16 weights in the same round, their median. `--table`
prints the rows of docs/performance.md from the file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import recorded
from fitune.core.config import build
from fitune.core.options import QuantOptions
from fitune.engine.step import make_gradients
from fitune.memory.steps import made_up
from fitune.models import adapters
from fitune.models.interfaces import CausalLM
from fitune.models.load import load_model
from fitune.models.quant import int8, nf4
from fitune.models.quant.absmax import HIGHEST

ROOT = Path(__file__).parents[1]
OUT = ROOT / "results" / "packed.json"
DTYPE = torch.bfloat16
OUTPUTS, INPUTS, BLOCKS, VOCABULARY, ROWS, LENGTH = 4864, 896, 4, 2000, 8, 128
CPU = torch.device("cpu")
KINDS = ("none", "nf4", "int8")
FASTER = 1.1  # a way must be so many times as fast to be worth a change


def fastest(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """CPU seconds of each way, which take turns; the least of all rounds."""
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):  # the first one warms up
        for name, way in ways.items():
            began = time.process_time()
            way()
            spent[name].append(time.process_time() - began)
    return {name: min(times[1:]) for name, times in spent.items()}


def looked_up(layer: Any, pairs: Tensor) -> Tensor:
    """NF4 by a table of the 256 pairs of values that a byte stands for, then the scales, block by block in place."""
    state = layer.weight.quant_state
    each = nf4.single_scales(state.absmax, state.state2.code, state.state2.absmax, state.offset, state.state2.blocksize)
    made = pairs.index_select(0, layer.weight.data.view(-1).int()).view(-1, state.blocksize)
    return made.mul_(each[:, None]).to(DTYPE).view(state.shape)


def in_pieces(layer: Any, rows: int = 128) -> Tensor:
    """int8, some rows at a time, so that the second pass finds them in the processor's cache."""
    scales = (layer.scales() / HIGHEST).to(DTYPE)[:, None]
    made = torch.empty(layer.weight.shape, dtype=DTYPE)
    for one, values, scale in zip(made.split(rows), layer.weight.data.split(rows), scales.split(rows), strict=True):
        one.copy_(values)
        one.mul_(scale)
    return made


def weights(outputs: int, inputs: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each way to a plain weight."""
    torch.manual_seed(0)
    plain = torch.randn(outputs, inputs) * 0.02
    four = nf4.QUANTIZER.make(plain, QuantOptions(name="nf4"), CPU)
    eight: Any = int8.QUANTIZER.make(plain, QuantOptions(name="int8"), CPU)
    code = four.weight.quant_state.code.float()
    pairs = torch.stack([code.repeat_interleave(16), code.repeat(16)], dim=1)
    source, there = plain.to(DTYPE), torch.empty(outputs, inputs, dtype=DTYPE)
    ways: dict[str, Callable[[], Tensor]] = {
        "copy": lambda: there.copy_(source),
        "nf4": lambda: four.plain_weight(DTYPE),
        "nf4, look-up": lambda: looked_up(four, pairs),
        "int8": lambda: eight.plain_weight(DTYPE),
        "int8, in pieces": lambda: in_pieces(eight),
        "int8, one operation": lambda: eight.weight.data * (eight.scales() / HIGHEST).to(DTYPE)[:, None],
    }
    spent = fastest(ways, rounds)
    same = {name: torch.equal(ways[name](), ways[name.partition(",")[0]]()) for name in ways}
    size = there.nbytes
    return [
        {
            "way": name, "gigabytes_per_second": round(size / spent[name] / 1e9, 2),
            "of_copy": round(spent["copy"] / spent[name], 3), "same_bits": same[name],
        }
        for name in ways
    ]  # fmt: skip


def models_of(blocks: int) -> dict[str, CausalLM]:
    """A random model with LoRA, loaded with plain and with packed weights as a run does."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=INPUTS, intermediate_size=OUTPUTS, num_hidden_layers=blocks,
        num_attention_heads=14, num_key_value_heads=2,
    )  # fmt: skip
    found: dict[str, CausalLM] = {}
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(shape).to(DTYPE).save_pretrained(folder)
        for kind in KINDS:
            config = build({"model": "-", "data": ["-"], "precision": "bf16", "quant": {"name": kind}})
            base = load_model(Path(folder), precision="bf16", device="cpu", quant=config.quant, storage="bf16")
            found[kind] = adapters.attach(base, config).train()
    return found


def steps(blocks: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each kind of weights: what a step takes beside one on plain weights."""
    batch, models = made_up(ROWS, LENGTH, VOCABULARY), models_of(blocks)
    times: dict[str, list[float]] = {kind: [] for kind in models}
    for _ in range(rounds + 1):
        for kind, model in models.items():
            began = time.process_time()
            make_gradients(model, [batch], "flat")
            times[kind].append(time.process_time() - began)
            model.zero_grad(set_to_none=True)
    ratios = {kind: [a / b for a, b in zip(some, times["none"], strict=True)][1:] for kind, some in times.items()}
    return [
        {"weights": "bf16" if kind == "none" else kind, "time": round(statistics.median(some), 3)}
        for kind, some in ratios.items()
    ]


def lines(record: Mapping[str, Any]) -> list[str]:
    """The record as two Markdown tables."""
    rows = [["to plain bf16", "GB/s", "of a copy", "same bits"], ["---"] * 4]
    for one in record["weights"]:
        same = "yes" if one["same_bits"] else "no"
        rows.append([one["way"], f"{one['gigabytes_per_second']:.1f}", f"{one['of_copy']:.2f}", same])
    second = [["LoRA step on", "time"], ["---"] * 2]
    second += [[one["weights"], f"{one['time']:.2f}"] for one in record["steps"]]
    return ["\n".join(f"| {' | '.join(cells)} |" for cells in some) for some in (rows, second)]


def problems(record: Mapping[str, Any]) -> list[str]:
    """Ways that give other bits than what a run does, or that a run should take because they are faster."""
    used = {one["way"]: one for one in record["weights"]}
    found = [f"{name}: other bits" for name, one in used.items() if not one["same_bits"]]
    for name, one in used.items():
        plain, rate = name.partition(",")[0], one["gigabytes_per_second"]
        if name != plain and rate > FASTER * used[plain]["gigabytes_per_second"]:
            found.append(f"{name} is faster than {plain}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    parser.add_argument("--outputs", type=int, default=OUTPUTS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", action="store_true", help="print the tables of the file, and measure nothing")
    given = parser.parse_args(arguments)
    if given.table:
        print("\n\n".join(lines(json.loads((given.out or OUT).read_text(encoding="utf-8")))))
        return 0
    capability = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    command = f"python benchmarks/packed.py --rounds {given.rounds} --steps {given.steps}"
    begun = recorded.where(command, "torch", "bitsandbytes", "transformers")
    begun["machine"] |= {"bf16": bool(capability.get("avx512_bf16")), "amx": bool(capability.get("amx_bf16"))}
    record = {
        **begun,
        "weights": weights(given.outputs, INPUTS, given.rounds),
        "steps": steps(given.blocks, given.steps),
    }
    print("\n\n".join(lines(record)))
    if given.out:
        given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
