"""Rules about the weights that were loaded and the files that chat will read: each a function named as in the report.

In: a model, its folder, a run folder. Out: Findings, as in datachecks.py. Before the first step: base-loaded,
adapter-scale, chat-parity, held-out-apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fitune.checks.leak import TOLERANCE
from fitune.checks.stepchecks import OURS
from fitune.core.config import RunConfig
from fitune.core.records import Conversation, Finding, Sample
from fitune.data import templates, tokenizer
from fitune.data.encode import Encoder
from fitune.data.store import Samples
from fitune.engine.checkpoint import RunFolder
from fitune.engine.shards import gathered
from fitune.models import quant, weights
from fitune.models.attached import compute_dtype
from fitune.models.methods import lora
from fitune.models.switches import computing, evaluating

ROWS = 20  # prompts that are compared
TAKEN = 4096  # numbers of a tensor that are compared with its file
UNLIKE = 0.5  # quantized weights are off by 1 % (int8) or 10 % (nf4) of their norm; wrong ones by more than 100 %


class _Quantized(Protocol):
    """A quantized layer (models.quant)."""

    source_cls: type

    def plain_weight(self, dtype: torch.dtype) -> Tensor:
        """Its weight, in that dtype."""


# ---- what was loaded ----


def base_loaded(compared: Compared) -> Finding:
    """Each tensor of the base model has the values of its file; some numbers of each are compared.

    Args:
        compared: of a whole model, or of all of its parts, before a method is attached. Names that the loader changes
            are left out, and counted.
    """
    if compared.wrong is not None:
        text, fix = compared.wrong
        return Finding("base-loaded", "refuse", text, fix)
    left = len(compared.names - compared.found - compared.packed)
    more = f"; {left} that the loader renames or reshapes were not compared" if left else ""
    return Finding("base-loaded", "ok", f"{len(compared.found)} tensors begin with the values of their files{more}")


def compared(model: PreTrainedModel, folder: Path) -> Compared:
    """What a whole model has, beside the files in its folder."""
    made = Compared(folder)
    made.look(model)
    return made


@dataclass
class Compared:
    """What a model has, beside the files in a folder: looked at whole, or in one part after the other.

    names: of the files. found: have the same values. packed: are packed in the folder. wrong: a text, and a fix.
    """

    folder: Path
    names: set[str] = field(default_factory=set)
    found: set[str] = field(default_factory=set)
    packed: set[str] = field(default_factory=set)
    wrong: tuple[str, str] | None = None

    @torch.no_grad()
    def look(self, model: PreTrainedModel) -> None:
        """Compare what is there of a model."""
        mine = {**dict(model.named_buffers()), **dict(model.named_parameters(remove_duplicate=False))}
        packed, prefix = dict(quant.layers(model)), model.base_model_prefix

        def own(name: str) -> str | None:
            return next((n for n in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")) if n in mine), None)

        for name, value in _starts(self.folder, lambda name: name not in self.names or own(name) is not None):
            self.names.add(name)
            if value.is_floating_point() and not bool(value.float().isfinite().all()):
                text = f"{name} has NaN or infinite values in {self.folder.name}"
                fix = "download the model again, or take another one"
                self.wrong = f"{text}: every answer and every loss would be NaN", fix
                return
            known = own(name)
            if known is None:
                continue
            layer, _, leaf = known.rpartition(".")
            there = mine[known]
            if layer in packed and leaf == "weight":
                same = there.dtype == value.dtype
                if same and not value.is_floating_point():
                    self.packed.add(name)
                    continue  # a folder that is packed already
                first = there.cpu()[: len(value)] if same and value.itemsize == 1 else _row(packed[layer], value.shape)
                unlike = first is None or _far(first, value)
            elif there.shape[1:] != value.shape[1:]:
                continue  # laid out otherwise by the loader
            else:
                first = there[: len(value)].reshape(-1)[: value.numel()].cpu()
                unlike = not torch.equal(first, value.reshape(-1).to(first.dtype))
            if unlike:
                text = f"{known} does not have the values that {self.folder.name} has for {name}"
                self.wrong = text, "download the model again; if that does not help, please report it"
                return
            self.found.add(name)


def _far(one: Tensor, other: Tensor) -> bool:
    return float((one.float() - other.float()).norm()) > UNLIKE * float(other.float().norm())


def _row(layer: _Quantized, shape: Sequence[int]) -> Tensor | None:
    """The first rows of a quantized weight, as float32; None: of another shape."""
    weight = layer.plain_weight(torch.float32)
    weight = (weight.T if layer.source_cls is Conv1D else weight)[: shape[0]]
    return weight.cpu() if tuple(weight.shape) == tuple(shape) else None


def _starts(folder: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
    """The first rows of each wanted tensor in safetensors files, some thousand numbers. torch's old files are left
    out."""
    for file in weights.files(folder):
        if file.suffix != ".safetensors":
            continue
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                part = opened.get_slice(name)
                shape = part.get_shape()
                if not shape or not all(shape) or not wanted(name):
                    continue
                rows = max(1, min(shape[0], TAKEN // max(1, math.prod(shape[1:]))))
                yield name, part[:rows]


@torch.no_grad()
def adapter_scale(model: nn.Module, config: RunConfig) -> Finding:
    """A LoRA adds (alpha / rank) B A x, with the settings that its file will have, exactly once.

    Args:
        model: with its method attached. B gets other values during the check, and is restored.
        config: the run's.
    """
    rule = "adapter-scale"
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer) and "default" in m.lora_A]
    if not isinstance(model, PeftModel) or config.method != "lora" or not layers:
        return Finding(rule, "ok", "no low-rank updates, so there is no scale to check")
    options = config.lora
    linear = [layer for _, layer in layers if not hasattr(layer, "num_experts")]
    for name, layer in layers:
        rank = layer.lora_A["default"].weight.shape[0] // getattr(layer, "num_experts", 1)
        wanted = options.alpha / (math.sqrt(rank) if options.rslora else rank)
        if not math.isclose(layer.scaling["default"], wanted, rel_tol=1e-6):
            text = f"{name} multiplies its update by {layer.scaling['default']:g}, its settings give {wanted:g}"
            return Finding(rule, "refuse", text, OURS)
        if not options.dora and not lora.is_pissa(model) and layer in (*linear[:1], *linear[-1:]):
            with gathered(model, layer):
                off = _update_is_off(model, layer, wanted)
            if off > 10 * TOLERANCE[compute_dtype(model)]:
                text = f"{name} adds another update than alpha / rank times B A x: off by {off:.1e} of the output"
                return Finding(rule, "refuse", text, OURS)
    return Finding(rule, "ok", f"{len(layers)} updates are added once, times alpha / rank of the settings")


def _update_is_off(model: nn.Module, layer: LoraLayer, scale: float) -> float:
    """How far the update of a layer is from scale B A x, relative to its largest output."""
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    kept = b.detach().clone()
    numbers = torch.Generator().manual_seed(0)
    try:
        b.copy_(torch.randn(b.shape, generator=numbers) / scale)
        x = torch.randn(1, 3, a.shape[1], generator=numbers).to(a.device, compute_dtype(model))
        with evaluating(layer), computing(model):
            plain, tuned = layer.get_base_layer()(x).float(), layer(x).float()
        update = scale * (x.float() @ a.float().T) @ b.float().T
        return float((tuned - plain - update).abs().max() / tuned.abs().max())
    except (RuntimeError, AttributeError):  # an embedding, or a layer of another kind
        return 0.0
    finally:
        b.copy_(kept)


# ---- what chat reads ----


def chat_parity(run: RunFolder, config: RunConfig, encoder: Encoder, samples: Sequence[Sample]) -> Finding:
    """Template and tokenizer of the run folder give chat the prompts that were trained, token for token.

    Args:
        run: with template.json and its tokenizer written.
        config: the run's.
        encoder: of the run itself.
        samples: that are trained.
    """
    vocabulary = tokenizer.load(run.tokenizer)
    template = templates.from_dict(run.read("template"), vocabulary)
    there = Encoder(vocabulary, template, answer_tokens=config.answer_tokens)
    if (there.stop_ids, there.stop_id) != (encoder.stop_ids, encoder.stop_id):
        text = f"chat would stop at the tokens {there.stop_ids}, the run trains {encoder.stop_ids}"
        return Finding("chat-parity", "refuse", text, OURS)
    tried = 0
    for sample, row in _whole_rows(samples):
        wanted = sample.ids[: sample.prompt_length].tolist()
        for who, one in (("chat", there), ("the run itself", encoder)):
            asked = one.prompt(row.prompt(), row.tools)
            if sample.ids[: len(asked)].tolist() != asked:
                text = f"{row.source}: {who} would send {len(asked)} other tokens than the {len(wanted)} of training"
                return Finding("chat-parity", "refuse", text, OURS)
        tried += 1
    return Finding("chat-parity", "ok", f"{tried} prompts, read back from the run folder, are those of training")


def _whole_rows(samples: Sequence[Sample]) -> Iterator[tuple[Sample, Conversation]]:
    """Some samples that are not cut, with their rows; of a row with several samples the last one."""
    assert isinstance(samples, Samples)
    of = samples.column("row")
    for at in range(0, len(samples), max(1, len(samples) // ROWS)):
        last = at + 1 == len(samples) or of[at + 1] != of[at]
        sample, row = samples[at], samples.rows[int(of[at])]
        if last and row.format != "text" and not sample.cut_prompt and not sample.cut_answer:
            yield sample, row
