"""What was tuned, as files: saving it, putting it on a base, switching between several, and turning it off.

In: a model with a method on it. Out: a folder. Methods that PEFT knows are saved in PEFT's format. Ours (full, freeze,
tail, bitfit, adapter) are saved as the trainable tensors by name, with the settings that attach them again:

    adapter_config.json   adapter_model.safetensors     PEFT's
    encoder.safetensors                                 what P-tuning and a projected prefix train, to go on from
    fitune_adapter.json   adapter_model.safetensors     ours
    new_tokens.json       new_tokens.safetensors        rows of new tokens, beside any method
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from fitune.core.config import RunConfig, settings_only
from fitune.core.errors import ConfigError, ModelError, Problems, did_you_mean, shorten
from fitune.core.files import expand
from fitune.core.untrusted import read_json
from fitune.data.tokenizer.new_tokens import NewToken
from fitune.models import families, methods
from fitune.models.families import towers
from fitune.models.methods import adapter as bottleneck
from fitune.models.methods import lora, new_tokens
from fitune.models.precision import DTYPES
from fitune.models.weights import safe

PEFT_CONFIG, OWN_CONFIG = "adapter_config.json", "fitune_adapter.json"
WEIGHTS, ENCODER = "adapter_model.safetensors", "encoder.safetensors"
NEW_ROWS, NEW_IDS = "new_tokens.safetensors", "new_tokens.json"


def attach(model: Any, config: RunConfig) -> Any:
    """The model with the config's method on it; what is trained is remembered, so that it can be saved and turned off.

    Args:
        model: the base; rows of new tokens, where there are some, are trained beside.
        config: names the method, and has its settings.

    Raises:
        ConfigError: the settings do not fit the model.
    """
    method = methods.find(config.method)
    torch.manual_seed(config.seed)  # the method's random start is part of the seed
    model = method.attach(model, families.of(model), config)
    if not isinstance(model, PeftModel):
        model.fitune_method = {"method": method.name, **_options(method, config)}
    new_tokens.train_rows(_inner(model))
    _cast_trained(model, DTYPES[config.trainable_dtype])
    _no_copies(model)
    return model


def _no_copies(model: Any) -> None:
    """PEFT's layers cast their input to the dtype of their weights, float32, and autocast casts it back: a copy of the
    input for each adapted layer, with the values that the input has anyway. They take it as it is."""
    if getattr(_inner(model), "fitune_compute", torch.float32) != torch.float32:
        for module in model.modules():
            # DoRA's magnitudes would be of a norm computed in 16 bits
            if hasattr(module, "cast_input_dtype_enabled") and not getattr(module, "lora_magnitude_vector", None):
                module.cast_input_dtype_enabled = False


def _cast_trained(model: Any, dtype: torch.dtype) -> None:
    """Methods leave what they train in float32; where less was asked for, the rest of a norm follows."""
    if dtype == torch.float32:
        return
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        for parameter in own:
            if parameter.requires_grad or (parameter.dtype == torch.float32 and any(p.requires_grad for p in own)):
                parameter.data = parameter.data.to(dtype)


def _inner(model: Any) -> Any:
    """The transformers model inside PEFT's."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def row_sizes(model: Any) -> dict[str, int]:
    """Names and sizes of the rows of new tokens, as the whole model calls them."""
    mine = {id(p): p.numel() for p in new_tokens.rows(_inner(model)).values()}
    return {name: mine[id(p)] for name, p in model.named_parameters() if id(p) in mine}


def _options(method: methods.Method, config: RunConfig) -> dict[str, Any]:
    return {method.options: getattr(config, method.options).model_dump(mode="json")} if method.options else {}


def _parameters(model: Any) -> dict[str, Tensor]:
    """The method's trainable parameters by name; rows of new tokens are kept apart."""
    apart = row_sizes(model)
    return {name: p for name, p in model.named_parameters() if p.requires_grad and name not in apart}


def trained(model: Any) -> dict[str, Tensor]:
    """The values of the method's trainable parameters by name, on the CPU."""
    return {name: p.detach().cpu().contiguous() for name, p in _parameters(model).items()}


@torch.no_grad()  # an LSTM takes another way with gradients, and its bits are to be those of inference
def save(model: Any, folder: Path) -> None:
    """Everything that was tuned, as files; see the module's text."""
    folder.mkdir(parents=True, exist_ok=True)
    inner = _inner(model)
    if new_tokens.ids(inner):
        save_file({name: p.cpu().contiguous() for name, p in new_tokens.rows(inner).items()}, folder / NEW_ROWS)
        (folder / NEW_IDS).write_text(json.dumps(new_tokens.ids(inner)), encoding="utf-8")
    if not isinstance(model, PeftModel):
        save_file(trained(model), folder / WEIGHTS, metadata={"format": "pt"})
        (folder / OWN_CONFIG).write_text(json.dumps(model.fitune_method, indent=1), encoding="utf-8")
        return
    as_lora = lora.pissa_as_lora(model, get_peft_model_state_dict(model, save_embedding_layers=False))
    if as_lora is not None:
        tensors, config = as_lora
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        config.inference_mode = True
        config.save_pretrained(str(folder))
        _to_whole(inner, folder)
        return
    # embeddings never change here; "auto" would ask the hub about the base model
    model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    if len(trained(model)) > 1 and model._is_prompt_learning:
        save_file(trained(model), folder / ENCODER)
    _to_whole(inner, folder)


def _to_whole(model: Any, folder: Path) -> None:
    """Of a language model that is part of one that takes images too, PEFT's files are to fit the whole model."""
    if (tower := getattr(model, "fitune_tower", None)) is not None:
        _rewrite(folder, folder, towers.whole_adapter, tower)


def _rewrite(source: Path, target: Path, how: Any, tower: towers.Tower) -> None:
    stored, settings = safe.load(source / WEIGHTS), _read_json(source / PEFT_CONFIG)
    renamed, settings = how(stored, settings, tower)
    save_file({renamed[name]: tensor for name, tensor in stored.items()}, target / WEIGHTS, metadata={"format": "pt"})
    (target / PEFT_CONFIG).write_text(json.dumps(settings, indent=2), encoding="utf-8")


@contextmanager
def _of_language_model(model: Any, folder: Path) -> Iterator[Path]:
    """An adapter folder whose files fit the language model alone: itself, or a copy that is gone afterwards."""
    tower = getattr(_inner(model), "fitune_tower", None)
    if tower is None or not (folder / PEFT_CONFIG).is_file():
        yield folder
        return
    with tempfile.TemporaryDirectory() as place:
        modules = [name for name, _ in _inner(model).named_modules()]
        _rewrite(folder, Path(place), partial(towers.language_adapter, modules=modules), tower)
        if (folder / ENCODER).is_file():
            shutil.copyfile(folder / ENCODER, Path(place) / ENCODER)
        yield Path(place)


def stored(model: Any, folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter folder, as the model calls them."""
    with _of_language_model(model, folder) as place:
        return safe.load(place / WEIGHTS)


def put(model: Any, folder: Path) -> Any:
    """The model with what a folder holds; every tensor must find its place.

    Raises:
        ModelError: the folder holds no adapter, or one for another model.
    """
    own, peft = (folder / OWN_CONFIG).is_file(), (folder / PEFT_CONFIG).is_file()
    if not (own or peft) or not (folder / WEIGHTS).is_file():
        missing = WEIGHTS if own or peft else PEFT_CONFIG
        raise ModelError(f"{folder}: no {missing}", expected="an adapter folder (safetensors), PEFT's or fitune's")
    if (folder / NEW_IDS).is_file():
        new_tokens.add_rows(model, [NewToken("", i, (0,)) for i in _new_ids(folder)])
        _load_rows(model, folder)
    if own:
        return _put_own(model, folder)
    with _of_language_model(model, folder) as place:
        return _put_peft(model, place)


@torch.no_grad()
def _load_rows(model: Any, folder: Path) -> None:
    mine = new_tokens.rows(_inner(model))
    stored = safe.load(folder / NEW_ROWS) if (folder / NEW_ROWS).is_file() else {}
    _same_shapes(folder, mine, stored)
    for name, parameter in mine.items():
        parameter.copy_(stored[name])


def read_own(folder: Path) -> RunConfig:
    """The settings that attach what a folder of ours holds.

    Raises:
        ModelError: the file is broken.
    """
    path = folder / OWN_CONFIG
    try:
        return settings_only(read_json(path), model=str(folder))
    except (FileNotFoundError, ConfigError, Problems) as error:
        raise ModelError(f"{path}: broken", received=" ".join(str(error).split())[:200]) from None


def _new_ids(folder: Path) -> list[int]:
    """The ids of new tokens that an adapter folder has rows for.

    Raises:
        ModelError: the file holds something else.
    """
    path = folder / NEW_IDS
    ids: list[int] = read_json(path, kind=list)
    if not all(type(one) is int and 0 <= one < 2**31 for one in ids):
        raise ModelError(f"{path}: not a list of ids", received=shorten(ids), expected="[32000, 32001]")
    return ids


def _put_own(model: Any, folder: Path) -> Any:
    model = attach(model, read_own(folder))
    model.fitune_start = {name: tensor.clone() for name, tensor in trained(model).items()}  # for disabled()
    load_into(model, folder)
    return model


def _put_peft(model: Any, folder: Path) -> Any:
    try:
        wrapped = PeftModel.from_pretrained(model, str(folder), local_files_only=True)
    except Exception as error:  # PEFT raises many kinds; each is told as it is
        raise ModelError(
            f"{folder}: does not fit this base model", received=" ".join(str(error).split())[:400]
        ) from error
    _same_names(folder, set(get_peft_model_state_dict(wrapped, save_embedding_layers=False)))
    return wrapped


def _same_names(folder: Path, wanted: set[str]) -> None:
    with safe.opened(folder / WEIGHTS) as file:
        stored = set(file.keys())
    if stored != wanted:
        raise ModelError(
            f"{folder}: the adapter's tensors are not this model's",
            received=f"unknown: {sorted(stored - wanted)[:3]}, missing: {sorted(wanted - stored)[:3]}",
            fix="the same base model, method and settings as it was trained with",
        )


def locate(path: str) -> Path:
    """The adapter folder that a path means: itself, or that of a run.

    Raises:
        ModelError: there is none.
    """
    folder = expand(path)
    for place in (folder, folder / "adapter"):
        if (place / WEIGHTS).is_file():
            return place
    raise ModelError(f"{path}: no adapter here", expected=f"a run folder, or a folder with {WEIGHTS}")


@torch.no_grad()
def load_into(model: Any, folder: Path) -> None:
    """Give a model whose method is attached the values of an adapter folder, to go on from.

    Raises:
        ModelError: it was made by another method or with other settings.
    """
    here = new_tokens.ids(_inner(model))
    theirs = _new_ids(folder) if (folder / NEW_IDS).is_file() else []
    if here != theirs:
        raise ModelError(
            f"{folder}: has other new tokens than this run",
            received=f"ids {theirs or 'none'}",
            expected=f"ids {here or 'none'}",
            fix="give the same --new-tokens",
        )
    if here:
        _load_rows(model, folder)
    if isinstance(model, PeftModel) and not (folder / ENCODER).is_file():
        with _of_language_model(model, folder) as place:
            _load_peft(model, place)
        return
    _same_settings(folder, model)
    stored = safe.load(folder / (ENCODER if isinstance(model, PeftModel) else WEIGHTS))
    mine = _parameters(model)
    _same_shapes(folder, mine, stored)
    for name, parameter in mine.items():
        parameter.copy_(stored[name])


def _load_peft(model: Any, folder: Path) -> None:
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


def _same_settings(folder: Path, model: Any) -> None:
    """Raises ModelError where a setting that the shapes do not show differs: a scale, an activation function."""
    if isinstance(model, PeftModel):
        mine = model.peft_config[model.active_adapter].to_dict()
        stored = _read_json(folder / PEFT_CONFIG)
    else:
        mine, stored = model.fitune_method, _read_json(folder / OWN_CONFIG)
    plain = json.loads(json.dumps(mine, default=_plain))
    differing = [
        f"{name} {stored.get(name)} (this run: {plain.get(name)})"
        for name in sorted({*plain, *stored} - FREE)
        if (stored.get(name) or None) != (plain.get(name) or None)
    ]
    if differing:
        raise _other(folder, differing)


def _plain(value: Any) -> Any:
    """PEFT's enums and sets as they stand in a file."""
    return sorted(value) if isinstance(value, (set, frozenset)) else getattr(value, "value", str(value))


def _read_json(path: Path) -> dict[str, Any]:
    """The settings beside an adapter; none where there is no such file."""
    try:
        values: dict[str, Any] = read_json(path)
    except FileNotFoundError:
        return {}
    return values


def _same_shapes(folder: Path, mine: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    shapes = [{name: tuple(tensor.shape) for name, tensor in some.items()} for some in (mine, stored)]
    differing = sorted(name for name in {*mine, *stored} if shapes[0].get(name) != shapes[1].get(name))
    if differing:
        raise _other(folder, differing)


def _other(folder: Path, differing: list[str]) -> ModelError:
    return ModelError(
        f"{folder}: was trained by another method, or with other settings",
        received=f"differing: {', '.join(differing[:4])}",
        expected="the method, targets, ranks and sizes of this run",
        fix="give the same --method and its settings",
    )


# ---- several side by side, and none ----


def add(model: Any, folder: Path, name: str) -> None:
    """One more adapter of the same kind beside the one that is there; it is active from now on.

    Raises:
        ModelError: it is of another kind, or does not fit.
    """
    if (folder / NEW_IDS).is_file() or new_tokens.ids(_inner(model)):
        raise ModelError(f"{folder}: adapters with new tokens stand alone", fix="load it by itself")
    if isinstance(model, PeftModel) and (folder / PEFT_CONFIG).is_file():
        try:
            with _of_language_model(model, folder) as place:
                model.load_adapter(str(place), name, local_files_only=True)
        except Exception as error:
            raise ModelError(f"{folder}: does not fit beside", received=" ".join(str(error).split())[:300]) from error
        model.set_adapter(name)
        return
    if not (folder / OWN_CONFIG).is_file() or not any(bottleneck.wrappers(model)):
        raise ModelError(f"{folder}: cannot stand beside what is there", expected="an adapter of the same kind")
    bottleneck.add(model, families.of(model), read_own(folder).bottleneck, name)
    stored = safe.load(folder / WEIGHTS)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for key, value in stored.items():
            parameters[key.replace(f".adapters.{bottleneck.DEFAULT}.", f".adapters.{name}.")].copy_(value)


def switch(model: Any, name: str) -> None:
    """Make the adapter of that name the active one.

    Raises:
        ModelError: there is none of that name.
    """
    peft = isinstance(model, PeftModel)
    known = set(model.peft_config) if peft else {n for layer in bottleneck.wrappers(model) for n in layer.adapters}
    if name not in known:
        raise ModelError(f"no adapter {name!r} here", fix=did_you_mean(name, known) if known else None)
    if peft:
        model.set_adapter(name)
    else:
        bottleneck.switch(model, name)


@contextmanager
def disabled(model: Any) -> Iterator[None]:
    """Inside, the model is its base."""
    new_tokens.turn(_inner(model), on=False)
    try:
        with _method_disabled(model):
            yield
    finally:
        new_tokens.turn(_inner(model), on=True)


@contextmanager
def _method_disabled(model: Any) -> Iterator[None]:
    if isinstance(model, PeftModel):
        model.fitune_disabled = True
        try:
            with model.disable_adapter():
                yield
        finally:
            model.fitune_disabled = False
        return
    start = getattr(model, "fitune_start", None)
    if start is None:
        yield
        return
    now = {name: p for name, p in model.named_parameters() if name in start}
    kept = {name: p.data for name, p in now.items()}
    active = [(layer, layer.active) for layer in bottleneck.wrappers(model)]
    try:
        for name, parameter in now.items():
            parameter.data = start[name].to(parameter.device)
        bottleneck.switch(model, None)
        yield
    finally:
        for name, parameter in now.items():
            parameter.data = kept[name]
        for layer, name_ in active:
            layer.active = name_
