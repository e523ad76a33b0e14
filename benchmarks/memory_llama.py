"""Llama-3.2-1B, LoRA of rank 8 on q and v, bf16, 2 rows of 1,024 tokens: a plain loop over transformers and PEFT,
by trace and by formula, and fitune's own step beside it; and what one plan of an 8B model costs.

    python benchmarks/memory_llama.py [--json]

Nothing is downloaded and no weight is read.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from fitune.core import catalog
from fitune.core.config import build
from fitune.memory import device, measure, plan, steps
from fitune.memory.counted import shadows
from fitune.memory.cuda import Cuda
from fitune.memory.trace import Building, Tracer
from fitune.models.configs import config_of
from fitune.models.kernels.target import Target

# an Ampere GPU or newer; no multiprocessors: a plain script does not ask for deterministic kernels, which take more
GPU = Target("cuda", (8, 0))

ROWS, LENGTH, RANK = 2, 1024, 8
MIB = 2**20


def plain_trace(checkpointing: bool) -> int:
    """Bytes allocated at the peak of a plain loop, two steps, on a GPU."""
    shape = config_of(catalog.find("llama-3.2-1b").config)
    with Building(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=RANK, target_modules=["q_proj", "v_proj"]))
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tracer = Tracer(GPU)
    shadows(model.train(), tracer)
    trained = [p for p in model.parameters() if p.requires_grad]
    ids = torch.ones(ROWS, LENGTH, dtype=torch.long)
    with tracer, Cuda(GPU):
        optimizer = torch.optim.AdamW(trained, lr=1e-4, foreach=True)
        for _ in range(2):
            optimizer.zero_grad()
            output = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False)
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            del output
    tracer.close()
    now = most = 0
    for _, size in tracer.events:
        now += size
        most = max(most, now)
    return most


def plain_formula(checkpointing: bool) -> int:
    """The same by hand: W, Q, K, M as in fitune/memory/closed.py; bf16 takes 2 bytes, a float32 copy 4.

    A block keeps, of each token: float32 copies of the inputs of both norms and their scales (2 x (4 W + 4)), float32
    copies of the inputs of q's and v's LoRA and what their first layers give (2 x (4 W + 4 r)), q, k, v and the output
    of attention in bf16 and its log-sum-exp in float32 (4 Q + 4 K + 4 heads), and of the MLP gate, act and up (6 M).
    The first block's input needs no gradient, so its first norm keeps nothing.
    """
    shape = config_of(catalog.find("llama-3.2-1b").config)
    width, inner, heads, layers = shape.hidden_size, shape.intermediate_size, shape.num_attention_heads, 16
    queries, keys = heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    norm = 4 * width + 4
    block = 2 * norm + 2 * (4 * width + 4 * RANK) + 4 * queries + 4 * keys + 4 * heads + 6 * inner
    rotary, last, loss = 2 * 2 * shape.head_dim, norm, 14 * shape.vocab_size
    numbers = 3 * 8  # ids, labels, and labels moved by one
    trained = RANK * layers * ((width + queries) + (width + keys))
    weights = 2 * catalog.find("llama-3.2-1b").parameters + 12 * trained  # what is trained, and Adam's two states
    if checkpointing:  # inputs of all blocks; at the loss no block is whole
        return int(weights + ROWS * LENGTH * (2 * width * layers + rotary + last + loss + numbers))
    return int(weights + ROWS * LENGTH * (layers * block - norm + rotary + last + loss + numbers))


def own(checkpointing: bool) -> plan.Plan:
    """fitune's plan for the same work."""
    shape = config_of(catalog.find("llama-3.2-1b").config)
    how = {"method": "lora", "lora": {"rank": RANK, "targets": ["q_proj", "v_proj"]}, "precision": "bf16"}
    config = build({"model": "llama-3.2-1b", "data": ["-"], "checkpointing": checkpointing, **how})
    batch = steps.made_up(ROWS, LENGTH, shape.vocab_size)
    work = plan.Work(config, shape, [[batch], [batch]])
    return plan.plan(work, device.find("rtx-4090"), name="llama-3.2-1b")


def eight_billion() -> dict[str, Any]:
    """Seconds of one plan of an 8B model after all imports, and the most memory that this process had."""
    shape = config_of(catalog.find("llama-3.1-8b").config)
    config = build({"model": "llama-3.1-8b", "data": ["-"], "method": "lora", "precision": "bf16", "quant": "nf4"})
    short, long = (steps.made_up(4, length, shape.vocab_size) for length in (160, 512))
    began = time.perf_counter()
    plan.plan(plan.Work(config, shape, [[short], [long]], long), device.find("24GB"), name="llama-3.1-8b")
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "process_mib": measure.peak_mib(torch.device("cpu"))}


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    found: dict[str, Any] = {}
    for name, checkpointing in (("plain", False), ("checkpointing", True)):
        mine = own(checkpointing)
        found[name] = {
            "plain_trace_mib": plain_trace(checkpointing) / MIB,
            "plain_formula_mib": plain_formula(checkpointing) / MIB,
            "fitune_mib": mine.peak.bytes / MIB,
            "fitune_reserved_mib": (mine.reserved or 0) / MIB,
        }
    found["plan_of_8b"] = eight_billion()
    found["versions"] = {m.__name__: m.__version__ for m in (torch, transformers, peft)}
    print(json.dumps(found, indent=1) if args.json else found)


if __name__ == "__main__":
    main()
