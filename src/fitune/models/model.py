"""Model folders to models: reading, attaching a method, freezing. The one place where that happens.

In: a folder (or a hub id), a method. Out: a transformers model, wrapped by the method, with exactly the method's
parameters trainable. config.json is read in configs.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, GlmForCausalLM
from transformers.pytorch_utils import Conv1D

from fitune.core import catalog
from fitune.core.config import RunConfig
from fitune.core.errors import ModelError, did_you_mean
from fitune.core.files import expand, names_near
from fitune.core.options import QuantOptions, quant_options
from fitune.data.encode import Encoder
from fitune.data.templates import Template
from fitune.models import adapters, determinism, families, hub, weights
from fitune.models import quant as quants
from fitune.models.configs import is_original, quantized_as, read_config, read_config_file, shape_of, without_weights
from fitune.models.families import Family, original, towers
from fitune.models.kernels.attention import FLAT
from fitune.models.kernels.frozen import keep_stored
from fitune.models.kernels.gated import lean_mlps
from fitune.models.kernels.loss import chunk_rows
from fitune.models.kernels.norm import replace_norms
from fitune.models.kernels.target import of
from fitune.models.precision import DTYPES


@dataclass
class Tuned:
    """A model with all that is needed to talk to it."""

    model: Any
    tokenizer: Any
    template: Template
    encoder: Encoder
    family: Family

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.model.parameters()).device  # type: ignore[no-any-return]


def locate(model: str, only: Sequence[str] = ()) -> Path:
    """The folder of a model: a local one, or one fetched from a hub by its id, or by its name in the catalog.

    Args:
        model: a folder, `org/name`, `ms:org/name`, or a name such as llama-3.2-1b.
        only: of a hub's model these files alone.

    Raises:
        ModelError: neither is there.
    """
    folder = expand(model)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ModelError(f"{model}: is a file", expected="a model folder with config.json and *.safetensors")
    entry = catalog.get(model)
    if entry is None and hub.parse(model) is None:
        raise ModelError(
            f"{model}: no such folder",
            expected="a model folder, a hub id such as Qwen/Qwen2.5-0.5B, or a name of the catalog",
            fix=f"{names_near(model, folders=True)}; {did_you_mean(model.lower(), catalog.entries())}",
        )
    return Path(hub.download(entry.id if entry is not None else model, only=only).folder)


def load_model(
    folder: str | Path,
    *,
    precision: str = "fp32",
    adapter: str | Path | None = None,
    device: str = "cpu",
    quant: QuantOptions | str = quants.PLAIN,
    storage: str = "auto",
    plain: bool = False,
) -> Any:
    """A model from a folder, for inference.

    Args:
        folder: a transformers model folder, or a hub id.
        precision: fp32, bf16 or fp16, of its weights and of what is computed.
        adapter: an adapter folder to put on it, PEFT's or fitune's.
        device: where it computes.
        quant: how its linear layers are quantized while they are read, one at a time: int8, nf4, fp4, or all the
            settings. A folder that holds a quantized model stays as it is.
        storage: dtype of its weights, where it is to differ from the precision.
        plain: make quantized layers plain again, with the values that they stand for.

    Returns:
        A transformers model (with PEFT's adapter: a PeftModel) in eval mode; takes input_ids, gives `.logits`,
        generates.

    Raises:
        ModelError: the folder or the adapter cannot be used.
    """
    if precision not in DTYPES:
        raise ModelError(f"precision {precision!r}", expected=", ".join(DTYPES))
    path = locate(str(folder))
    config = read_config(path)
    weights.check(path)
    if wrong := weights.broken(path):
        raise ModelError(f"{path}: {'; '.join(wrong[:5])}", fix="download the model again")
    options = quantized_as(config)
    how: dict[str, Any] = {"dtype": DTYPES[precision if storage == "auto" else storage]}
    wanted = quant_options(quant) if isinstance(quant, str) else quant
    if options.name == "none" and wanted.name != "none":
        options = wanted
        how["quantization_config"] = _quantizing(config, options, precision)
    if options.name != "none":
        quants.find(options.name)  # says so where bitsandbytes is missing
        # the values must not depend on the precision of the run: a merge, in float32, must find the same ones
        how["dtype"], how["device_map"] = weights.stored_dtype(path), {"": device}
    elif torch.device(device).type == "cuda":
        how["device_map"] = {"": device}  # each tensor goes there as it is read: main memory never holds the model
    try:
        model, info = _read(path, config, how)
    except Exception as error:  # safetensors, shapes, memory: each is told as it is
        raise ModelError(f"{path}: cannot be loaded", received=" ".join(str(error).split())[:400]) from error
    load_strict(path, info)
    model.fitune_tower = towers.of(path)
    if options.name == "none":
        model = model.to(device)
    else:
        _adopt(model, options.name, precision, storage)
    if plain:
        quants.dequantize(model, DTYPES[precision])
        quants.forget(model)
    return ready(model, precision, adapter)


def outline(config: Any, *, precision: str, quant: QuantOptions = quants.PLAIN, storage: str = "auto") -> Any:
    """The model that `load_model` would give, on meta: every shape and dtype, and no values.

    Args:
        config: the transformers config.
        precision, quant, storage: as for `load_model`.
    """
    model = without_weights(config)
    options = quantized_as(config)
    options = options if options.name != "none" else quant
    if options.name != "none":
        quants.empty(model, options)
        _adopt(model, options.name, precision, storage)
    else:
        kept = DTYPES[precision if storage == "auto" else storage]
        for parameter in model.parameters():
            parameter.data = parameter.data.to(kept)
    return ready(model, precision)


def _read(path: Path, config: Any, how: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """transformers' model, and what it says of missing and left-over tensors."""
    how = {**how, "config": config, "output_loading_info": True}
    if is_original(path):
        # tensors are mapped, not read: each is copied, and quantized, when its turn comes
        found: tuple[Any, dict[str, Any]] = GlmForCausalLM.from_pretrained(
            None, state_dict=dict(original.tensors(weights.tensors(path), config)), **how
        )
        return found
    tower = towers.of(path)
    if tower is not None or weights.is_bin(path):
        kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        there = weights.tensors(path)
        state = dict(there if tower is None else towers.tensors(there))
        unpacked: tuple[Any, dict[str, Any]] = kind.from_pretrained(None, state_dict=state, **how)
        return unpacked
    loaded: tuple[Any, dict[str, Any]] = AutoModelForCausalLM.from_pretrained(
        str(path), trust_remote_code=False, use_safetensors=True, local_files_only=True, **how
    )
    return loaded


def _quantizing(config: Any, options: QuantOptions, precision: str) -> Any:
    """What transformers' loader is told; the head, tied or not, stays as it is."""
    shape = without_weights(config)
    layers = set(quants.planned(shape, options))
    linear = {name for name, module in shape.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    return quants.find(options.name).settings(options, DTYPES[precision], sorted(linear - layers))


def _adopt(model: Any, name: str, precision: str, storage: str) -> None:
    """One path for the quantized layers, and the run's dtype for everything else, one tensor after the other."""
    quants.adopt(model, name, DTYPES[precision])
    kept = DTYPES[precision if storage == "auto" else storage]
    packed = {id(layer.weight) for _, layer in quants.layers(model)}
    for parameter in model.parameters():
        if id(parameter) not in packed and parameter.is_floating_point():
            parameter.data = parameter.data.to(kept)


# buffers that older versions of transformers wrote, and that every model computes by itself
HARMLESS = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias", "attention.bias", "attention.masked_bias")


def load_strict(path: Path, info: Mapping[str, Any]) -> None:
    """Every tensor of the model is in the weights, in its shape, and every tensor of the weights has its place.

    Raises:
        ModelError: some would be random, or would be thrown away.
    """
    missing, left = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing:
        raise ModelError(
            f"{path}: {len(missing)} tensors are not in the weights (they would be random)",
            received=", ".join(missing[:5]),
        )
    left = [name for name in left if not name.endswith(HARMLESS)]
    if left or info.get("mismatched_keys"):
        wrong = left or [str(one) for one in info["mismatched_keys"]]
        raise ModelError(
            f"{path}: {len(wrong)} tensors of the weights have no place in the model that config.json describes",
            received=", ".join(map(str, wrong[:5])),
            fix="config.json and the weights belong to different models: download both again",
        )


def ready(model: Any, precision: str = "fp32", adapter: str | Path | None = None) -> Any:
    """A transformers model made fit for flat batches and for its precision, with an adapter if there is one.

    Raises:
        ModelError: the adapter cannot be used.
    """
    model.fitune_compute = compute = DTYPES[precision]
    if compute == torch.float32:
        keep_stored(model, compute)
    else:
        replace_norms(model, compute)
    lean_mlps(model)
    if model.config.model_type in families.TABLE:
        families.TABLE[model.config.model_type].make_flat(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if adapter is not None:
        with suppress(ModelError):  # whoever needs it will be told
            families.of(model)
        model = adapters.put(model, Path(adapter))
    return model.eval()


def trainable(model: Any) -> dict[str, torch.nn.Parameter]:
    """The trainable parameters by name, in the model's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def causal_lm(model: Any) -> Any:
    """The transformers model inside a method's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class ScaledHead(nn.Module):
    """An output head with what some models do to its scores: a factor (Granite, Cohere), a soft cap (Gemma 2)."""

    def __init__(self, head: nn.Module, factor: float, cap: float | None) -> None:
        super().__init__()
        self.head, self.factor, self.cap = head, factor, cap

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., W) to (..., V)."""
        scores: Tensor = self.head(hidden) * self.factor
        return scores if self.cap is None else torch.tanh(scores / self.cap) * self.cap


def output_head(model: Any) -> nn.Module:
    """From last hidden states to the logits that the model's own forward gives."""
    inner = causal_lm(model)
    head: nn.Module = inner.get_output_embeddings()
    config = inner.config
    factor = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return head if factor == 1.0 and cap is None else ScaledHead(head, factor, cap)


def loss_rows(model: Any) -> int:
    """Of how many label rows its losses compute the logits at once: as the run has it (`set_loss_rows`), or as the
    vocabulary and the device suggest."""
    inner = causal_lm(model)
    suggested = chunk_rows(inner.config.vocab_size, of(next(inner.parameters()).device))
    return getattr(inner, "fitune_loss_rows", None) or suggested


def set_loss_rows(model: Any, config: RunConfig) -> None:
    """Fix that number for a run; auto leaves it open."""
    causal_lm(model).fitune_loss_rows = None if config.loss_rows == "auto" else config.loss_rows


def compute_dtype(model: Any) -> torch.dtype:
    """What the layers of a model compute in; of a model that was not loaded here, float32."""
    return getattr(causal_lm(model), "fitune_compute", torch.float32)  # type: ignore[no-any-return]


@contextmanager
def computing(model: Any) -> Iterator[None]:
    """Inside, layers compute in the model's precision, whatever their weights are kept in."""
    dtype, device = compute_dtype(model), next(model.parameters()).device
    with determinism.kernels(device), nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype):
        yield


def use_attention(model: Any, name: str, bounds: Tensor | None = None, prefix: Any = None) -> None:
    """Switch the attention: FLAT for flat batches, sdpa for generation. Read back, since some models only warn.

    Args:
        model: any.
        name: FLAT or sdpa; a model whose scores SDPA cannot compute takes transformers' own way.
        bounds, prefix: for models whose blocks hand no keywords through (BLOOM).
    """
    inner = causal_lm(model)
    if hasattr(inner, "flat_state"):
        inner.flat_state.bounds, inner.flat_state.prefix = bounds, prefix
        inner.config._attn_implementation = FLAT if name == FLAT else "eager"
        return
    if name == "sdpa" and not getattr(type(inner), "_supports_sdpa", True):
        name = "eager"
    if inner.config._attn_implementation != name:
        inner.set_attn_implementation(name)
        if inner.config._attn_implementation != name:
            raise ModelError(
                f"{type(inner).__name__}: its attention cannot be replaced", expected=f"attention {name!r}"
            )


def pick_device(name: str) -> torch.device:
    """The device that a name means; auto is the first CUDA GPU, else the CPU.

    Raises:
        ModelError: it is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
            determinism.use_gpu(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"device {name!r} cannot be used", received=str(error).splitlines()[0], fix="--device auto"
        ) from None
    return device


def checkpoint_blocks(model: Any, family: Family, every: bool | int) -> None:
    """Activation checkpointing: keep nothing inside blocks, compute it again in the backward pass.

    Args:
        model: with its method attached.
        family: names its blocks.
        every: all blocks (True), every nth (a number), or none (False).

    Raises:
        ModelError: the model's blocks cannot do it.
    """
    inner = causal_lm(model)
    if not every:
        return
    if not inner.supports_gradient_checkpointing:
        raise ModelError(f"{type(inner).__name__}: cannot checkpoint activations", fix="leave out --checkpointing")
    inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for number, block in enumerate(family.block_list(inner)):
        block.gradient_checkpointing = (number + 1) % int(every) == 0  # type: ignore[assignment]


def groups(model: Any, family: Family) -> list[tuple[str, int, int]]:
    """(name, trainable, total) parameters of each part: embedding, blocks one by one, norm, head, and what is new."""
    inner = causal_lm(model)
    prefix = next((name for name, module in model.named_modules() if module is inner), "")
    start = f"{prefix}." if prefix else ""
    head, embedding = inner.get_output_embeddings(), inner.get_input_embeddings()
    paths = {id(module): name for name, module in model.named_modules()}
    parts = {f"{paths[id(embedding)]}.": "embedding", f"{start}{family.final_norm}.": "final norm"}
    if head is not None:
        parts[f"{paths[id(head)]}."] = "head"
    counts: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        block = re.match(rf"{re.escape(start + family.blocks)}\.(\d+)\.", name)
        found = next((part for path, part in parts.items() if name.startswith(path)), name.split(".")[0])
        part = f"block {block[1]}" if block else found
        trained, total = counts.get(part, (0, 0))
        count = quants.numel(parameter)
        counts[part] = (trained + count * parameter.requires_grad, total + count)
    return [(part, trained, total) for part, (trained, total) in counts.items()]


__all__ = [
    "FLAT",
    "Tuned",
    "load_model",
    "locate",
    "quantized_as",
    "read_config",
    "read_config_file",
    "shape_of",
    "trainable",
    "use_attention",
    "without_weights",
]
