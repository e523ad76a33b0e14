"""What this machine's GPU takes beside the tensors, measured by real steps of a small model.

In: nothing. Out: bytes of the CUDA context, with the kernels that a run loads, and of a workspace of cuBLAS, kept for
the GPU's name, so that plans for GPUs of that name count them.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fitune.core.config import build
from fitune.core.errors import ModelError
from fitune.memory import device as devices
from fitune.memory import plan, steps
from fitune.memory.trace import Blind
from fitune.models import adapters
from fitune.models.determinism import exact
from fitune.models.devices import pick_device
from fitune.models.prepare import ready

WIDTH, BLOCKS, VOCABULARY, TOKENS = 256, 2, 4096, 256


def calibrate(date: str) -> dict[str, Any]:
    """Measure this machine's GPU and keep it: {"gpu": name, "context": bytes, "workspace": bytes, ...}.

    Args:
        date: of today, kept beside.

    Raises:
        ModelError: there is no CUDA GPU here.
    """
    if not torch.cuda.is_available():
        raise ModelError(
            "no CUDA GPU here to calibrate",
            expected="a machine with one",
            fix=f"plans for other GPUs take defaults: {devices.CONTEXT >> 20} MiB of context, two workspaces of cuBLAS",
        )
    device = pick_device("cuda")
    workspace = _workspace(device)
    small_steps(device)
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    mine = devices.of_this_process(device.index or 0)
    context = (total - free if mine is None else mine) - torch.cuda.memory_reserved(device)
    found = devices.Calibration(max(0, context), workspace or devices.WORKSPACE, date)
    name = torch.cuda.get_device_name(device)
    return {"gpu": name, **asdict(found), "file": str(devices.keep_calibration(name, found))}


def _workspace(device: torch.device) -> int:
    """What a first matrix product allocates beside its result."""
    a = torch.ones(256, 256, device=device, dtype=torch.float16)
    before = torch.cuda.memory_allocated(device)
    product = a @ a
    return torch.cuda.memory_allocated(device) - before - product.numel() * product.element_size()


def small_steps(device: torch.device) -> None:
    """LoRA steps of a random model of a few blocks, an evaluation and an update, so that what they load is loaded."""
    precision = "bf16" if device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    config = build({"model": "none", "data": ["none"], "precision": precision, "lora": {"targets": "all-linear"}})
    model_config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with torch.device(device):
        base = LlamaForCausalLM(model_config)
    model = adapters.attach(ready(base, precision), config)
    batch = steps.made_up(4, TOKENS, VOCABULARY)
    with exact(device):
        work = plan.Work(config, model_config, [[batch], [batch]], batch)
        plan.go(model, work, Blind(), on_gpu=device.type == "cuda")
