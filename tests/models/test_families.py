"""Every family, from folder to chat: it learns, is saved, resumed and merged exactly, and stops where it should."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import fitune
from fitune.checks import modelchecks
from fitune.commands.train import train
from fitune.core.config import build
from fitune.core.errors import ConfigError
from fitune.core.records import Sample
from fitune.data.batches import flat
from fitune.engine.checkpoint import RunFolder
from fitune.engine.step import hidden_states, loss_sum
from fitune.models import adapters, families, methods
from fitune.models.load import load_model
from fitune.models.parts import trainable
from fitune.models.prepare import ready
from support import tiny
from support.contract import config_for
from support.rounding import rounded_once_more
from support.stops import Crash, StopAt, crash

WHOLE = [*tiny.FAMILIES, *tiny.MORE, *tiny.UNKNOWN]
WAYS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "lora": {"targets": "all-linear"}},
    "freeze": {"method": "freeze", "freeze": {"blocks": 2, "norm": True}},
    "qlora": {"method": "lora", "lora": {"targets": "all-linear"}, "quant": "nf4"},
}
STEPS = {"max_steps": 14, "batch_size": 4, "lr": 1e-2, "save_every": 5, "sample_prompts": 0, "precision": "fp32"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Filled as they are asked for."""
    place = tmp_path_factory.mktemp("families")
    made: dict[str, Path] = {}

    class Made(dict):
        def __missing__(self, kind: str) -> Path:
            self[kind] = tiny.save(kind, place / kind)
            return self[kind]

    return Made(made)


def questions(path: Path) -> Path:
    """Two questions with one answer each, so that a tiny model learns them in a few steps."""
    rows = [("what is two?", "two is 2"), ("北国的首都？", "米拉")] * 12
    path.write_text("".join(json.dumps({"instruction": q, "output": a}, ensure_ascii=False) + "\n" for q, a in rows))
    return path


def ways() -> list[Any]:
    # rotary, Conv1D and two-stream; test_contract has every build, and a family that is found by its names trains below
    # freeze is resumed in test_methods
    # and test_quant has quantized weights from training to merging
    quick = {("lora", "gpt2"), ("lora", "chatglm")}
    return [
        pytest.param(way, kind, marks=[] if (way, kind) in quick else pytest.mark.full)
        for way in WAYS
        for kind in WHOLE
    ]


@pytest.mark.parametrize(("way", "kind"), ways())
def test_a_family_learns_and_is_saved_resumed_and_merged_exactly(
    way: str, kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    data = questions(tmp_path / "rows.jsonl")
    settings = {"model": str(folders[kind]), "data": [str(data)], **STEPS, **WAYS[way]}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = train(build({**settings, "output": str(whole)}))
    assert done.last_loss < 0.8 * done.first_loss
    with pytest.raises(Crash):
        train(build({**settings, "output": str(broken)}), watch=StopAt(7, crash))
    train(build({**settings, "output": str(broken)}), resume=True)
    adapter = [(run / "adapter" / "adapter_model.safetensors").read_bytes() for run in (whole, broken)]
    assert adapter[0] == adapter[1]
    assert [r.loss for r in RunFolder(whole).read_steps()] == [r.loss for r in RunFolder(broken).read_steps()]

    merged = fitune.merge(whole, tmp_path / "merged")
    assert merged.merge_error <= 1e-5
    assert merged.rounding_error <= 1e-5
    tuned, plain = fitune.load(whole), fitune.load(tmp_path / "merged")
    for question in ("what is two?", "北国的首都？"):
        assert fitune.generate(tuned, question, max_new_tokens=12) == fitune.generate(
            plain, question, max_new_tokens=12
        )

    # the answer ends at the stop token: with it forced to be next, nothing is left
    stop = tuned.encoder.stop_id
    head = plain.model.get_output_embeddings()
    hook = head.register_forward_hook(lambda m, i, out: out.index_fill(-1, torch.tensor([stop]), 1e4))
    assert fitune.generate(plain, "what is two?") == ""
    hook.remove()
    # what a chat sends is, id for id, what the rows were trained with
    rows = RunFolder(whole).read("data")["findings"]
    assert next(f for f in rows if f["rule"] == "template-parity")["level"] == "ok"


@pytest.mark.parametrize("kind", ["mistral", "gemma2", "gemma3", "phi3"])
def test_documents_longer_than_the_window_keep_it(kind: str) -> None:
    """In a flat batch a token sees as far as transformers lets it, and not farther."""
    model: Any = ready(tiny.make_model(kind))
    assert model.config.sliding_window == 8
    random = np.random.default_rng(0)
    long = [Sample(random.integers(5, 300, n).astype(np.int32), np.ones(n, bool)) for n in (40, 25)]
    with torch.no_grad():
        packed = hidden_states(model, flat(long, [0, 1]), "flat")
        alone = torch.cat([hidden_states(model, flat([one], [0]), "documents") for one in long])
        assert (packed - alone).abs().max() <= 1e-5
        wide = tiny.make_model(kind)
        for module in wide.modules():  # some keep it themselves, some look it up
            if getattr(module, "sliding_window", None):
                module.sliding_window = None
        wide.config.sliding_window = None
        unlimited = hidden_states(ready(wide), flat(long, [0, 1]), "flat")
    assert (packed - unlimited).abs().max() > 1e-2  # ignoring the window would be noticed


def test_ignoring_the_soft_cap_would_be_noticed() -> None:
    model: Any = ready(tiny.make_model("gemma2"))
    random = np.random.default_rng(0)
    rows = [Sample(random.integers(5, 300, n).astype(np.int32), np.ones(n, bool)) for n in (30, 12)]
    with torch.no_grad():
        capped = hidden_states(model, flat(rows, [0, 1]), "flat")
        for module in model.modules():
            if getattr(module, "attn_logit_softcapping", None):
                module.attn_logit_softcapping = None
        assert (hidden_states(model, flat(rows, [0, 1]), "flat") - capped).abs().max() > 1e-2


@pytest.mark.parametrize("kind", [*tiny.PARTIAL, "stablelm"])
def test_experts_and_hybrids_get_the_probes_decision_and_train_with_lora(kind: str, tmp_path: Path) -> None:
    folder = tiny.save(kind, tmp_path / kind)
    data = questions(tmp_path / "rows.jsonl")
    run = tmp_path / "run"
    done = train(build({"model": str(folder), "data": [str(data)], **STEPS, "output": str(run)}))
    assert done.last_loss < 0.95 * done.first_loss
    found = {finding["rule"]: finding for finding in RunFolder(run).read("data")["findings"]}
    assert found["packing-leak"]["level"] in ("ok", "fixed")
    assert ("running padded" in found["packing-leak"]["text"]) == (kind == "stablelm")
    if kind in tiny.PARTIAL:
        assert "which" in found["family"]["text"]
        for variant, method in (("houlsby", "adapter"), ("tail", "tail"), ("ia3", "ia3")):
            model = load_model(folder)
            with pytest.raises(ConfigError, match=rf"{method}: this model's blocks (are mixtures|differ)"):
                adapters.attach(model, config_for(variant))
    merged = fitune.merge(run, tmp_path / "merged")
    # merging rounds each weight once more, and a recurrent layer adds up what that makes different
    assert merged.merge_error <= 5e-5 or merged.merge_error <= 3 * rounded_once_more(run)
    again = AutoModelForCausalLM.from_pretrained(str(tmp_path / "merged"), dtype=torch.float32).eval()
    ids = torch.arange(5, 30)[None]
    with torch.no_grad():
        tuned = fitune.load(run).model(input_ids=ids).logits
        assert (again(input_ids=ids).logits - tuned).abs().max() <= 1e-4 * tuned.abs().max()


def test_every_family_of_the_table_is_tried_here() -> None:
    tried = {tiny.make_model(kind).config.model_type for kind in (*tiny.FAMILIES, *tiny.MORE)}
    assert tried == set(families.TABLE)


def test_lora_on_experts_reaches_only_what_it_names() -> None:
    model = adapters.attach(ready(tiny.make_model("qwen3_moe")), config_for("lora"))
    assert all(".self_attn." in name for name in trainable(model))
    found = modelchecks.trainable_set(model, methods.find("lora").expected(
        ready(tiny.make_model("qwen3_moe")), families.of(ready(tiny.make_model("qwen3_moe"))), config_for("lora")
    ))  # fmt: skip
    assert found.level == "ok"
    sample = Sample(np.arange(5, 25).astype(np.int32), np.ones(20, bool))
    loss_sum(model, flat([sample], [0])).backward()
    assert all(p.grad is not None for p in trainable(model).values())
