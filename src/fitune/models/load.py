"""Model folders to models: every tensor of the files in its place, quantized while it is read where that is asked for.

In: a folder (or a hub id), a precision. Out: a transformers model in eval mode, ready for flat batches (prepare.py).
config.json is read in configs.py, and adapters are put on by adapters/.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, GlmForCausalLM
from transformers.pytorch_utils import Conv1D

from fitune.core.errors import ModelError
from fitune.core.options import QuantOptions, quant_options
from fitune.data.encode import Encoder
from fitune.data.templates import Template
from fitune.models import attached, weights
from fitune.models import quant as quants
from fitune.models.configs import is_original, quantized_as, read_config, without_weights
from fitune.models.families import original, towers
from fitune.models.family import Family
from fitune.models.interfaces import CausalLM, Config
from fitune.models.locate import locate
from fitune.models.precision import DTYPES
from fitune.models.prepare import ready
from fitune.models.quant import experts
from fitune.models.quant.stored import Reading, Stored


@dataclass
class Tuned:
    """A model with all that is needed to talk to it."""

    model: CausalLM
    tokenizer: Any
    template: Template
    encoder: Encoder
    family: Family

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.model.parameters()).device


def load_model(
    folder: str | Path,
    *,
    precision: str = "fp32",
    adapter: str | Path | None = None,
    device: str = "cpu",
    quant: QuantOptions | str = quants.PLAIN,
    storage: str = "auto",
    plain: bool = False,
) -> CausalLM:
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
    files = opened(folder, precision=precision, device=device, quant=quant, storage=storage)
    return load_files(files, adapter, plain=plain)


def load_files(files: Files, adapter: str | Path | None = None, *, plain: bool = False) -> CausalLM:
    """The same, from files that were opened."""
    model, info = files.read()
    files.strict(info)
    if plain:
        quants.dequantize(model, DTYPES[files.precision])
        quants.forget(model)
    return ready(model, files.precision, adapter)


@dataclass(frozen=True)
class Files:
    """A model's files, and how they are to be read. options: how it is quantized, in its folder or while it is read."""

    path: Path
    config: Config
    options: QuantOptions
    precision: str
    device: str
    storage: str

    @property
    def kept(self) -> torch.dtype:
        """The dtype of what is not quantized."""
        return DTYPES[self.precision if self.storage == "auto" else self.storage]

    def read(self, kind: type | None = None) -> tuple[CausalLM, dict[str, Any]]:
        """The model in its dtypes, on its device; and what the loader says of missing and left-over tensors.

        Args:
            kind: its class; None: transformers' own.

        Raises:
            ModelError: it cannot be read.
        """
        settings: dict[str, Any] = {"dtype": self.kept}
        settings |= _quantized(self.path, self.config, self.options, self.precision, self.device)
        if not isinstance(self.options, Stored) and torch.device(self.device).type == "cuda":
            settings["device_map"] = {"": self.device}  # each tensor goes there as it is read: main memory never holds
        try:
            model, info = _read(self.path, self.config, settings, kind)
        except Exception as error:  # safetensors, shapes, memory: each is reported as it is
            raise ModelError(f"{self.path}: cannot be loaded", received=" ".join(str(error).split())[:400]) from error
        if isinstance(self.options, Stored):
            model.config.quantization_config = self.config.quantization_config  # type: ignore[attr-defined]  # not the loader's
        experts.was_read(model)
        attached.of(model).tower = towers.of(self.path)
        if self.options.name == "none":
            model = model.to(self.device)
        else:
            _adopt(model, self.options.name, self.precision, self.storage)
        return model, info

    def packed_without_values(self, model: CausalLM, start: str) -> None:
        """Make the layers on meta, whose names start so, what they would be once they are read."""
        if self.options.name != "none":
            quants.empty_inside(model, self.options, start)
            _adopt(model, self.options.name, self.precision, self.storage)

    def strict(self, info: Mapping[str, Any]) -> None:
        """See load_strict."""
        options = self.options
        load_strict(self.path, info, quants.packing(options.name).spare if isinstance(options, Stored) else ())


def opened(
    folder: str | Path, *, precision: str, device: str, quant: QuantOptions | str, storage: str = "auto"
) -> Files:
    """The files of a model, whole as far as their headers say; as for `load_model`.

    Raises:
        ModelError: the folder cannot be used.
    """
    if precision not in DTYPES:
        raise ModelError(f"precision {precision!r}", expected=", ".join(DTYPES))
    path = locate(str(folder))
    config = read_config(path)
    weights.check(path)
    if wrong := weights.broken(path):
        raise ModelError(f"{path}: {'; '.join(wrong[:5])}", fix="download the model again")
    wanted = quant_options(quant) if isinstance(quant, str) else quant
    options = quantized_as(config)
    options = wanted if options.name == "none" else options
    return Files(path, config, options, precision, device, storage)


def _quantized(path: Path, config: Config, options: QuantOptions, precision: str, device: str) -> dict[str, Any]:
    """What transformers' loader must know of a model in few bits; nothing of a plain one."""
    if options.name == "none":
        return {}
    quants.find(options.name)  # an error where bitsandbytes is missing
    # the values must not depend on the precision of the run: a merge, in float32, must find the same ones
    settings: dict[str, Any] = {"dtype": weights.stored_dtype(path), "device_map": {"": device}}
    if isinstance(options, Stored):
        settings["quantization_config"] = quants.reading(options)
    elif quantized_as(config).name == "none":  # else the folder has packed values of bitsandbytes
        settings["quantization_config"] = _quantizing(config, options, precision, device)
    return settings


def outline(config: Config, *, precision: str, quant: QuantOptions = quants.PLAIN, storage: str = "auto") -> CausalLM:
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


def _read(path: Path, config: Config, settings: Mapping[str, Any], kind: Any = None) -> tuple[CausalLM, dict[str, Any]]:
    """transformers' model, and what it says of missing and left-over tensors. kind: its class; None: its own."""
    if isinstance(settings.get("quantization_config"), Reading):
        config = deepcopy(config)  # packed by others: transformers would look for their library
        del config.quantization_config  # type: ignore[attr-defined]  # of packed models alone
    settings = {**settings, "config": config, "output_loading_info": True}
    if is_original(path):
        # tensors are mapped, not read: each is copied, and quantized, when its turn comes
        found: tuple[CausalLM, dict[str, Any]] = (kind or GlmForCausalLM).from_pretrained(
            None, state_dict=dict(original.tensors(weights.tensors(path), config)), **settings
        )
        return found
    tower = towers.of(path)
    if tower is not None or weights.is_bin(path):
        kind = kind or MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        there = weights.tensors(path)
        state = dict(there if tower is None else towers.tensors(there))
        unpacked: tuple[CausalLM, dict[str, object]] = kind.from_pretrained(None, state_dict=state, **settings)
        return unpacked
    if kind is None:
        settings["trust_remote_code"] = False
    loaded: tuple[CausalLM, dict[str, Any]] = (kind or AutoModelForCausalLM).from_pretrained(
        str(path), use_safetensors=True, local_files_only=True, **settings
    )
    return loaded


def _quantizing(config: Config, options: QuantOptions, precision: str, device: str) -> Any:
    """The settings for transformers' loader; the head, tied or not, stays as it is."""
    empty = without_weights(config)
    layers = set(quants.planned(empty, options))
    linear = {name for name, module in empty.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    quantizer = quants.find(options.name)
    settings = quantizer.settings(options, DTYPES[precision], sorted(linear - layers))
    fused = quants.planned_experts(empty, options)
    return experts.reading(settings, fused, quantizer, options, device) if fused else settings


def _adopt(model: CausalLM, name: str, precision: str, storage: str) -> None:
    """One path for the quantized layers, and the run's dtype for everything else, one tensor after the other."""
    quants.adopt(model, name, DTYPES[precision])
    kept = DTYPES[precision if storage == "auto" else storage]
    packed = {id(layer.weight) for _, layer in quants.packed(model)}
    for parameter in model.parameters():
        if id(parameter) not in packed and parameter.is_floating_point():
            parameter.data = parameter.data.to(kept)


# buffers that older versions of transformers wrote, and that every model computes by itself
HARMLESS = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias", "attention.bias", "attention.masked_bias")


def load_strict(path: Path, info: Mapping[str, Any], spare: tuple[str, ...] = ()) -> None:
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
    left = [name for name in left if not name.endswith((*HARMLESS, *spare))]
    if left or info.get("mismatched_keys"):
        wrong = left or [str(one) for one in info["mismatched_keys"]]
        raise ModelError(
            f"{path}: {len(wrong)} tensors of the weights have no place in the model that config.json describes",
            received=", ".join(map(str, wrong[:5])),
            fix="config.json and the weights belong to different models: download both again",
        )
