"""A LoRA adapter alone as a GGUF, which llama.cpp puts on a base model that it has as a file of its own.

In: an adapter folder in PEFT's format, the config of its base model. Out: metadata and pieces. Each pair is named by
the tensor it belongs to; B's rows are in that tensor's order, and its scale is folded in where one number for all,
alpha over the rank, does not say it. What llama.cpp has no place for is refused: DoRA, biases, modules saved whole, new
tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gguf import Keys, get_tensor_name_map
from peft.utils.other import get_pattern_key
from torch import Tensor

from fitune.core.errors import ModelError
from fitune.models.adapters.files import NEW_IDS, PEFT_CONFIG, WEIGHTS, read_settings
from fitune.models.handover.gguf import architectures, order
from fitune.models.handover.gguf.names import Piece
from fitune.models.weights import safe

A, B = ".lora_A.weight", ".lora_B.weight"
FIX = "fitune export RUN --to gguf merges it into the whole model"


def draft(folder: Path, name: str, config: Any) -> tuple[str, dict[str, Any], list[Piece]]:
    """The architecture's name, the metadata and the tensors of an adapter.

    Args:
        folder: of the adapter.
        name: what it is called.
        config: of its base model.

    Raises:
        ModelError: no LoRA adapter, or one with parts that llama.cpp has no place for.
    """
    settings = read_settings(folder / PEFT_CONFIG)
    _check(folder, settings)
    architecture = architectures.of(config)
    with safe.opened(folder / WEIGHTS) as tensors:
        shapes = {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    stems = sorted({key.removesuffix(A) for key in shapes if key.endswith(A)})
    if wrong := [key for key in shapes if not key.endswith((A, B))]:
        raise ModelError("llama.cpp has no place for tensors of this adapter", received=", ".join(wrong[:3]), fix=FIX)
    scales = {stem: _scale(settings, stem, shapes[stem + A][0]) for stem in stems}
    ranks = {shapes[stem + A][0] for stem in stems}
    same = len(set(scales.values())) == 1 and len(ranks) == 1
    alpha = scales[stems[0]] * ranks.pop() if same else 0.0
    table = get_tensor_name_map(architecture.arch, config.num_hidden_layers)
    pieces = []
    for stem in stems:
        own = stem.removeprefix("base_model.model.")
        known = table.get_name(f"{own.removeprefix(architecture.prefix)}.weight", try_suffixes=(".weight",))
        if known is None:
            raise ModelError(f"llama.cpp's {architecture.name} has no tensor for {own}", fix=FIX)
        whole = torch.empty(shapes[stem + B][0], shapes[stem + A][1], device="meta")
        if architecture.apart(f"{own}.weight", whole, config).get(f"{own}.weight") is not whole:
            raise ModelError(
                f"llama.cpp's {architecture.name} lays out {own} as no pair of A and B can follow", fix=FIX
            )
        read = partial(_read, folder / WEIGHTS)
        change = partial(_change, architecture, own, config, 1.0 if same else scales[stem])
        pieces.append(Piece(f"{known}.lora_a", shapes[stem + A], (partial(read, stem + A),)))
        pieces.append(Piece(f"{known}.lora_b", shapes[stem + B], (partial(read, stem + B, change),)))
    metadata = {
        Keys.General.TYPE: "adapter",
        Keys.General.NAME: name,
        Keys.Adapter.TYPE: "lora",
        Keys.Adapter.LORA_ALPHA: float(alpha),
    }
    return architecture.name, metadata, pieces


def _check(folder: Path, settings: Mapping[str, Any]) -> None:
    if settings.get("peft_type") != "LORA" or not (folder / WEIGHTS).is_file():
        raise ModelError(
            f"{folder}: no LoRA adapter",
            received=settings.get("peft_type") or "no PEFT adapter",
            expected="LORA",
            fix=FIX,
        )
    parts = {
        "DoRA": settings.get("use_dora"),
        "biases": settings.get("bias", "none") != "none" or settings.get("lora_bias"),
        "modules saved whole": settings.get("modules_to_save"),
        "rows of new tokens": (folder / NEW_IDS).is_file() or settings.get("trainable_token_indices"),
        "base weights of its own (PiSSA and the like)": settings.get("init_lora_weights")
        not in (True, False, "gaussian"),
        "layers that are repeated": settings.get("layer_replication"),
    }
    if there := [name for name, value in parts.items() if value]:
        raise ModelError(f"llama.cpp takes no adapter with {', '.join(there)}", fix=FIX)


def _scale(settings: Mapping[str, Any], stem: str, rank: int) -> float:
    """What PEFT multiplies B A by."""
    patterns = settings.get("alpha_pattern") or {}
    alpha = float(patterns.get(get_pattern_key(list(patterns), stem), settings["lora_alpha"]))
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _read(file: Path, key: str, change: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Tensor:
    with safe.opened(file) as tensors:
        return change(tensors.get_tensor(key))


def _change(architecture: architectures.Architecture, name: str, config: Any, scale: float, rows: Tensor) -> Tensor:
    """B: (out, r), its rows in the order of the tensor it is for."""
    if architecture.order is not order.shifted:
        rows = architecture.order(f"{name}{B}", rows, config)
    return rows if scale == 1.0 else rows.float() * scale
