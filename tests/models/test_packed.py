"""Folders that hold a quantized model already, as people publish them: with lists of what was left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import fitune
from fitune.commands.merge import merge
from fitune.commands.train import train
from fitune.core.config import build
from fitune.core.errors import ConfigError
from fitune.core.options import QuantOptions
from fitune.models import quant as quants
from fitune.models.configs import quantized_as, read_config
from fitune.models.load import load_model, outline
from fitune.models.weights import tensors
from support import tiny

# unsloth's lists name parts of models that take images too, and whole blocks by their path
LISTS: dict[str, list[str] | None] = {
    "none": None,
    "empty": [],  # the output head is quantized too then, and made plain
    "parts of other models": ["lm_head", "multi_modal_projector", "merger", "modality_projection"],
    "a block by its path": ["lm_head", "multi_modal_projector", "model.layers.1.mlp", "model.layers.0.self_attn"],
    "names inside": ["lm_head", "down_proj", "vision_tower.transformer"],
}


def published(place: Path, skip: list[str] | None, kind: str = "llama", **how: Any) -> Path:
    """A folder as somebody else makes it: loaded quantized and saved by transformers."""
    plain, packed = tiny.save(kind, place / "plain"), place / "packed"
    how = how or {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = BitsAndBytesConfig(**how, llm_int8_skip_modules=skip)
    model = AutoModelForCausalLM.from_pretrained(str(plain), quantization_config=config, dtype=torch.float32)
    model.save_pretrained(str(packed))
    for path in plain.iterdir():
        if not (packed / path.name).exists() and path.suffix != ".safetensors":
            (packed / path.name).write_bytes(path.read_bytes())
    values = json.loads((packed / "config.json").read_text())
    values["quantization_config"]["llm_int8_skip_modules"] = skip
    (packed / "config.json").write_text(json.dumps(values))
    return packed


@pytest.mark.parametrize("name", LISTS)
def test_what_the_folder_left_out_is_planned_and_loaded(name: str, tmp_path: Path) -> None:
    folder = published(tmp_path, LISTS[name])
    loaded = load_model(folder)
    there = {layer for layer, _ in quants.layers(loaded)}
    config = read_config(folder)
    assert {layer for layer, _ in quants.layers(outline(config, precision="fp32"))} == there
    assert there
    assert type(loaded.lm_head) is torch.nn.Linear
    if name == "empty":
        assert "lm_head.weight.absmax" in dict(tensors(folder))
    assert any(".layers.1.mlp." in layer for layer in there) == (name != "a block by its path")
    assert any("down_proj" in layer for layer in there) == (name != "names inside")


def test_a_tied_head_that_the_list_does_not_name_stays_the_embedding(tmp_path: Path) -> None:
    loaded: Any = load_model(published(tmp_path, ["multi_modal_projector"], "qwen2"))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert type(loaded.lm_head) is torch.nn.Linear


@pytest.mark.parametrize("name", ["empty", "a block by its path"])
def test_it_plans_trains_and_merges(name: str, tmp_path: Path) -> None:
    folder, data = published(tmp_path, LISTS[name]), tiny.write_rows(tmp_path / "rows.jsonl", 20)
    settings: dict[str, Any] = {"model": str(folder), "data": [str(data)], "max_steps": 2, "precision": "fp32"}
    assert fitune.plan(**settings).needed > 0
    run = train(build({**settings, "output": str(tmp_path / "run")}))
    assert merge(run.run, tmp_path / "merged").merge_error <= 1e-5


def test_int8_and_other_settings_of_the_folder_are_kept(tmp_path: Path) -> None:
    folder = published(tmp_path / "a", ["lm_head", "merger", "model.layers.1"], load_in_8bit=True)
    there = {layer for layer, _ in quants.layers(load_model(folder))}
    assert there
    assert not any(".layers.1." in layer for layer in there)
    folder = published(
        tmp_path / "b",
        ["lm_head", "merger"],
        load_in_4bit=True,
        bnb_4bit_quant_type="fp4",
        bnb_4bit_quant_storage=torch.bfloat16,
    )
    options = quantized_as(read_config(folder))
    assert (options.name, options.kind, options.double, options.storage) == ("nf4", "fp4", False, "bf16")
    made, loaded = outline(read_config(folder), precision="bf16"), load_model(folder, precision="bf16")
    sizes = {name: (p.dtype, p.shape) for name, p in made.named_parameters()}
    assert sizes == {name: (p.dtype, p.shape) for name, p in loaded.named_parameters()}


def test_a_users_list_names_layers_from_the_beginning_and_inside(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "llama")
    shape = tiny.make_model("llama")
    for skip, left in (("model.layers.1.mlp", ".layers.1.mlp."), ("layers.1.mlp", ".layers.1.mlp."), ("mlp", ".mlp.")):
        planned = quants.planned(shape, QuantOptions(name="nf4", skip=[skip]))
        assert not any(left in name for name in planned)
        assert len(planned) == (12 if skip == "mlp" else 18)
    assert len(quants.planned(shape, QuantOptions(name="nf4", skip=["model.layers.1.mlp.up_proj"]))) == 20
    for wrong in ("layers.1.ml", "multi_modal_projector", "odel.layers.1"):  # the user's own may not match nothing
        with pytest.raises(ConfigError, match=f"quant.skip: '{wrong}' matches no linear layer"):
            load_model(folder, quant=QuantOptions(name="nf4", skip=[wrong]))
