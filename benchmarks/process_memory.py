"""What a run's process takes on a CPU, beside its plan.

    python benchmarks/process_memory.py [--cases NAME ...] [--steps 40] [--small FOLDER] [--out FILE.json]

Each case is a `fitune.train` in a process of its own. Predicted is the plan of that run: what the process holds when
the plan is made (Python, torch, data), all tensors at the peak, and what kernels, threads and buffers add. Measured is
the peak of resident memory from the first rehearsal on, as the operating system counts it. The demo is the whole demo
but for its answers; the others are cut to some steps, all on rows of different lengths. `--small` names another small
model's folder, for cases on it (stories260K, for example). Processes begin with the settings of malloc that the
`fitune` command gives itself; with `--as-found`, with those of this environment, as in a Python process of one's own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fitune.core import processor
from resident_memory import rows

ALLOWED = 0.15
LORA = {"lora": {"targets": "all-linear"}}
WIDE = {"model": "33M", "batch_size": 8}
SMALL = {"model": "small", "batch_size": 8}
CASES: dict[str, dict[str, Any]] = {
    "demo": {"model": "demo"},
    "demo in bf16": {"model": "demo", "precision": "bf16", "max_steps": 100},
    "small, lora": {**SMALL, **LORA},
    "small, full": {**SMALL, "method": "full"},
    "small, nf4": {**SMALL, **LORA, "quant": "nf4"},
    "small, bf16": {**SMALL, **LORA, "precision": "bf16"},
    "33M, lora": {**WIDE, **LORA},
    "33M, lora, recomputed": {**WIDE, **LORA, "checkpointing": True},
    "33M, full": {**WIDE, "method": "full"},
    "33M, nf4": {**WIDE, **LORA, "quant": "nf4"},
    "33M, bf16": {**WIDE, **LORA, "precision": "bf16"},
}


def make_33m(folder: Path) -> None:
    """A random Llama of 33 million parameters with the bundled tokenizer. In a process of its own: what the model
    took while it was made would stay with the process that trains."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from fitune.commands.demo import bundled

    tokenizer = AutoTokenizer.from_pretrained(str(bundled() / "model"))
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=10,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=1024,
        pad_token_id=0,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(shape).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def run(name: str, steps: int, folder: Path, small: str | None) -> dict[str, Any]:
    """A case, in this process."""
    import fitune
    from fitune.commands import demo
    from fitune.commands.train import train
    from fitune.engine.checkpoint import RunFolder

    case = dict(CASES[name])
    output = str(folder / "run")
    if case["model"] == "demo":
        changes = {key: value for key, value in case.items() if key != "model"}
        done = train(demo.config(output, sample_prompts=0, **changes))
    else:
        data = folder / "rows.jsonl"
        rows(data, steps * case["batch_size"] + 40)
        model = folder / "33M" if case["model"] == "33M" else Path(small or demo.bundled() / "model")
        fixed = {"data": [str(data)], "max_steps": steps, "val_rows": 40, "sample_prompts": 0, "output": output}
        done = fitune.train(**{"precision": "fp32", **case, **fixed, "model": str(model)})
    plan = RunFolder(output).read("plan")
    return {
        "case": name,
        **{what: round(size / 2**20, 1) for what, size in plan["outside"].items()},
        "tensors": round(plan["allocated"] / 2**20, 1),
        "predicted": round(done.expected_memory_mib, 1),
        "measured": round(done.peak_memory_mib, 1),
        "off": round(done.expected_memory_mib / done.peak_memory_mib - 1, 4),
        "steps": done.steps,
    }


def in_its_own_process(name: str, steps: int, small: str | None, settings: Mapping[str, str]) -> dict[str, Any]:
    """The case's line. settings: environment variables beside those of this process."""
    with tempfile.TemporaryDirectory(prefix="fitune-process-") as folder:
        environment = {**os.environ, **settings, "FITUNE_CACHE": str(Path(folder) / "cache"), "HF_HUB_OFFLINE": "1"}
        if CASES[name]["model"] == "33M":
            make = [sys.executable, __file__, "--make", "--folder", str(Path(folder) / "33M")]
            subprocess.run(make, env=environment, check=True)
        command = [sys.executable, __file__, "--child", name, "--steps", str(steps), "--folder", folder]
        command += ["--small", small] if small else []
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def main() -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--small")
    parser.add_argument("--as-found", action="store_true", help="malloc as it is, not as `fitune` sets it")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", choices=list(CASES), help=argparse.SUPPRESS)
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        make_33m(args.folder)
        return 0
    if args.child:
        print(json.dumps(run(args.child, args.steps, args.folder, args.small)))
        return 0
    settings = {} if args.as_found else processor.heap_settings(os.environ, processor.glibc())
    found = []
    for name in args.cases:
        line = in_its_own_process(name, args.steps, args.small, settings)
        found.append(line)
        print("  ".join(f"{key} {value}" for key, value in line.items()), flush=True)
    if args.out:
        args.out.write_text(json.dumps(_record(args, found), indent=1) + "\n", encoding="utf-8")
    return int(any(abs(line["off"]) > ALLOWED for line in found))


def _record(args: argparse.Namespace, found: list[dict[str, Any]]) -> dict[str, Any]:
    import recorded

    small = f" --small {Path(args.small).name}" if args.small else ""
    small += " --as-found" if args.as_found else ""
    command = f"python benchmarks/process_memory.py --steps {args.steps}{small}"
    record = recorded.where(command, "torch", "transformers", "peft", "bitsandbytes")
    library = os.confstr("CS_GNU_LIBC_VERSION") if processor.glibc() else platform.system()
    record["machine"]["C library"] = library
    return {**record, "runs": found}


if __name__ == "__main__":
    sys.exit(main())
