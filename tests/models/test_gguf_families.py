"""Every family that llama.cpp has: its logits are those of transformers, also where positions are stretched."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fitune.commands.export_gguf import drafted
from fitune.commands.same_answers import GELU, NOISE, TABLE
from fitune.core.errors import ModelError
from fitune.models.handover.gguf import architectures, llamacpp, readback
from support import taught, tiny
from support.taught import KINDS, TAUGHT, made

ROOT = Path(__file__).parents[2]

needs_llama_cpp = pytest.mark.skipif(
    not llamacpp.installed(), reason="llama-cpp-python (the extra `verify`) is not installed"
)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 10000.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
ROPES: dict[str, dict[str, Any]] = {
    "base": {"rope_type": "default", "rope_theta": 500_000.0},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "yarn": YARN,
    "yarn with a factor of its own": {**YARN, "attention_factor": 1.3},
    "llama3": LLAMA3,
}


LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 256,
    "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 4.0, 8.0],
}  # fmt: skip


def written(model: Any, folder: Path, tmp_path: Path) -> Path:
    model.save_pretrained(str(folder))
    tiny.make_tokenizer().save_pretrained(str(folder))
    plan = drafted(folder, "a")
    plan.write(tmp_path / "a.gguf", "f32")
    assert readback.differences(tmp_path / "a.gguf", plan, "f32") == []
    return tmp_path / "a.gguf"


def off(model: Any, file: Path, length: int, context: int = 256, first: int = 0) -> float:
    """The largest difference of the logits behind each token from the first on, relative to the largest logit."""
    torch.manual_seed(1)
    ids = torch.randint(5, 400, (length,)).tolist()
    with torch.no_grad():
        here = model(input_ids=torch.tensor([ids])).logits[0].numpy()[first:]
    with llamacpp.LlamaCpp(file, context) as other:
        there = np.stack([other.logits(ids[: n + 1]) for n in range(first, length)])
    return float(np.abs(here - there).max() / np.abs(here).max())


def stirred(model: Any) -> Any:
    """With weights of norms, sinks and choices of experts that are not all alike."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "norm" in name or name.endswith(("sinks", "e_score_correction_bias")):
                tensor.add_(0.2 * torch.rand_like(tensor))
    return model


@needs_llama_cpp
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    model = stirred(made(kind))
    file = written(model, tmp_path / "model", tmp_path)
    plan = drafted(tmp_path / "model", "a")
    bound = TABLE if plan.architecture.arch in GELU else NOISE
    assert off(model, file, min(40, plan.context)) < bound


QUICK = ("llama", "gpt2")
EACH = [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.full) for kind in TAUGHT]


@needs_llama_cpp
@pytest.mark.parametrize("kind", EACH)
def test_greedy_answers_are_those_of_chat(kind: str, tmp_path: Path) -> None:
    """The whole `--verify`, of models that are sure of their answers: no place is let pass as a tie."""
    sure(taught.compared(kind, tmp_path))


def sure(row: taught.Row) -> None:
    """All equal, and that says something: answers are long walks, all but a few are different, none hangs by a hair."""
    assert (row.prompts_same, row.prompts, row.tokens) == (200, 200, 12_800)
    assert (row.strings_same, row.ties) == (row.strings, 0)
    assert row.distinct > 32
    assert row.answers > 180
    assert row.margin > 2 * row.logits


def test_the_results_are_of_every_family_and_all_equal() -> None:
    rows = taught.read(ROOT / "results" / "gguf_families.json")
    assert [row.family for row in rows] == TAUGHT
    for row in rows:
        sure(row)


def test_an_answer_that_hangs_by_a_hair_says_nothing() -> None:
    row = taught.read(ROOT / "results" / "gguf_families.json")[0]
    for fault in (
        {"prompts_same": 199}, {"tokens": 12_799}, {"ties": 1}, {"distinct": 2}, {"answers": 1}, {"margin": row.logits},
    ):  # fmt: skip
        with pytest.raises(AssertionError):
            sure(replace(row, **fault))


@pytest.mark.parametrize("language", ["", ".zh-CN"])
def test_the_page_says_what_was_found(language: str) -> None:
    text = (ROOT / "docs" / f"export{language}.md").read_text(encoding="utf-8")
    table = text.split("<!-- scripts/gguf_families.py -->\n")[1].split("\n<!-- end -->")[0]
    rows = taught.read(ROOT / "results" / "gguf_families.json")
    assert table == "\n".join(taught.lines(rows, language)), "python scripts/gguf_families.py --write"


@needs_llama_cpp
@pytest.mark.parametrize("rope", ROPES)
def test_stretched_positions(rope: str, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2, rope_parameters=ROPES[rope],
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    assert off(model, written(model, tmp_path / "model", tmp_path), 120) < NOISE


@needs_llama_cpp
def test_positions_that_are_stretched_frequency_by_frequency(tmp_path: Path) -> None:
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, original_max_position_embeddings=256, pad_token_id=0,
        initializer_range=0.2, rope_parameters=LONG, sliding_window=None,
    )  # fmt: skip
    model = Phi3ForCausalLM(config).eval()
    file = written(model, tmp_path / "model", tmp_path)
    assert any("more than 256 tokens" in note for note in drafted(tmp_path / "model", "a").notes)
    assert off(model, file, 40) < NOISE  # short
    assert off(model, file, 300, context=512, first=290) < NOISE  # long


def test_a_stretch_that_llama_cpp_has_not(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    config = (
        (folder / "config.json").read_text().replace('"rope_type": "default"', '"rope_type": "dynamic", "factor": 2.0')
    )
    (folder / "config.json").write_text(config)
    with pytest.raises(ModelError, match="stretched in a way"):
        drafted(folder, "a")


def test_settings_that_it_computes_otherwise_are_named(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    config = (folder / "config.json").read_text().replace('"silu"', '"relu"')
    (folder / "config.json").write_text(config)
    with pytest.raises(ModelError, match="otherwise than transformers") as error:
        drafted(folder, "a")
    assert "activation relu" in str(error.value)


def test_a_window_that_it_has_not_ends_the_context(tmp_path: Path) -> None:
    assert drafted(tiny.save("mistral", tmp_path / "mistral"), "a").context == 8
    assert drafted(tiny.save("gemma3", tmp_path / "gemma3"), "a").context == 256


@pytest.mark.parametrize(("target", "goes"), [("q_proj", True), ("in_proj_qkv", False), ("out_proj", False)])
def test_an_adapter_alone_goes_where_its_rows_can_follow(target: str, goes: bool, tmp_path: Path) -> None:
    """Qwen3.5's value heads stand otherwise in llama.cpp: rows of a whole tensor can be moved, not those of A and B."""
    from peft import LoraConfig, get_peft_model

    from fitune.models.handover.gguf import lora

    model = made("qwen3_5")
    config = model.config
    adapter = LoraConfig(r=2, target_modules=[target], task_type="CAUSAL_LM")
    get_peft_model(model, adapter).save_pretrained(str(tmp_path / "adapter"))
    if goes:
        assert lora.draft(tmp_path / "adapter", "a", config)[0] == "qwen35"
        return
    with pytest.raises(ModelError, match="no pair of A and B can follow"):
        lora.draft(tmp_path / "adapter", "a", config)


def test_every_row_of_the_table_is_tried() -> None:
    texts = {"gemma3": "gemma3_text", "qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}
    assert set(architectures.TABLE) <= {texts.get(kind, kind) for kind in KINDS}


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["gpt_oss", "deepseek_v3"])
def test_yarn_of_kinds_that_have_more_of_it(kind: str, tmp_path: Path) -> None:
    """DeepSeek's scale of the scores; gpt-oss's blend where it is rounded, as llama.cpp rounds it."""
    more = {"mscale": 0.707, "mscale_all_dim": 0.707} if kind == "deepseek_v3" else {"truncate": True}
    model = stirred(made(kind, rope_parameters={**YARN, "beta_fast": 32.0, "beta_slow": 1.0, **more}))
    assert off(model, written(model, tmp_path / "model", tmp_path), 120) < NOISE


def test_a_blend_that_is_rounded_there_is_named(tmp_path: Path) -> None:
    made("gpt_oss", rope_parameters={**YARN, "truncate": False}).save_pretrained(str(tmp_path / "model"))
    tiny.make_tokenizer().save_pretrained(str(tmp_path / "model"))
    assert any("rounds the frequencies" in note for note in drafted(tmp_path / "model", "a").notes)


@pytest.mark.parametrize(
    ("kind", "settings", "named"),
    [
        ("cohere2", {"layer_types": ["full_attention"] * 4}, "three of each four"),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}, "without positions"),
        ("gpt_oss", {"layer_types": ["full_attention"] * 3}, "every second one"),
        (
            "qwen3_5",
            {"layer_types": ["linear_attention", "full_attention", "full_attention", "linear_attention"]},
            "2th",
        ),
        ("deepseek_v2", {"q_lora_rank": None}, "q_lora_rank null"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm"),
        ("olmoe", {"num_key_value_heads": 2}, "2 heads of keys"),
    ],
)
def test_shapes_of_new_kinds_that_it_has_not(kind: str, settings: dict[str, Any], named: str, tmp_path: Path) -> None:
    made(kind, **settings).save_pretrained(str(tmp_path / "model"))
    tiny.make_tokenizer().save_pretrained(str(tmp_path / "model"))
    with pytest.raises(ModelError, match="otherwise than transformers") as error:
        drafted(tmp_path / "model", "a")
    assert named in str(error.value)
