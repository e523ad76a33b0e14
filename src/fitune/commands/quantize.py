"""A model folder to a quantized one, with what that costs layer by layer.

In: a model folder. Out: a folder that transformers, PEFT and fitune load, which holds the packed weights; a table and a
picture of each layer's error. The originals are read one tensor at a time beside the packed ones.

Error of a layer: mean |W' - W| / mean |W|, and max |W' - W| / max |W|. Outlier columns: inputs of the layer that hold a
value of at least the threshold on a short text, which LLM.int8() takes out (arXiv:2208.07339, section 3.2).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from fitune.core.errors import FituneError, ModelError
from fitune.core.files import as_json, check_new, expand, whole_folder
from fitune.core.options import QuantOptions, quant_options
from fitune.core.results import LayerError, QuantizedModel
from fitune.data import templates, tokenizer
from fitune.models import kernel_faults, weights
from fitune.models import quant as quants
from fitune.models.configs import longest_row, quantized_as, read_config, without_weights
from fitune.models.families import towers
from fitune.models.handover import TEMPLATE, hand_over
from fitune.models.load import load_model
from fitune.models.locate import locate
from fitune.models.quant.absmax import outlier_columns
from fitune.models.weights import safe
from fitune.views.charts import NARROW, WIDE, Series, line_chart
from fitune.views.pages import render

TEXT = "The quick brown fox jumps over the lazy dog. 1 + 1 = 2. 今天天气很好，我们去公园散步。"
THRESHOLD = 6.0  # the paper's


def quantize(model: str | Path, output: str | Path, *, quant: QuantOptions | str = "nf4") -> QuantizedModel:
    """Write a quantized model.

    Args:
        model: a model folder or a hub id, not quantized yet.
        output: a folder that is not there yet, or is empty.
        quant: int8, nf4, fp4, or all the settings.

    Raises:
        ModelError: the model is quantized already, or cannot be used; the folder is not empty.
        ConfigError: no such quantizer.
    """
    options = quant_options(quant) if isinstance(quant, str) else quant
    target, folder = expand(output), locate(str(model))
    if options.name == "none":
        raise ModelError("nothing to do: quant is none", fix="--quant nf4 or int8")
    check_new(target, whole=True)
    if (there := quantized_as(read_config(folder)).name) != "none":
        raise ModelError(f"{folder}: is quantized already, as {there}", expected="the original model")
    if towers.of(folder) is not None:
        raise ModelError(
            f"{folder}: takes images too, and fitune quantizes language models alone",
            fix="--quant nf4 on train, chat and eval quantizes its language model while it is read",
        )
    shape = without_weights(read_config(folder))
    loaded = load_model(folder, quant=quants.without_experts(shape, options))
    kernel_faults.notice(quants.faults(loaded))
    outliers = _outliers(loaded, folder)
    layers = [
        LayerError(name, weight.numel(), *_errors(layer, weight), outliers.get(name), layer.in_features)
        for name, layer, weight in _beside(loaded, folder)
    ]
    _write(loaded, folder, target, layers, options)
    return QuantizedModel(
        str(target), _kind(options), _size(folder), _size(target), layers, quants.left_plain(shape, options)
    )


def _beside(model: Any, folder: Path) -> Iterator[tuple[str, Any, Tensor]]:
    """(name, quantized layer, original weight (out, in)), one original in memory at a time."""
    layers = dict(quants.layers(model))
    by_file = {f"{name}.weight": name for name in layers}
    prefix = f"{model.base_model_prefix}."
    by_file |= {key.removeprefix(prefix): name for key, name in by_file.items()}  # some files leave it out
    found: dict[str, tuple[Path, str]] = {}
    for file in weights.files(folder):
        with safe.opened(file) as tensors:
            found |= {by_file[key]: (file, key) for key in tensors.keys() if key in by_file}  # noqa: SIM118
    for name, layer in layers.items():
        if name in found:
            file, key = found[name]
            with safe.opened(file) as tensors:
                weight = tensors.get_tensor(key).float()
            yield name, layer, weight.T if layer.source_cls is Conv1D else weight


def _errors(layer: Any, weight: Tensor) -> tuple[float, float]:
    off = (layer.plain_weight(torch.float32) - weight).abs()
    return float(off.mean() / weight.abs().mean()), float(off.max() / weight.abs().max())


@torch.no_grad()
def _outliers(model: Any, folder: Path) -> dict[str, int]:
    """Of each quantized layer how many columns of its input go over the threshold on a short text."""
    try:
        ids = tokenizer.encode(tokenizer.load(folder), TEXT, literal=False)
    except FituneError:
        return {}
    limit = longest_row(model.config)
    counts: dict[str, int] = {}

    def look(name: str) -> Callable[[torch.nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            counts[name] = len(outlier_columns(inputs[0].float().flatten(0, -2), THRESHOLD))

        return hook

    hooks = [layer.register_forward_pre_hook(look(name)) for name, layer in quants.layers(model)]
    model(input_ids=torch.tensor([ids[:limit]]))
    for hook in hooks:
        hook.remove()
    return counts


def picture(layers: list[LayerError], width: int = WIDE) -> str:
    """Mean and largest error by layer, as SVG."""
    return line_chart(
        [
            Series("mean error", [(n, layer.mean_error) for n, layer in enumerate(layers)], "--line1"),
            Series("largest error", [(n, layer.max_error) for n, layer in enumerate(layers)], "--line2"),
        ],
        x_label="layer, in the model's order",
        y_label="relative error of the weight",
        width=width,
    )


def _write(model: Any, folder: Path, target: Path, layers: list[LayerError], options: QuantOptions) -> None:
    """The folder, whole or not at all."""
    with whole_folder(target) as place:
        model.save_pretrained(str(place), safe_serialization=True)
        for file in folder.iterdir():  # tokenizer, template, licence: what belongs to the model and is no weight
            of_weights = file.suffix in (".safetensors", ".bin") or ".index." in file.name
            if file.is_file() and not of_weights and not (place / file.name).exists():
                shutil.copyfile(file, place / file.name)
        if (folder / TEMPLATE).is_file():  # what a run has made answers as the run did, whichever version merged it
            loaded = tokenizer.load(folder)
            hand_over(place, loaded, templates.from_dict(tokenizer.read_json(folder / TEMPLATE), loaded))
        table = [asdict(layer) for layer in layers]
        (place / "quantization.json").write_text(as_json(table, indent=1), encoding="utf-8")
        page = render(
            "quantization",
            title=f"{folder.name} as {_kind(options)}",
            subtitle="how far each weight is from the original",
            numbers=_numbers(layers),
            layers=layers,
            chart=[picture(layers, width) for width in (WIDE, NARROW)],
            threshold=THRESHOLD,
        )
        (place / "quantization.html").write_text(page, encoding="utf-8")


def _numbers(layers: list[LayerError]) -> list[tuple[str, str]]:
    weights = sum(layer.weights for layer in layers)
    mean = sum(layer.mean_error * layer.weights for layer in layers) / max(weights, 1)
    worst = max(layers, key=lambda layer: layer.mean_error)
    return [("quantized weights", f"{weights:,}"), ("mean error", f"{mean:.2%}"), ("worst layer", worst.name)]


def _kind(options: QuantOptions) -> str:
    return options.kind if options.name == "nf4" else options.name


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in weights.files(folder))
