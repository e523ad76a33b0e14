"""Predicts the published memory figures of other people's fine-tuning runs, and compares.

In: a table of runs (`--table FILE`): model config, PEFT configs, and the reserved memory that was measured on an
NVIDIA L40S by PEFT's method comparison. Out: for each run what the trace and the simulated allocator say, from the
config alone, and how far that is off.

    python benchmarks/memory_l40s.py --table FILE [--json] [--only NAME ...] [--longest N] [--fit]

The runs are a plain loop over transformers and PEFT, not fitune's: padded batches of 4, AdamW of torch (foreach),
cuBLAS' workspaces, weights in one block (transformers reserves one before it loads). Before the first step the method
is put on the model, with its decompositions and what it leaves in main memory. The order of the rows is not known, so a
short history stands for thousands of steps, as the script goes: buckets of twenty batches, the longest first, the cache
emptied after every tenth step. So: a batch of another bucket, an emptied cache, the longest batch, the next two of its
bucket, which are far shorter (80 rows of 210 tokens on average). Beside the history there is one number that the table
does not give, the tokens of the longest row: `--fit` finds it on the one run that is meant for that.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from peft import get_peft_model
from peft.optimizers import create_lorafa_optimizer
from transformers import AutoModelForCausalLM, LlamaConfig

from fitune.memory import plan
from fitune.memory.allocator import EMPTY_CACHE, Allocator, Event
from fitune.memory.cuda import Cuda
from fitune.memory.trace import Tracer
from fitune.models.kernels.target import Target
from peft_before import as_of, frozen_as_of

# an Ampere GPU or newer; no multiprocessors: a plain script does not ask for deterministic kernels, which take more
GPU = Target("cuda", (8, 0))

LONGEST = 684  # fitted on FITTED_ON alone, with --fit
FITTED_ON = "lora--llama-3.2-3B-rank32"
FITS = range(660, 700, 8)
HISTORY = (0.6, 0.0, 1.0, 0.6, 0.5)  # lengths in times of the longest; 0: the cache is emptied
WORKSPACE = 8_519_680  # of cuBLAS, once for the forward and once for the backward thread, before Hopper
ROWS = 4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# The table leaves out what its version of PEFT had set beside
BESIDE = {"OFT": {"oft_block_size": 0}}


def peft_config(values: Mapping[str, Any]) -> Any:
    """The config of a run's method, of what the installed PEFT knows of it."""
    kind = values["peft_type"]
    made = peft.PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    known = set(inspect.signature(made).parameters) - {"peft_type", "peft_version", "megatron_core"}
    # AdaLoRA's ranks at the end of a run are lists, and no setting; other methods' are numbers
    if any(isinstance(one, list) for one in (values.get("rank_pattern") or {}).values()):
        known -= {"rank_pattern"}
    given = {"task_type": "CAUSAL_LM", **values}
    given |= {name: value for name, value in BESIDE.get(kind, {}).items() if name not in values}
    return made(**{name: value for name, value in given.items() if name in known})


def build(row: Mapping[str, Any], shape: Mapping[str, Any]) -> tuple[Any, Tracer]:
    """The model of a run with its method, and what saw it being put on."""

    def make() -> Any:
        return AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=DTYPES[row.get("dtype") or "bfloat16"])

    started: tuple[Any, Tracer] = plan.start(make, lambda base: _with_method(base, row), GPU)
    model, tracer = started  # of transformers, with its own ways of switching things on
    if row.get("use_gc"):
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train(), tracer


def _with_method(base: Any, row: Mapping[str, Any]) -> Any:
    if not row["peft_config"]:
        return base
    how = {"autocast_adapter_dtype": bool(row.get("autocast_adapter_dtype", True))}
    made_with = (row.get("versions") or {}).get("peft-version")
    with as_of(made_with):
        model = get_peft_model(base, peft_config(row["peft_config"]), **how)
    frozen_as_of(model, made_with)
    return model


def optimizer_of(row: Mapping[str, Any], model: Any) -> torch.optim.Optimizer:
    """The optimizer that a run names; on a GPU torch's AdamW works on all tensors at once."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    name = row.get("optimizer") or "AdamW"
    made: torch.optim.Optimizer
    if name == "AdamW":
        return torch.optim.AdamW(parameters, lr=1e-4, foreach=True)
    if hasattr(torch.optim, name):
        made = getattr(torch.optim, name)(parameters, lr=1e-4)
        return made
    if name.lower().replace("_", "-") == "lora-fa":
        config = row["peft_config"]
        made = create_lorafa_optimizer(model, r=config["r"], lora_alpha=config["lora_alpha"], lr=1e-4)
        return made
    import bitsandbytes

    return getattr(bitsandbytes.optim, name)(parameters, lr=1e-4)  # type: ignore[no-any-return]


def batch(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of rows of about one length, as a bucket gives them."""
    mask = torch.ones(ROWS, length, dtype=torch.long)
    for number in range(1, ROWS):
        mask[number, length - 3 * number :] = 0
    return torch.full((ROWS, length), 5), mask


def traced(
    row: Mapping[str, Any], shape: Mapping[str, Any], lengths: Sequence[int]
) -> tuple[list[Event], tuple[int, int], int]:
    """Events of a run over batches of these lengths, the marks among them (see `reserved`), its trainable weights."""
    model, tracer = build(row, shape)
    loaded = next(at for at, phase, _ in tracer.course if phase == "start")
    begun = len(tracer.events)
    parameters = [p for p in model.parameters() if p.requires_grad]
    with tracer, Cuda(GPU):
        optimizer = optimizer_of(row, model)
        for step, length in enumerate(lengths):
            if length == 0:
                tracer.events.append((EMPTY_CACHE, 0))
                continue
            ids, mask = batch(length)
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bool(row.get("use_amp"))):
                output = model(
                    input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), use_cache=False
                )
                loss = output.loss  # `output` lives until the next batch has gone through: so does the loop's
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            if hasattr(getattr(model, "base_model", None), "update_and_allocate"):
                model.base_model.update_and_allocate(step + 1)
    tracer.close()
    return tracer.events, (loaded, begun), sum(p.numel() for p in parameters if p.requires_grad)


def reserved(events: Sequence[Event], marks: tuple[int, int]) -> tuple[int, int]:
    """The most bytes reserved and allocated.

    Args:
        events: of a whole run.
        marks: how many of them load the weights, and how many there are before the first step.
    """
    allocator = Allocator()
    loaded, begun = marks
    everything = sum(size for _, size in events[:loaded] if size > 0)
    allocator.allocate(-2, everything)  # transformers reserves room for all weights at once
    allocator.free(-2)
    for number, (key, size) in enumerate(events):
        if number == begun:
            allocator.allocate(-3, WORKSPACE)
            allocator.allocate(-4, WORKSPACE)
        if key == EMPTY_CACHE:
            allocator.empty_cache()
        elif size > 0:
            allocator.allocate(key, size)
        elif size < 0:
            allocator.free(key)
    return allocator.peak_reserved, allocator.peak_allocated


def predict(row: Mapping[str, Any], shape: Mapping[str, Any], longest: int) -> dict[str, Any]:
    """One row of the result; where it cannot be predicted, why."""
    began = time.perf_counter()
    result: dict[str, Any] = {"name": row["name"], "measured_bytes": row["measured"]["max_reserved_bytes"]}
    try:
        events, marks, trainable = traced(row, shape, [round(longest * times) for times in HISTORY])
    except Exception as error:
        return {
            **result,
            "predicted_bytes": None,
            "why": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
        }
    most, allocated = reserved(events, marks)
    return {
        **result,
        "predicted_bytes": most,
        "predicted_allocated_bytes": allocated,
        "error": most / result["measured_bytes"] - 1,
        "trainable": trainable,
        "trainable_published": row["measured"].get("trainable_params"),
        "seconds": round(time.perf_counter() - began, 1),
    }


def summary(rows: Sequence[Mapping[str, Any]], longest: int) -> dict[str, Any]:
    """The figures over all rows; errors are shares of what was measured."""
    errors = [abs(row["error"]) for row in rows if row["predicted_bytes"]]
    at: dict[str, Callable[[list[float]], Any]] = {
        "mean_error": np.mean,
        "median_error": np.median,
        "worst_error": np.max,
    }
    figures = {name: float(how(errors)) if errors else None for name, how in at.items()}
    figures["p95_error"] = float(np.quantile(errors, 0.95)) if errors else None
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    return {
        "rows": len(rows),
        "predicted": len(errors),
        **figures,
        "within_2.5_percent": sum(error <= 0.025 for error in errors),
        "longest_row": longest,
        "history": HISTORY,
        "versions": versions,
        "table": list(rows),
    }


def fit(rows: Sequence[Mapping[str, Any]], shape: Mapping[str, Any]) -> int:
    """The length of the longest row with which the one run meant for it comes out best."""
    row = next(row for row in rows if row["name"] == FITTED_ON)
    found = {length: predict(row, shape, length)["error"] for length in FITS}
    for length, error in found.items():
        print(f"{length}: {error:+.2%}", file=sys.stderr)
    return min(found, key=lambda length: abs(found[length]))


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--only", nargs="*", default=[], help="names of runs, or how they begin")
    parser.add_argument("--longest", type=int, default=LONGEST)
    parser.add_argument("--fit", action="store_true", help="find the longest row anew")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    table = json.loads(args.table.read_text(encoding="utf-8"))
    rows, shape = table["rows"], table["model_config"]
    longest = fit(rows, shape) if args.fit else args.longest
    chosen = [row for row in rows if not args.only or any(row["name"].startswith(name) for name in args.only)]
    done = []
    for row in chosen:
        done.append(predict(row, shape, longest))
        found = done[-1]
        if found["predicted_bytes"] is None:
            text = f"not predicted: {found['why']}"
        else:
            sizes = [found[name] / 2**20 for name in ("predicted_bytes", "measured_bytes")]
            text = f"{sizes[0]:>9,.0f} MiB predicted {sizes[1]:>9,.0f} measured  {found['error']:+.2%}"
        print(f"{row['name']:<58} {text}", file=sys.stderr, flush=True)
    result = {**summary(done, longest), "source": table.get("source"), "gpu": table.get("gpu")}
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        print({name: value for name, value in result.items() if name != "table"})


if __name__ == "__main__":
    main()
