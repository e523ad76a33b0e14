"""An adapter folder put on a model; every tensor must find its place, and every setting must be the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from fitune.core.errors import ModelError
from fitune.data.tokenizer.new_tokens import NewToken
from fitune.models import attached
from fitune.models.adapters.attach import attach, parameters_of, trained
from fitune.models.adapters.files import (
    ENCODER,
    NEW_IDS,
    NEW_ROWS,
    OWN_CONFIG,
    PEFT_CONFIG,
    WEIGHTS,
    read_new_ids,
    read_own,
    read_settings,
)
from fitune.models.adapters.save import for_language_model
from fitune.models.interfaces import CausalLM, Peft, causal_lm, peft_of
from fitune.models.kernels import low_rank
from fitune.models.methods import misread, new_tokens, prefix
from fitune.models.weights import safe


def put(model: CausalLM, folder: Path) -> CausalLM:
    """The model with the adapter of a folder; every tensor must find its place.

    Raises:
        ModelError: the folder holds no adapter, or one for another model.
        ConfigError: it is a prefix, and the PEFT that is installed cannot use it on this model.
    """
    own, peft = (folder / OWN_CONFIG).is_file(), (folder / PEFT_CONFIG).is_file()
    if not (own or peft) or not (folder / WEIGHTS).is_file():
        missing = WEIGHTS if own or peft else PEFT_CONFIG
        raise ModelError(f"{folder}: no {missing}", expected="an adapter folder (safetensors), PEFT's or fitune's")
    if (folder / NEW_IDS).is_file():
        new_tokens.add_rows(model, [NewToken("", i, (0,)) for i in read_new_ids(folder)])
        _load_rows(model, folder)
    if own:
        return _put_own(model, folder)
    with for_language_model(model, folder) as place:
        return _put_peft(model, place)


@torch.no_grad()
def _load_rows(model: nn.Module, folder: Path) -> None:
    mine = new_tokens.rows(causal_lm(model))
    stored = safe.load(folder / NEW_ROWS) if (folder / NEW_ROWS).is_file() else {}
    _same_shapes(folder, mine, stored)
    for name, parameter in mine.items():
        parameter.copy_(stored[name])


def _put_own(model: CausalLM, folder: Path) -> CausalLM:
    model = attach(model, read_own(folder))
    start = {name: tensor.clone() for name, tensor in trained(model).items()}
    attached.of(model).start = start  # for disabled()
    load_into(model, folder)
    return model


def _put_peft(model: CausalLM, folder: Path) -> CausalLM:
    if read_settings(folder / PEFT_CONFIG).get("peft_type") == PeftType.PREFIX_TUNING:
        prefix.placed(model)
    try:
        settings = PeftConfig.from_pretrained(str(folder), local_files_only=True)
        layers = misread.take_out(settings, model)
        wrapped: CausalLM = PeftModel.from_pretrained(model, str(folder), local_files_only=True, config=settings)
        if layers:
            misread.load(cast(Peft, wrapped), layers, folder / WEIGHTS)
    except Exception as error:  # PEFT raises many kinds; each is reported as it is
        raise ModelError(
            f"{folder}: does not fit this base model", received=" ".join(str(error).split())[:400]
        ) from error
    _same_names(folder, set(get_peft_model_state_dict(wrapped, save_embedding_layers=False)))
    attached.of(wrapped).copies = low_rank.fuse(wrapped).whole
    return wrapped


def _same_names(folder: Path, wanted: set[str]) -> None:
    with safe.opened(folder / WEIGHTS) as file:
        stored = set(file.keys())
    if stored != wanted:
        raise ModelError(
            f"{folder}: the adapter's tensors are not those of this model",
            received=f"unknown: {sorted(stored - wanted)[:3]}, missing: {sorted(wanted - stored)[:3]}",
            fix="the same base model, method and settings as it was trained with",
        )


@torch.no_grad()
def load_into(model: nn.Module, folder: Path) -> None:
    """Give a model whose method is attached the values of an adapter folder, to go on from.

    Raises:
        ModelError: it was made by another method or with other settings.
    """
    here, peft = new_tokens.ids(causal_lm(model)), peft_of(model)
    theirs = read_new_ids(folder) if (folder / NEW_IDS).is_file() else []
    if here != theirs:
        raise ModelError(
            f"{folder}: has other new tokens than this run",
            received=f"ids {theirs or 'none'}",
            expected=f"ids {here or 'none'}",
            fix="give the same --new-tokens",
        )
    if here:
        _load_rows(model, folder)
    if peft is not None and not (folder / ENCODER).is_file():
        with for_language_model(model, folder) as place:
            _load_peft(model, place)
        return
    _same_settings(folder, model)
    stored = safe.load(folder / (WEIGHTS if peft is None else ENCODER))
    mine = parameters_of(model)
    _same_shapes(folder, mine, stored)
    for name, parameter in mine.items():
        parameter.copy_(stored[name])


def _load_peft(model: nn.Module, folder: Path) -> None:
    if not (folder / PEFT_CONFIG).is_file():
        raise _other(folder, [OWN_CONFIG])
    _same_settings(folder, model)
    stored = safe.load(folder / WEIGHTS)
    mine = get_peft_model_state_dict(model, save_embedding_layers=False)
    _same_shapes(folder, mine, stored)
    set_peft_model_state_dict(model, stored)


# what may differ between a stored adapter and one that goes on from it: it changes nothing that was learned
FREE = {
    "base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping", "task_type",
    "init_lora_weights", "init_weights", "lora_dropout", "init_ia3_weights", "encoder_dropout", "target_modules",
    "modules_to_save", "prompt_tuning_init", "feedforward_modules",
}  # fmt: skip


def _same_settings(folder: Path, model: nn.Module) -> None:
    """Raises ModelError where a setting that the shapes do not show differs: a scale, an activation function."""
    peft = peft_of(model)
    if peft is None:
        mine, stored = attached.of(model).method, read_settings(folder / OWN_CONFIG)
    else:
        mine, stored = peft.peft_config[peft.active_adapter].to_dict(), read_settings(folder / PEFT_CONFIG)
    plain = json.loads(json.dumps(mine, default=_plain))
    differing = [
        f"{name} {stored.get(name)} (this run: {plain.get(name)})"
        for name in sorted({*plain, *stored} - FREE)
        if (stored.get(name) or None) != (plain.get(name) or None)
    ]
    if differing:
        raise _other(folder, differing)


def _plain(value: object) -> object:
    """PEFT's enums and sets as they stand in a file."""
    return sorted(value) if isinstance(value, (set, frozenset)) else getattr(value, "value", str(value))


def _same_shapes(folder: Path, mine: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    shapes = [{name: tuple(tensor.shape) for name, tensor in some.items()} for some in (mine, stored)]
    differing = sorted(name for name in {*mine, *stored} if shapes[0].get(name) != shapes[1].get(name))
    if differing:
        raise _other(folder, differing)


def _other(folder: Path, differing: list[str]) -> ModelError:
    return ModelError(
        f"{folder}: was trained with another method or other settings",
        received=f"differing: {', '.join(differing[:4])}",
        expected="the method, targets, ranks and sizes of this run",
        fix="give the same --method and its settings",
    )
