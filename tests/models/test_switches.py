"""The attention is switched as transformers does it, but its walk through all modules is taken once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from fitune.models import attached
from fitune.models.kernels.attention import FLAT
from fitune.models.prepare import ready
from fitune.models.switches import SDPA, attention, for_rows
from support import tiny


def held(model: Any) -> dict[str, str]:
    """The attention of each module that has a config."""
    return {
        name: module.config._attn_implementation for name, module in model.named_modules() if hasattr(module, "config")
    }


def test_the_second_time_each_config_gets_what_transformers_gives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny.make_model("llama")
    walks: list[str] = []
    by_transformers = type(model).set_attn_implementation
    monkeypatch.setattr(
        type(model), "set_attn_implementation", lambda self, name: (walks.append(name), by_transformers(self, name))
    )
    before, seen = held(model), []
    for name in (FLAT, "eager", FLAT, "eager"):
        with attention(model, name):
            seen.append(held(model))
        assert held(model) == before
    assert seen[0] == seen[2] != seen[1] == seen[3]
    assert set(seen[0].values()) == {FLAT}
    assert walks == [FLAT, before[""], "eager"]  # one walk for each name, the one switched back to included


def test_configs_that_stand_in_others_are_switched_too() -> None:
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    towers = {
        "text_config": {**small, "vocab_size": 8},
        "vision_config": {**small, "image_size": 4, "patch_size": 2},
        "attn_implementation": SDPA,
    }
    model: Any = CLIPModel(CLIPConfig(**towers))
    for name in ("eager", SDPA, "eager", SDPA):
        switch(model, name)
        assert set(held(model).values()) == {name}
        assert {config._attn_implementation for config in (model.config.text_config, model.config.vision_config)} == {
            name
        }


def switch(model: Any, name: str) -> None:
    """Without a way back."""
    from fitune.models import switches

    switches._set(model, name)


def test_a_copy_of_a_model_switches_its_own_configs() -> None:
    model: Any = tiny.make_model("llama")
    with attention(model, FLAT), torch.no_grad():
        pass
    twin = copy.deepcopy(model)
    with attention(twin, FLAT):
        assert held(twin)[""] == FLAT
        assert held(model)[""] != FLAT
    assert attached.of(twin).attentions[FLAT][0][0] is twin.config


def test_scores_that_are_bent_are_never_sdpas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a class of models names SDPA, which leaves them as they are: Gemma 2's of transformers 5.17."""
    model: Any = tiny.make_model("gemma2")
    ids = torch.arange(5, 15)[None]
    with torch.no_grad(), attention(model, "eager"):
        expected = model(input_ids=ids).logits
    monkeypatch.setattr(type(model), "_supports_sdpa", True)
    model.set_attn_implementation(SDPA)
    ready(model)
    for name in (SDPA, "eager", SDPA):
        with torch.no_grad(), attention(model, name):
            assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-5)
    assert for_rows(tiny.make_model("llama")) == SDPA
