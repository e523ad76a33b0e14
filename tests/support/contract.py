"""What the contract of methods tries: variants, families, quantizers, and what is compared."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fitune.core.config import RunConfig, build
from fitune.core.records import Sample
from fitune.data.batches import flat
from fitune.engine.step import loss_sum
from fitune.models import methods
from fitune.models.load import load_model
from fitune.models.precision import DTYPES
from fitune.models.prepare import ready
from fitune.models.switches import SDPA, attention, computing
from support import tiny

# What is tried of each method: its settings. `peft:` types stand for all the others.
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "freeze": {"method": "freeze", "freeze": {"blocks": 1, "norm": True}},
    "freeze-tensors": {"method": "freeze", "freeze": {"tensors": 4}},
    "freeze-patterns": {"method": "freeze", "freeze": {"patterns": [r"\.1\..*(q_proj|query_key|c_attn|qkv_proj)"]}},
    "tail": {"method": "tail", "tail": {"blocks": 2}},
    "tail-interleaved": {"method": "tail", "tail": {"blocks": 2, "interleaved": True}},
    "tail-mlp": {"method": "tail", "tail": {"kind": "mlp"}},
    "bitfit": {"method": "bitfit"},
    "bitfit-add": {"method": "bitfit", "bitfit": {"add": True}},
    "prompt": {"method": "prompt", "prompt": {"tokens": 5}},
    "prompt-random": {"method": "prompt", "prompt": {"tokens": 5, "init": "random"}},
    "p-tuning": {"method": "p-tuning", "p_tuning": {"tokens": 5}},
    "p-tuning-lstm": {"method": "p-tuning", "p_tuning": {"tokens": 5, "encoder": "lstm", "width": 24}},
    "prefix": {"method": "prefix", "prefix": {"tokens": 5}},
    "prefix-projected": {"method": "prefix", "prefix": {"tokens": 5, "projection": True, "width": 24}},
    "houlsby": {"method": "adapter", "bottleneck": {"width": 8}},
    "pfeiffer": {"method": "adapter", "bottleneck": {"kind": "pfeiffer", "width": 8, "activation": "relu"}},
    "parallel": {"method": "adapter", "bottleneck": {"kind": "parallel", "width": 8, "activation": "silu"}},
    "lora": {"method": "lora", "lora": {"rank": 4}},
    "lora-all": {"method": "lora", "lora": {"rank": 4, "targets": "all-linear", "b_rate": 16, "rslora": True}},
    "lora-dora": {"method": "lora", "lora": {"rank": 4, "dora": True}},
    "lora-pissa": {"method": "lora", "lora": {"rank": 4, "init": "pissa"}},
    "ia3": {"method": "ia3"},
    "peft:LOHA": {"method": "peft:LOHA", "peft": {"r": 4}},
    "peft:VERA": {"method": "peft:VERA", "peft": {"r": 4}},
}  # fmt: skip


REFUSED = {
    ("bitfit", "llama"): "has no bias terms",
    ("bitfit", "llama-tied"): "has no bias terms",
    **{("bitfit", kind): "has no bias terms" for kind in ("phi3", "mistral", "qwen3", "gemma2", "gemma3", "olmo2")},
    ("parallel", "opt"): "this model's MLP is no module of its own",
    ("tail", "chatglm"): "the residual stream passes a norm",
    ("tail-interleaved", "chatglm"): "the residual stream passes a norm",
    ("peft:LOHA", "gpt2"): "PEFT does not take it",  # no Conv1D
}


KINDS = [*tiny.FAMILIES, "llama-tied", *tiny.MORE, *tiny.UNKNOWN]


QUICK = {
    ("bf16", "none"): ("llama", "bloom"),
    ("fp16", "none"): ("llama",),
    ("fp32", "int8"): ("llama", "gpt2"),
    ("fp32", "nf4"): ("llama", "bloom", "gpt2"),
    ("bf16", "nf4"): ("qwen2",),
}


IDS = torch.randint(5, 300, (1, 14), generator=torch.Generator().manual_seed(0))


def config_for(variant: str, precision: str = "fp32", **changes: Any) -> RunConfig:
    return build({"model": "m", "data": ["d"], "precision": precision, **VARIANTS[variant], **changes})


@cache
def folder_of(kind: str) -> Path:
    """The random model as a folder, once a process."""
    place = Path(tempfile.mkdtemp(prefix="fitune-contract-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    return tiny.save(kind, place / kind)


def make_base(kind: str, precision: str, method: methods.Method | None = None, quant: str = "none") -> Any:
    if quant != "none":
        return load_model(folder_of(kind), precision=precision, quant=quant)
    model = tiny.make_model(kind)
    if precision != "fp32":
        model = model.to(DTYPES[precision])
        if method is not None and not method.low_precision_base:
            model = model.float()
    return ready(model, precision)


def samples() -> list[Sample]:
    random = np.random.default_rng(3)
    made = []
    for length in (7, 1, 12, 5, 9):
        mask = np.arange(length) >= length // 2
        mask[0] = False
        made.append(Sample(random.integers(5, 300, length).astype(np.int32), mask))
    return made


def logits(model: Any) -> torch.Tensor:
    """Of the model's own forward, without what virtual tokens give."""
    model.eval()
    with torch.no_grad(), attention(model, SDPA), computing(model):
        return model(input_ids=IDS).logits[:, -IDS.shape[1] :].float()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Of one batch, in training mode, dropout the same every time."""
    model.train()
    torch.manual_seed(0)
    (loss_sum(model, flat(samples(), range(5))) / 9).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    return found


def apart(got: torch.Tensor, expected: torch.Tensor, precision: str) -> float:
    """How far logits are apart: in float32 the worst one, of the largest; in bf16, whose sums all round, as vectors."""
    if precision == "fp32":
        return float((got - expected).abs().max() / expected.abs().max())
    return float((got - expected).norm() / expected.norm())
