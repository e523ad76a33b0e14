"""What the contract of methods tries (variants, families, quantizers), the model of a case, and what is compared."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peft
import torch

from fitune.core.config import RunConfig, build
from fitune.core.records import Sample
from fitune.data.batches import flat
from fitune.engine import optim
from fitune.engine.step import loss_sum, training_step
from fitune.models import adapters, families, methods
from fitune.models.load import load_model
from fitune.models.methods import prefix
from fitune.models.parts import trainable
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
if tuple(int(number) for number in peft.__version__.split(".")[:2]) < prefix.MISPLACED:
    MISPLACED = product(("prefix", "prefix-projected"), ("gemma2", "gemma3"))
    REFUSED |= dict.fromkeys(MISPLACED, "puts a prefix into the wrong layers")


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


CLOSE = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 5e-3}  # of logits: two ways to the same


class Case(NamedTuple):
    """One method's variant on one kind of model."""

    variant: str
    kind: str
    precision: str
    quant: str

    def __str__(self) -> str:
        return f"{self.variant}-{self.kind}-{self.precision}" + (f"-{self.quant}" if self.quant != "none" else "")


class State:
    """The model of a case on its way: as the method attaches it, after two steps, saved and loaded.

    Each stage is made when it is first asked for. `start` after `trained` makes the model anew.
    """

    def __init__(self, case: Case, folder: Path | None = None) -> None:
        self.case, self.folder, self.close = case, folder, CLOSE[case.precision]
        self.config = config_for(case.variant, case.precision, quant=case.quant)
        self.method = methods.find(self.config.method)
        self.method.check(self.config)
        self._model: Any = None
        self._loaded: Any = None
        self._trained = False

    def start(self) -> Any:
        """The model with its method, before any step."""
        if self._model is None or self._trained:
            base = make_base(self.case.kind, self.case.precision, self.method, self.case.quant)
            self.family = families.of(base)
            self.before = logits(base)
            self.expected = self.method.expected(base, self.family, self.config)
            self._model, self._trained = adapters.attach(base, self.config), False
        return self._model

    def trained(self) -> Any:
        """The same after two steps; `tensors` holds what the parameters were before, `after` the logits."""
        if not self._trained:
            model = self.start()
            self.tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
            optimizer = optim.make(trainable(model), self.config, lambda name: self.method.rates(self.config, name))
            optim.set_learning_rate(optimizer, 1e-2)
            model.train()
            for _ in range(2):
                training_step(model, [flat(samples(), range(5))], optimizer, 1.0)
            self.after = logits(model)
            self._trained = True
        return self._model

    @property
    def saved(self) -> Path:
        """Where `loaded` saved it."""
        assert self.folder is not None
        return self.folder / "saved"

    def loaded(self) -> Any:
        """What was saved of the trained model, on a new base."""
        if self._loaded is None:
            adapters.save(self.trained(), self.saved)
            base = make_base(self.case.kind, self.case.precision, self.method, self.case.quant)
            self._loaded = ready(base, self.case.precision, self.saved)
        return self._loaded
