"""Which dtype is for what: the frozen weights, the computation, what is trained. The one place where that is decided.

In: a config, a device. Out: the config with every choice made; of a loaded model what lies in which dtype, in bytes.
What is trained is float32 with its gradient and optimizer states unless asked otherwise; activations kept for the
backward pass are in the dtype of the computation.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fitune.core.config import RunConfig
from fitune.core.errors import ConfigError, RunFolderError
from fitune.core.files import write_atomic
from fitune.core.records import Finding, Kept
from fitune.core.units import MIB
from fitune.data.cache import default_folder
from fitune.models import quant, trial
from fitune.models.interfaces import CausalLM, causal_lm
from fitune.models.kernels.experts import Stack
from fitune.models.kernels.frozen import Frozen

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
FASTER = 1.5  # bf16 must be so many times faster than float32 on a CPU to be chosen there
STEP_FASTER = 1.2  # and a step as narrow as a small model's so many times
WIDE = 1024  # from this width on a step is its matrix products, and a trial of it takes long
RATES = "rates.json"  # where they are kept, in the cache
SLOWER = 0.5  # below this share of float32's rate a precision is worth a warning


def scaled(config: RunConfig) -> bool:
    """Does the loss need a scale: are there float16 activations, and gradients in float32 to take it off from?"""
    return config.precision == "fp16" and config.trainable_dtype != "fp16"


def describe(config: RunConfig) -> str:
    """The dtypes of a resolved config in one line."""
    storage = config.precision if config.storage_dtype == "auto" else config.storage_dtype
    options = config.quant
    kind = {"none": "", "int8": ", int8 linear layers"}.get(
        options.name, f", {options.kind} linear layers{', scales quantized too' if options.double else ''}"
    )
    return f"{config.precision}, frozen weights {storage}{kind}, trained {config.trainable_dtype}"


def resolve(config: RunConfig, device: torch.device, model_config: Any = None) -> RunConfig:
    """The config with a precision in place of auto.

    Args:
        config: the settings.
        device: where it computes.
        model_config: the model's transformers config; None: it is not known.

    Raises:
        ConfigError: the settings do not go together.
    """
    if config.precision == "auto":
        config = config.model_copy(update={"precision": choose(device, model_config)[0]})
    if config.trainable_dtype != "fp32" and config.trainable_dtype != config.precision:
        raise ConfigError(
            f"trainable_dtype {config.trainable_dtype} with precision {config.precision}",
            expected="fp32, or the precision of the computation",
            fix=f"--precision {config.trainable_dtype}, or --trainable-dtype fp32",
        )
    if config.precision == "fp16" and config.optimizer_in_backward:
        raise ConfigError(
            "optimizer_in_backward with precision fp16: an overflow is seen when some weights are updated already",
            fix="--precision bf16, or leave it out",
        )
    if config.storage_dtype == config.precision:
        config = config.model_copy(update={"storage_dtype": "auto"})
    return config


EMULATED = "is not computed by this GPU, only imitated, which is many times slower than fp16"


def choose(device: torch.device, model_config: Any = None) -> tuple[str, str]:
    """The precision for a device, and why.

    Args:
        device: where it computes.
        model_config: the transformers config of the model; None: any, by matrix products alone.
    """
    if device.type == "cuda":
        name, major = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)[0]
        if major >= 8:
            return "bf16", f"{name} computes bf16, which has float32's range"
        return "fp16", f"{name} has no bf16; fp16 with a loss scale"
    if device.type != "cpu":
        return "fp32", f"nothing is known about 16 bits on {device.type}"
    measured = rates(device)
    products = "a matrix product runs at {fp32:,.1f} GFLOP/s in fp32 on this CPU, {bf16:,.1f} in bf16".format(
        **measured
    )
    size = trial.widths(model_config)
    if measured["bf16"] < FASTER * measured["fp32"]:
        return "fp32", products
    if size is None or size.width >= WIDE:
        return "bf16", products
    step = step_rates(device, size)
    text = "a step {width} wide runs at {fp32:,.0f} tokens/s in fp32 on this CPU, {bf16:,.0f} in bf16"
    chosen = "bf16" if step["bf16"] >= STEP_FASTER * step["fp32"] else "fp32"
    return chosen, f"{text.format(width=size.width, **step)}; {products}"


def rates(device: torch.device) -> dict[str, float]:
    """GFLOP/s of a matrix product in each precision; measured once on a machine and kept, so that a choice made by
    them is the same in every run."""
    return _kept(machine(device), DTYPES, lambda: measure(device))


def imitated(device: torch.device, dtype: torch.dtype) -> bool:
    """Is this bfloat16 on a CPU that computes it many times more slowly than float32?"""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return False
    measured = rates(device)
    return measured["bf16"] < SLOWER * measured["fp32"]


def step_rates(device: torch.device, size: trial.Widths) -> dict[str, float]:
    """Tokens a second of a trial step of a model's sizes, in fp32 and bf16; kept likewise."""
    names = ("fp32", "bf16")
    key = f"{machine(device)}-trial-{size.name}"
    return _kept(key, names, lambda: {name: trial.tokens_per_second(size, DTYPES[name]) for name in names})


def _kept(key: str, names: Iterable[str], measured: Callable[[], dict[str, float]]) -> dict[str, float]:
    try:
        path = default_folder() / RATES
    except RunFolderError:  # nowhere to keep it
        return measured()
    known = _read(path)
    if set(known.get(key, {})) == set(names):
        return known[key]
    known[key] = measured()
    with suppress(OSError, RunFolderError):  # then it is measured again next time
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(known, indent=1))
    return known[key]


def machine(device: torch.device) -> str:
    """What rates belong to: hardware, torch, threads."""
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()}-{_cpu()}"
    return f"{hardware}-torch{torch.__version__}-{torch.get_num_threads()}"


def measure(device: torch.device) -> dict[str, float]:
    """GFLOP/s of a matrix product in each precision, now."""
    return {name: _rate(dtype, device) for name, dtype in DTYPES.items()}


def _cpu() -> str:
    return f"{platform.node()}-{torch.backends.cpu.get_cpu_capability()}"


def _read(path: Path) -> dict[str, dict[str, float]]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return {
            key: {name: float(rate) for name, rate in found.items()}
            for key, found in values.items()
            if set(found) <= set(DTYPES)
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _rate(dtype: torch.dtype, device: torch.device) -> float:
    """The best of some products; the size is what a slow precision does in a few hundredths of a second."""
    rows, inner = (4096, 4096) if device.type == "cuda" else (256, 512)
    a, b = torch.ones(rows, inner, dtype=dtype, device=device), torch.ones(inner, inner, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(6):
        began = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * rows * inner * inner / best / 1e9


def speed(config: RunConfig, device: torch.device, model_config: Any = None) -> Finding:
    """Warns of a precision that this machine computes much more slowly than float32; else reports why it was chosen."""
    chosen, why = choose(device, model_config)
    if chosen == config.precision:
        return Finding("precision", "ok", f"{chosen}: {why}")
    if chosen == "fp16" and config.precision == "bf16":
        return Finding("precision", "warn", f"bf16 {EMULATED}", "--precision auto")
    if device.type != "cpu" or config.precision == "fp32":
        return Finding("precision", "ok", f"{config.precision}; auto would take {chosen}: {why}")
    measured = rates(device)
    mine, plain = measured[config.precision], measured["fp32"]
    if config.precision == "bf16" and mine >= FASTER * plain:  # in products it is faster, in this model's step not
        return Finding("precision", "warn", f"bf16 gains nothing: {why}", "--precision auto")
    text = f"{config.precision} runs at {mine:,.1f} GFLOP/s here, fp32 at {plain:,.1f}"
    if mine < SLOWER * plain:
        fix = "--precision fp32 --storage-dtype bf16 (16-bit weights, computed in float32), or --precision auto"
        return Finding("precision", "warn", f"{text}: {plain / mine:,.0f} times slower", fix)
    return Finding("precision", "ok", text)


# ---- what lies in memory ----


UNQUANTIZED = {
    "output head": "never is",
    "linear layers": "quant.skip",
    "fused experts": "quant.skip, a folder that leaves them out, or a model whose own code computes with them",
    "routers": "no linear layers, and they choose",
}


def kept(model: CausalLM, stored: torch.dtype | None = None) -> list[Kept]:
    """What a model holds, by part and dtype; nothing is left out, a tensor that two modules share counts once.

    Args:
        model: with its method on it.
        stored: dtype of the base's files; what lies in another is called a cast.
    """
    head, quantized = causal_lm(model).get_output_embeddings(), quant.name_of(model)
    found: dict[tuple[str, str, str], list[int]] = {}
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            part, dtype, extra = _part(module, name, parameter, head), str(parameter.dtype).split(".")[1], 0
            note = ""
            if isinstance(module, Stack):
                part, dtype = "fused experts", quantized
                extra = sum(t.numel() * t.element_size() for t in quant.constants(module))
            elif quant.is_quantized(module) and name == "weight":
                state = getattr(parameter, "quant_state", None)
                dtype = quantized if state is None else state.quant_type
                extra = sum(t.numel() * t.element_size() for t in quant.constants(module))
            elif not parameter.requires_grad and stored is not None and parameter.dtype != stored:
                note = f"cast from {str(stored).split('.')[1]}"
            if (
                quantized != "none"
                and part in UNQUANTIZED
                and not (quant.is_quantized(module) or isinstance(module, Stack))
            ):
                note = f"not quantized: {UNQUANTIZED[part]}" + (f"; {note}" if note else "")
            figures = found.setdefault((part, dtype, note), [0, 0, 0])
            figures[0] += 1
            figures[1] += quant.numel(parameter)
            figures[2] += parameter.numel() * parameter.element_size() + extra
    return [
        Kept(part, dtype, tensors, weights, count, note)
        for (part, dtype, note), (tensors, weights, count) in found.items()
    ]


def _part(module: nn.Module, name: str, parameter: torch.Tensor, head: nn.Module | None) -> str:
    if parameter.requires_grad:
        return "trained"
    if isinstance(module, nn.Embedding):
        return "embeddings"
    if module is head:
        return "output head"
    if "norm" in type(module).__name__.lower():
        return "norms"
    if name.endswith("bias"):
        return "biases"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "convolutions"
    if parameter.ndim > 2:
        return "fused experts"
    if isinstance(module, (nn.Linear, Frozen, Conv1D)):
        return "linear layers"
    return "routers" if parameter.ndim == 2 else "other"


def weights_kept(model: CausalLM, stored: torch.dtype | None) -> Finding:
    """Reports every cast, and what stayed in 16 or 32 bits beside quantized weights, with bytes."""
    parts = kept(model, stored)
    text = "; ".join(f"{k.part} {k.dtype} {size(k.bytes)}{f' ({k.note})' if k.note else ''}" for k in parts)
    experts = [k for k in parts if k.part == "fused experts" and k.note.startswith("not quantized")]
    if experts:
        fix = "this quantizer takes linear layers only; plan for these bytes"
        return Finding("weights-kept", "warn", f"{size(sum(k.bytes for k in experts))} stay as they are: {text}", fix)
    return Finding("weights-kept", "ok", text)


def size(count: int) -> str:
    """Bytes as text."""
    return f"{count / MIB:,.1f} MiB" if count >= MIB else f"{count / 1024:,.1f} KiB"
