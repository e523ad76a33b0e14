"""Models that take images too: every verb works on their language model alone, or refuses by name."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    T5Config,
    T5ForConditionalGeneration,
)

import fitune
from fitune.commands.inspect import inspect as look
from fitune.commands.merge import merge
from fitune.commands.quantize import quantize
from fitune.commands.train import train
from fitune.core.config import build
from fitune.core.errors import ModelError, Problems, RunFolderError
from fitune.core.options import QuantOptions
from fitune.models import quant as quants
from fitune.models import weights
from fitune.models.configs import read_config
from fitune.models.families import towers
from fitune.models.load import load_model, outline
from support import every_type, tiny
from support.contract import IDS, apart, logits
from support.rounding import rounded_once_more

TEXT = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1,
}  # fmt: skip
THREE_AXES = {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
WINDOW = {**TEXT, "sliding_window": 8}
LINEAR = {
    **TEXT,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
ROTARY = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}
EYE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
QWEN_EYE = {
    "depth": 2, "hidden_size": 32, "embed_dim": 32, "num_heads": 4, "intermediate_size": 64, "out_hidden_size": 32,
    "patch_size": 14, "spatial_merge_size": 2, "fullatt_block_indexes": [1], "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}  # fmt: skip
CLIP, SIGLIP = {**EYE, "model_type": "clip_vision_model"}, {**EYE, "model_type": "siglip_vision_model"}
WHOLE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gemma3": ({**WINDOW, "model_type": "gemma3_text", "query_pre_attn_scalar": 8}, SIGLIP),
    "glm4v": ({**TEXT, "rope_parameters": ROTARY}, QWEN_EYE),
    "idefics3": ({**TEXT, "model_type": "llama"}, EYE),
    "internvl": ({**TEXT, "model_type": "qwen2"}, {**EYE, "image_size": [28, 28], "patch_size": [14, 14]}),
    "lfm2_vl": (
        {**TEXT, "model_type": "lfm2", "layer_types": ["conv", "full_attention", "conv"]},
        {**EYE, "model_type": "siglip2_vision_model"},
    ),
    "llava": ({**TEXT, "model_type": "llama"}, CLIP),
    "llava_next": ({**TEXT, "model_type": "mistral"}, CLIP),
    "llava_next_video": ({**TEXT, "model_type": "llama"}, CLIP),
    "llava_onevision": ({**TEXT, "model_type": "qwen2"}, SIGLIP),
    "mistral3": ({**TEXT, "model_type": "mistral"}, {**EYE, "model_type": "pixtral"}),
    "qwen2_5_vl": (THREE_AXES, QWEN_EYE),
    "qwen2_vl": (THREE_AXES, QWEN_EYE),
    "qwen3_5": (LINEAR, QWEN_EYE),
    "qwen3_vl": (THREE_AXES, QWEN_EYE),
    "smolvlm": ({**TEXT, "model_type": "llama"}, EYE),
    "video_llava": ({**TEXT, "model_type": "llama"}, CLIP),
    "vipllava": ({**TEXT, "model_type": "llama"}, CLIP),
}
# made from their own config classes; of EXPERTS the files hold each expert, the model all of a block in one tensor
EXPERTS = ("aria", "qwen3_5_moe", "qwen4_exp")
MADE = (
    "deepseek_vl", "exaone4_5", "gemma4", "gemma4_unified", "idefics2", "janus", "lighton_ocr", "llama4", "minicpmv4_6",
    "ovis2", "video_llama_3", *EXPERTS,
)  # fmt: skip
FEW = ("gemma3", "qwen2_5_vl")


def make(kind: str, **more: Any) -> Any:
    """A random model of that kind, eyes and all."""
    if kind in MADE:
        return every_type.whole_of(kind, **more)
    text, eye = WHOLE[kind]
    config = CONFIG_MAPPING[kind](text_config=dict(text), vision_config=dict(eye), **more)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


@cache
def whole(kind: str) -> Any:
    return make(kind)


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(str(folder))
    tiny.make_tokenizer().save_pretrained(str(folder))
    return folder


@torch.no_grad()
def text_logits(model: Any) -> torch.Tensor:
    """The whole model's own forward on text."""
    logits: torch.Tensor = model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    return logits


def test_every_kind_of_the_table_is_tried() -> None:
    assert {*WHOLE, *MADE} == set(towers.TABLE)


def every() -> list[Any]:
    rare = [kind for kind in MADE if kind not in ("gemma4", "llama4")]
    return [*WHOLE, "gemma4", "llama4", *(pytest.param(kind, marks=pytest.mark.full) for kind in rare)]


@pytest.mark.parametrize("kind", every())
def test_the_language_model_gives_the_logits_of_the_whole_one(kind: str, tmp_path: Path) -> None:
    folder = save(whole(kind), tmp_path / "model")
    mine = load_model(folder)
    assert apart(logits(mine), text_logits(whole(kind)), "fp32") <= 1e-5
    paths = {name for name, _ in whole(kind).named_modules()}
    assert towers.TABLE[kind].path in paths
    assert {name: tuple(p.shape) for name, p in outline(read_config(folder), precision="fp32").named_parameters()} == {
        name: tuple(p.shape) for name, p in mine.named_parameters()
    }
    assert not any("vision" in name or "visual" in name for name in mine.state_dict())
    # merging finds the place of every tensor
    there = {towers.language_name(name) for name, _ in weights.tensors(folder)}
    assert kind in EXPERTS or mine.state_dict().keys() - {"lm_head.weight"} <= there


@pytest.mark.parametrize("kind", FEW)
@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_tied_as_in_the_whole_model(kind: str, tied: bool, tmp_path: Path) -> None:
    model = make(kind, tie_word_embeddings=tied)
    mine: Any = load_model(save(model, tmp_path / "model"))
    assert (mine.lm_head.weight is mine.model.embed_tokens.weight) == tied
    assert apart(logits(mine), text_logits(model), "fp32") <= 1e-5


@pytest.mark.parametrize(
    "kind", [*(pytest.param(kind, marks=pytest.mark.full) for kind in (FEW[0], "gemma4", "llama4")), FEW[1]]
)  # quick: positions of three axes
def test_every_verb_works_on_the_language_model(kind: str, tmp_path: Path) -> None:
    folder, data = save(whole(kind), tmp_path / "model"), tiny.write_rows(tmp_path / "rows.jsonl", 20)
    (folder / "preprocessor_config.json").write_text("{}")
    settings: dict[str, Any] = {
        "model": str(folder),
        "data": [str(data)],
        "max_steps": 3,
        "precision": "fp32",
        "lr": 1e-2,
    }
    assert fitune.plan(**settings).needed > 0
    assert look(build({k: settings[k] for k in ("model", "data")})).findings
    run = train(build({**settings, "output": str(tmp_path / "run")})).run
    found = {one["rule"]: one for one in json.loads((Path(run) / "data.json").read_text())["findings"]}
    assert found["language-model"]["level"] == "fixed"
    chunked = kind == "llama4"  # attention in chunks from the start of a row, which a flat batch does not have
    assert found["packing-leak"]["text"].startswith("flat batches") or chunked

    # PEFT puts the saved adapter on the whole model, and on its language model alone
    tuned = fitune.load(run)
    after = logits(tuned.model)
    theirs = PeftModel.from_pretrained(make(kind), str(Path(run) / "adapter")).eval()
    assert apart(text_logits(theirs), after, "fp32") <= 1e-5
    assert (after - text_logits(whole(kind))).abs().max() > 1e-3
    adapted = {name for name, module in theirs.named_modules() if hasattr(module, "lora_A")}
    assert len(adapted) == (4 if chunked else 6)  # of two blocks, or three; Gemma 4 has four, which share values
    assert all(".language_model." in name for name in adapted)
    assert isinstance(fitune.generate(run, "Hello"), str)
    assert fitune.evaluate(run, [str(data)], answer=False).scores.loss > 0

    # merged it is the whole model again: the tower bit for bit, the language model tuned
    done = merge(run, tmp_path / "merged")
    close = 1e-5 if kind not in MADE else max(1e-5, 3 * rounded_once_more(Path(run)))  # wide heads show each rounding
    assert done.merge_error <= close
    assert (tmp_path / "merged" / "preprocessor_config.json").is_file()
    again = AutoModelForImageTextToText.from_pretrained(str(tmp_path / "merged"), dtype=torch.float32)
    assert apart(text_logits(again), after, "fp32") <= close
    others = {n: p for n, p in again.named_parameters() if "language_model." not in n and "lm_head" not in n}
    assert len(others) > 10
    assert all(torch.equal(p, dict(whole(kind).named_parameters())[n]) for n, p in others.items())
    assert apart(logits(load_model(tmp_path / "merged")), after, "fp32") <= close

    # an adapter is gone on from, and one that PEFT made on the whole model is taken
    train(build({**settings, "adapter": run, "output": str(tmp_path / "on")}))
    with pytest.raises(ModelError, match="takes images too, and fitune quantizes language models alone"):
        quantize(folder, tmp_path / "packed")


def test_an_adapter_that_tunes_the_tower_too_is_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    folder = save(whole("gemma3"), tmp_path / "model")
    both = get_peft_model(make("gemma3"), LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    both.save_pretrained(str(tmp_path / "both"))
    with pytest.raises(ModelError, match=r"tunes other parts than the language model[\s\S]*vision_tower"):
        load_model(folder, adapter=tmp_path / "both")
    text = LoraConfig(target_modules=r".*language_model\..*\.(q_proj|v_proj)", r=2, init_lora_weights=False)
    only = get_peft_model(make("gemma3"), text).eval()
    only.save_pretrained(str(tmp_path / "only"))
    assert apart(logits(load_model(folder, adapter=tmp_path / "only")), text_logits(only), "fp32") <= 1e-5


@pytest.mark.parametrize("method", ["full", "prompt", "houlsby"])
def test_other_methods_are_saved_loaded_and_merged(method: str, tmp_path: Path) -> None:
    from support.contract import VARIANTS

    folder, data = save(whole("qwen2_5_vl"), tmp_path / "model"), tiny.write_rows(tmp_path / "rows.jsonl", 20)
    settings = {"model": str(folder), "data": [str(data)], "max_steps": 2, "precision": "fp32", **VARIANTS[method]}
    run = train(build({**settings, "output": str(tmp_path / "run")})).run
    after = logits(fitune.load(run).model)
    if method != "full":
        with pytest.raises(RunFolderError, match="cannot be merged"):
            merge(run, tmp_path / "merged")
        return
    merge(run, tmp_path / "merged")
    again = AutoModelForImageTextToText.from_pretrained(str(tmp_path / "merged"), dtype=torch.float32)
    assert apart(text_logits(again), after, "fp32") <= 1e-5


def test_quantized_while_read_and_quantized_by_others(tmp_path: Path) -> None:
    folder, data = save(whole("qwen2_5_vl"), tmp_path / "model"), tiny.write_rows(tmp_path / "rows.jsonl", 20)
    packed = load_model(folder, quant=QuantOptions(name="nf4"))
    assert len(list(quants.layers(packed))) == 21
    # as published: bnb-4bit folders of models that take images, with what was left out by its path in the whole model
    for name, eye in (("theirs", "model.visual"), ("eye too", "no_such_part")):
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            llm_int8_skip_modules=["lm_head", "multi_modal_projector", eye, "model.language_model.layers.1.mlp"],
        )
        how = {"quantization_config": config, "dtype": torch.float32}
        save(AutoModelForImageTextToText.from_pretrained(str(folder), **how), tmp_path / name)
    mine = load_model(tmp_path / "theirs")
    there = {name for name, _ in quants.layers(mine)}
    assert len(there) == 18
    assert not any(".layers.1.mlp." in name for name in there)
    assert {n for n, _ in quants.layers(outline(read_config(tmp_path / "theirs"), precision="fp32"))} == there
    settings = {"data": [str(data)], "max_steps": 1, "precision": "fp32", "sample_prompts": 0}
    run = train(build({**settings, "model": str(tmp_path / "theirs"), "output": str(tmp_path / "run")})).run
    other = train(build({**settings, "model": str(tmp_path / "eye too"), "output": str(tmp_path / "other")})).run
    with pytest.raises(RunFolderError, match="parts of it that fitune does not load are quantized"):
        merge(other, tmp_path / "merged")
    assert merge(run, tmp_path / "merged").merge_error <= 1e-5
    assert not any("absmax" in name for name in load_file(tmp_path / "merged" / "model.safetensors"))


VERBS = ("train", "plan", "inspect", "methods", "chat", "eval", "quantize", "export")


def verb(name: str, folder: Path, data: Path, place: Path) -> Any:
    """What a user would call, on a model folder."""
    from fitune.commands.evaluate import evaluate
    from fitune.commands.export import export
    from fitune.commands.methods import overview

    settings: dict[str, Any] = {"model": str(folder), "data": [str(data)], "precision": "fp32"}
    return {
        "train": lambda: fitune.train(**settings, max_steps=1, output=str(place / "run")),
        "plan": lambda: fitune.plan(**settings),
        "inspect": lambda: look(build({k: settings[k] for k in ("model", "data")})),
        "methods": lambda: overview(str(folder)),
        "chat": lambda: fitune.load(str(folder)),
        "eval": lambda: evaluate(str(folder), [str(data)], answer=False),
        "quantize": lambda: quantize(folder, place / "packed"),
        "export": lambda: export(folder, place / "out"),
    }[name]()


def test_what_is_not_known_is_refused_by_name_in_every_verb(tmp_path: Path) -> None:
    data = tiny.write_rows(tmp_path / "rows.jsonl", 20)
    paligemma = CONFIG_MAPPING["paligemma"](
        text_config={**TEXT, "model_type": "gemma"}, vision_config={**SIGLIP, "projection_dim": 32}
    )
    torch.manual_seed(0)
    other = save(AutoModelForImageTextToText.from_config(paligemma), tmp_path / "paligemma")
    t5 = T5Config(vocab_size=400, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    both_ways = save(T5ForConditionalGeneration(t5), tmp_path / "t5")
    for folder, message in (
        (other, "model_type 'paligemma' takes more than text, and its language model is not one"),
        (both_ways, "model_type 't5' is an encoder and a decoder"),
    ):
        for name in VERBS:
            with pytest.raises((ModelError, Problems)) as caught:
                verb(name, folder, data, tmp_path / name)
            assert message in str(caught.value), name
