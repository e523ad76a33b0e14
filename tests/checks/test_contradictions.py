"""Folders whose files contradict each other: which ChatGLM, which type, which classes. Named in every verb alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from transformers import GlmConfig, GlmForCausalLM

import fitune
from fitune.checks.contradictions import contradictions
from fitune.commands.inspect import inspect as look
from fitune.commands.train import train
from fitune.core.config import build
from fitune.core.errors import ConfigError, Problems
from fitune.data import tokenizer as tokenizers
from fitune.data.templates import choose
from fitune.models.families import original
from support import tiny


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small sentencepiece file, as ChatGLM2's is one."""
    place = tmp_path_factory.mktemp("words")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(tiny.TEXT), model_prefix=str(place / "tokenizer"), vocab_size=340, byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return place / "tokenizer.model"


def chatglm(place: Path, vocabulary: Path, config: dict[str, Any], settings: dict[str, Any]) -> Path:
    """A random ChatGLM2 or 3 in its published layout."""
    place.mkdir()
    (place / "tokenizer.model").write_bytes(vocabulary.read_bytes())
    settings = {"tokenizer_class": "ChatGLMTokenizer", **settings}
    (place / "tokenizer_config.json").write_text(json.dumps(settings))
    words = tokenizers.load(place)
    torch.manual_seed(0)
    model = GlmForCausalLM(
        GlmConfig(
            vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, attention_bias=True, max_position_embeddings=512, pad_token_id=0,
        )
    )  # fmt: skip
    from safetensors.torch import save_file

    state = model.state_dict()
    save_file(
        {n: t.contiguous() for n, t in original.published(state, lambda n: state[n])}, place / "model.safetensors"
    )
    values = {**original.published_config(model.config), **config}
    (place / "config.json").write_text(json.dumps(values))
    return place


BOTH = {"_name_or_path": "THUDM/chatglm3-6b"}, {"name_or_path": "THUDM/chatglm2-6b"}


def test_two_chatglms_in_one_folder_are_named_and_asked_for(vocabulary: Path, tmp_path: Path) -> None:
    folder = chatglm(tmp_path / "model", vocabulary, *BOTH)
    data = tiny.write_rows(tmp_path / "rows.jsonl", 20)
    settings: dict[str, Any] = {"model": str(folder), "data": [str(data)], "precision": "fp32"}
    message = (
        r"chatglm2 and chatglm3, whose prompts differ[\s\S]*names THUDM/chatglm2-6b[\s\S]*--template chatglm2 or --temp"
    )
    verbs = {
        "train": lambda: train(build({**settings, "max_steps": 1, "output": str(tmp_path / "run")})),
        "plan": lambda: fitune.plan(**settings),
        "inspect": lambda: look(build(settings)),
        "chat": lambda: fitune.load(str(folder)),
    }
    for call in verbs.values():
        with pytest.raises((ConfigError, Problems), match=message):
            call()
    # the template that is named is taken, and the contradiction still reported
    done = train(build({**settings, "template": "chatglm3", "max_steps": 1, "output": str(tmp_path / "run")}))
    template = json.loads((Path(done.run) / "template.json").read_text())
    assert template["name"] == "chatglm3"
    seen = look(build({**settings, "template": "chatglm2"}))
    (found,) = (one for one in seen.findings if one.rule == "folder")
    assert found.level == "warn"
    assert "config.json names THUDM/chatglm3-6b" in found.text
    assert fitune.plan(**settings, template="chatglm3").needed > 0
    assert fitune.load(done.run).template.name == "chatglm3"


@pytest.mark.parametrize(
    ("config", "settings", "family"),
    [
        ({"_name_or_path": "THUDM/chatglm3-6b"}, {"name_or_path": "THUDM/chatglm3-6b-base"}, "chatglm3"),
        ({"_name_or_path": "THUDM/chatglm3-6b"}, {}, "chatglm3"),
        ({}, {"name_or_path": "THUDM/chatglm2-6b-32k"}, "chatglm2"),
        ({}, {}, "chatglm2"),
    ],
)
def test_files_that_agree_need_no_name(
    config: dict[str, Any], settings: dict[str, Any], family: str, vocabulary: Path, tmp_path: Path
) -> None:
    folder = chatglm(tmp_path / "model", vocabulary, config, settings)
    assert choose("auto", tokenizers.load(folder)).name == family
    assert contradictions(folder) == []
    tokenizers.load(folder).save_pretrained(str(tmp_path / "saved"))
    assert choose("auto", tokenizers.load(tmp_path / "saved")).name == family


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        ({"architectures": ["MistralForCausalLM"]}, {}, r"model_type is llama, architectures names MistralForCausalLM"),
        ({"architectures": ["Qwen2_5_VLForConditionalGeneration"]}, {}, r"a class of qwen2_5_vl"),
        (
            {"auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}},
            {},
            r"llama, auto_map names configuration_phi3",
        ),
        (
            {},
            {"tokenizer_class": "ChatGLMTokenizer"},
            r"model_type is llama; tokenizer_config.json: tokenizer_class is",
        ),
    ],
)
def test_types_and_classes_that_contradict_each_other(
    config: dict[str, Any], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    assert contradictions(folder) == []
    for name, changed in (("config.json", config), ("tokenizer_config.json", settings)):
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**values, **changed}))
    (text,) = contradictions(folder)
    assert message.replace("\\", "") in text


def test_what_is_only_unusual_is_no_contradiction(tmp_path: Path) -> None:
    """R1's distillations of Qwen have a Llama tokenizer; fine-tunes are named as their author likes."""
    folder = tiny.save("qwen2", tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    changed = {**settings, "tokenizer_class": "LlamaTokenizerFast", "name_or_path": "somebody/llama-like"}
    (folder / "tokenizer_config.json").write_text(json.dumps(changed))
    assert contradictions(folder) == []
    for kind in ("gpt2", "bloom", "gemma3", "glm4", "opt", "gpt_neox"):
        assert contradictions(tiny.save(kind, tmp_path / kind)) == []
