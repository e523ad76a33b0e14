"""Adapters go both ways between fitune and PEFT, with the same logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import fitune
from fitune.commands.train import train
from fitune.core.config import build
from fitune.core.errors import ConfigError, ModelError
from fitune.models import families, methods
from fitune.models.adapters import attach
from fitune.models.load import load_model
from support import tiny

IDS = torch.randint(5, 300, (1, 12), generator=torch.Generator().manual_seed(0))
QUICK = {("llama", "auto"), ("qwen2", "all-linear"), ("gpt2", "all-linear")}


# quick: a head of its own, a tied one, and layers that are Conv1D
RUNS = [
    pytest.param(kind, targets, marks=[] if (kind, targets) in QUICK else pytest.mark.full)
    for kind in ("llama", "qwen2", "gpt2")
    for targets in ("auto", "all-linear")
]


@pytest.mark.parametrize(("kind", "targets"), RUNS)
def test_peft_loads_what_fitune_trained(kind: str, targets: str, tmp_path: Path) -> None:
    model = tiny.save(kind, tmp_path / "model")
    data = tiny.write_rows(tmp_path / "rows.jsonl", 20)
    values = {"model": str(model), "data": [str(data)], "output": str(tmp_path / "run"), "max_steps": 3, "lr": 1e-2}
    train(build({**values, "lora": {"rank": 4, "targets": targets}, "sample_prompts": 0}))
    plain = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32).eval()
    base = plain(IDS).logits
    theirs = PeftModel.from_pretrained(plain, str(tmp_path / "run" / "adapter")).eval()(IDS).logits
    ours = load_model(model, adapter=tmp_path / "run" / "adapter")(IDS).logits
    assert torch.equal(ours, theirs)
    assert (ours - base).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("targets", ["auto", "all-linear", ["up_proj", "down_proj"]])
def test_lora_trains_exactly_its_closed_form_and_changes_nothing_at_the_start(kind: str, targets: object) -> None:
    if kind == "gpt2" and isinstance(targets, list):
        targets = ["c_fc"]
    model = tiny.make_model(kind)
    before = model(IDS).logits
    config = build({"model": "m", "data": ["d"], "lora": {"rank": 3, "targets": targets}})
    expected = methods.find("lora").expected(model, families.of(model), config)
    tuned = attach(model, config)
    assert {name: p.numel() for name, p in tuned.named_parameters() if p.requires_grad} == expected
    assert all("lora_" in name for name, p in tuned.named_parameters() if p.requires_grad)
    assert torch.equal(tuned(IDS).logits, before)


def test_a_target_that_matches_nothing_lists_near_names() -> None:
    config = build({"model": "m", "data": ["d"], "lora": {"targets": ["q_porj"]}})
    with pytest.raises(ConfigError, match="did you mean 'q_proj'"):
        attach(tiny.make_model("llama"), config)


@pytest.mark.shared
def test_a_published_adapter_has_the_same_logits_as_in_peft(shared: Path, tmp_path: Path) -> None:
    adapter = shared / "adapters" / "gpt2_causal_lora"
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config()).save_pretrained(str(tmp_path))  # the shape of gpt2; its weights are not at hand
    ours = fitune.load_model(tmp_path, adapter=adapter)
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(str(tmp_path), dtype=torch.float32), str(adapter)
    )
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, theirs.eval()(IDS).logits)
        with ours.disable_adapter():
            base = ours(IDS).logits
        assert (ours(IDS).logits - base).abs().max() > 1e-3


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    config = build({"model": "m", "data": ["d"]})
    attach(tiny.make_model("llama"), config).save_pretrained(str(tmp_path / "adapter"))
    tiny.make_model("gpt2").save_pretrained(str(tmp_path / "gpt2"))
    with pytest.raises(ModelError, match="adapter"):
        load_model(tmp_path / "gpt2", adapter=tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"no adapter_config\.json"):
        load_model(tmp_path / "gpt2", adapter=tmp_path / "gpt2")
