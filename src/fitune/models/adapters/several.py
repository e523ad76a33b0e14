"""Several adapters side by side on one model, one of them active; or none, so that the model is its base model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftConfig
from torch import nn

from fitune.core.errors import ModelError, did_you_mean
from fitune.models import attached, families
from fitune.models.adapters.files import NEW_IDS, OWN_CONFIG, PEFT_CONFIG, WEIGHTS, read_own
from fitune.models.adapters.save import for_language_model
from fitune.models.interfaces import causal_lm, peft_of
from fitune.models.methods import adapter as bottleneck
from fitune.models.methods import misread, new_tokens
from fitune.models.weights import safe


def add(model: nn.Module, folder: Path, name: str) -> None:
    """Load one more adapter of the same method beside the one that is there, and make it the active one.

    Raises:
        ModelError: it is of another method, or does not fit.
    """
    if (folder / NEW_IDS).is_file() or new_tokens.ids(causal_lm(model)):
        raise ModelError(f"{folder}: an adapter with new tokens cannot be loaded beside another", fix="load it alone")
    peft = peft_of(model)
    if peft is not None and (folder / PEFT_CONFIG).is_file():
        try:
            with for_language_model(model, folder) as place:
                settings = PeftConfig.from_pretrained(str(place), local_files_only=True)
                layers = misread.take_out(settings, model)
                if layers:
                    peft.add_adapter(name, settings)
                    misread.load(peft, layers, place / WEIGHTS, name)
                else:
                    peft.load_adapter(str(place), name, local_files_only=True)
        except Exception as error:
            raise ModelError(
                f"{folder}: does not fit beside the adapter that is loaded", received=" ".join(str(error).split())[:300]
            ) from error
        peft.set_adapter(name)
        return
    if not (folder / OWN_CONFIG).is_file() or not any(bottleneck.wrappers(causal_lm(model))):
        raise ModelError(
            f"{folder}: cannot be loaded beside the adapter that is there", expected="an adapter of the same method"
        )
    inner = causal_lm(model)
    bottleneck.add(inner, families.of(inner), read_own(folder).bottleneck, name)
    stored = safe.load(folder / WEIGHTS)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for key, value in stored.items():
            parameters[key.replace(f".adapters.{bottleneck.DEFAULT}.", f".adapters.{name}.")].copy_(value)


def switch(model: nn.Module, name: str) -> None:
    """Make the adapter of that name the active one.

    Raises:
        ModelError: there is none of that name.
    """
    peft = peft_of(model)
    own = {name for layer in bottleneck.wrappers(causal_lm(model)) for name in layer.adapters}
    known = own if peft is None else set(peft.peft_config)
    if name not in known:
        raise ModelError(f"no adapter {name!r} here", fix=did_you_mean(name, known) if known else None)
    if peft is None:
        bottleneck.switch(causal_lm(model), name)
    else:
        peft.set_adapter(name)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the model is its base model: no method, no rows of new tokens."""
    new_tokens.turn(causal_lm(model), on=False)
    try:
        with _method_disabled(model):
            yield
    finally:
        new_tokens.turn(causal_lm(model), on=True)


@contextmanager
def _method_disabled(model: nn.Module) -> Iterator[None]:
    known, peft = attached.of(model), peft_of(model)
    if peft is not None:
        known.disabled = True
        try:
            with peft.disable_adapter():
                yield
        finally:
            known.disabled = False
        return
    start = known.start
    if start is None:
        yield
        return
    now = {name: p for name, p in model.named_parameters() if name in start}
    kept = {name: p.data for name, p in now.items()}
    active = [(layer, layer.active) for layer in bottleneck.wrappers(causal_lm(model))]
    try:
        for name, parameter in now.items():
            parameter.data = start[name].to(parameter.device)
        bottleneck.switch(causal_lm(model), None)
        yield
    finally:
        for name, parameter in now.items():
            parameter.data = kept[name]
        for layer, name_ in active:
            layer.active = name_
