"""What was tuned, as files. An adapter of a language model that is part of a larger model fits the whole model."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from fitune.models import attached
from fitune.models.adapters.attach import trained
from fitune.models.adapters.files import ENCODER, NEW_IDS, NEW_ROWS, OWN_CONFIG, PEFT_CONFIG, WEIGHTS, read_settings
from fitune.models.families import towers
from fitune.models.family import Tower
from fitune.models.interfaces import causal_lm, peft_of
from fitune.models.methods import lora, new_tokens
from fitune.models.weights import safe
from fitune.models.weights.safe import Late

# tensors, settings, the place of the language model -> new names by old ones, new settings
Renaming = Callable[[dict[str, Tensor], dict[str, object], Tower], tuple[dict[str, str], dict[str, object]]]


@torch.no_grad()  # an LSTM takes another way with gradients, and its bits are to be those of inference
def save(model: nn.Module, folder: Path, late: Mapping[str, Late] | None = None) -> None:
    """Write everything that was tuned into a folder; `adapters` lists the files.

    Args:
        model: with a method on it.
        folder: gets the files.
        late: of a model in parts what fitune's own method trained, each made whole when its turn comes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    inner = causal_lm(model)
    if new_tokens.ids(inner):
        save_file({name: p.cpu().contiguous() for name, p in new_tokens.rows(inner).items()}, folder / NEW_ROWS)
        (folder / NEW_IDS).write_text(json.dumps(new_tokens.ids(inner)), encoding="utf-8")
    peft = peft_of(model)
    if peft is None:
        if late is not None:
            safe.write(folder / WEIGHTS, late, {"format": "pt"})
        else:
            save_file(trained(model), folder / WEIGHTS, metadata={"format": "pt"})
        (folder / OWN_CONFIG).write_text(json.dumps(attached.of(model).method, indent=1), encoding="utf-8")
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
    peft.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    if len(trained(model)) > 1 and peft._is_prompt_learning:
        save_file(trained(model), folder / ENCODER)
    _to_whole(inner, folder)


def _to_whole(model: nn.Module, folder: Path) -> None:
    """Rename PEFT's files for the whole model, where the language model is part of one that takes images too."""
    if (tower := attached.of(model).tower) is not None:
        _rewrite(folder, folder, towers.whole_adapter, tower)


def _rewrite(source: Path, target: Path, rename: Renaming, tower: Tower) -> None:
    stored, settings = safe.load(source / WEIGHTS), read_settings(source / PEFT_CONFIG)
    renamed, settings = rename(stored, settings, tower)
    save_file({renamed[name]: tensor for name, tensor in stored.items()}, target / WEIGHTS, metadata={"format": "pt"})
    (target / PEFT_CONFIG).write_text(json.dumps(settings, indent=2), encoding="utf-8")


@contextmanager
def for_language_model(model: nn.Module, folder: Path) -> Iterator[Path]:
    """An adapter folder whose files fit the language model alone: itself, or a copy that is gone afterwards."""
    tower = attached.of(model).tower
    if tower is None or not (folder / PEFT_CONFIG).is_file():
        yield folder
        return
    with tempfile.TemporaryDirectory() as place:
        modules = [name for name, _ in causal_lm(model).named_modules()]
        _rewrite(folder, Path(place), partial(towers.language_adapter, modules=modules), tower)
        if (folder / ENCODER).is_file():
            shutil.copyfile(folder / ENCODER, Path(place) / ENCODER)
        yield Path(place)


def stored(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter folder, as the model calls them."""
    with for_language_model(model, folder) as place:
        return safe.load(place / WEIGHTS)
