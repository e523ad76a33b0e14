"""gpt-oss as it is published: experts in MXFP4, loaded as they are, planned, tuned and merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GptOssForCausalLM, Mxfp4Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from fitune.commands.merge import merge
from fitune.commands.train import train
from fitune.core.config import build
from fitune.core.errors import ModelError
from fitune.engine.loading import load
from fitune.memory import plan
from fitune.memory.usage import usage
from fitune.models import precision
from fitune.models import quant as quants
from fitune.models.configs import read_config
from fitune.models.load import load_model, outline
from fitune.models.quant import experts
from fitune.models.quant.mxfp4 import QUANTIZER
from fitune.models.quant.stored import Stored
from support import contract, measured, packings, tiny
from support.measured import batch

IDS = torch.arange(5, 45)[None]  # longer than the sliding window
OPTIONS = Stored(name="mxfp4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("mxfp4") / "model"
    packings.published_mxfp4(place)
    return place


def off(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().abs().max() / other.detach().abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.full)])
def test_values_are_those_of_transformers_bit_for_bit(dtype: torch.dtype) -> None:
    """Every byte beside every scale that keeps what it scales finite, zeros with their signs."""
    stack: Any = QUANTIZER.stack((3, 64, 256 * 32), OPTIONS, transposed=True).to_empty(device="cpu")
    every = torch.arange(256, dtype=torch.uint8)
    stack.weight.data.copy_(every.repeat(3 * 64 * 16).view(stack.weight.shape))
    stack.scales.copy_(torch.arange(3 * 64, dtype=torch.uint8)[:, None].repeat(1, 256).view(stack.scales.shape) + 30)
    theirs = convert_moe_packed_tensors(stack.weight.data, stack.scales, dtype=dtype)
    mine = stack.plain(dtype)
    assert mine.shape == theirs.shape == (3, 256 * 32, 64)
    whole = {torch.bfloat16: torch.int16, torch.float32: torch.int32}[dtype]
    assert torch.equal(mine.view(whole), theirs.view(whole))
    assert len(mine.unique()) > 700


def test_logits_are_those_of_the_plain_model(folder: Path, tmp_path: Path) -> None:
    """Sinks, windows, biases: of the format's description, and of transformers' own unpacking."""
    mine: Any = load_model(folder)
    assert len(list(experts.stacks(mine))) == 4
    plain = packings.published_mxfp4(tmp_path / "again")
    theirs: Any = GptOssForCausalLM.from_pretrained(
        str(folder), quantization_config=Mxfp4Config(dequantize=True), dtype=torch.float32
    ).eval()
    logits = mine(input_ids=IDS).logits
    assert off(logits, plain(input_ids=IDS).logits) <= 1e-6
    assert off(logits, theirs(input_ids=IDS).logits) <= 1e-6


@pytest.mark.full
def test_it_stays_packed_and_the_plan_has_its_bytes(folder: Path) -> None:
    model = load_model(folder, precision="bf16")
    for _, stack in experts.stacks(model):
        assert stack.weight.numel() + stack.get_buffer("scales").numel() == stack.weight.stands_for * 4.25 / 8  # type: ignore[attr-defined]  # see Stack.adopt
    kept = {part.part: part for part in precision.kept(model)}
    assert kept["fused experts"].dtype == "mxfp4"
    assert kept["fused experts"].bytes == kept["fused experts"].weights * 4.25 / 8
    made = outline(read_config(folder), precision="bf16")
    facts = [{n: (v.dtype, v.shape) for n, v in one.state_dict().items()} for one in (made, model)]
    assert facts[0] == facts[1]


@pytest.mark.full
def test_gradients_and_memory(folder: Path) -> None:
    gradients = []
    for plain in (False, True):
        model: Any = load_model(folder, plain=plain)
        x = model.get_input_embeddings()(IDS).detach().requires_grad_(True)
        model(inputs_embeds=x).logits.square().mean().backward()
        gradients.append(x.grad)
    assert off(gradients[0], gradients[1]) <= 1e-6
    config, base = contract.config_for("lora"), load_model(folder)
    work = plan.Work(config, read_config(folder), [[batch(9, 5)], [batch(*[240] * 25)]])
    expected = usage(plan.traced(work), without="start").peak.bytes
    there = measured.really(base, config, work)
    assert abs(expected - there) <= 0.005 * there, (expected, there)


@pytest.mark.full
def test_it_trains_and_becomes_a_plain_model(folder: Path, tmp_path: Path) -> None:
    data = tiny.write_rows(tmp_path / "rows.jsonl", 20)
    settings: dict[str, Any] = {
        "model": str(folder), "data": [str(data)], "max_steps": 3, "precision": "fp32", "lr": 1e-2,
        "sample_prompts": 0, "cache": "none", "output": str(tmp_path / "run"),
    }  # fmt: skip
    run = train(build(settings))
    checks = json.loads((tmp_path / "run" / "checks.json").read_text())
    found = {one["rule"]: one for one in checks}
    assert found["frozen-intact"]["level"] == "ok"
    assert found["router-load"]["text"].startswith("2 routers over ")
    assert merge(run.run, tmp_path / "merged").merge_error <= 1e-5
    merged: Any = load_model(tmp_path / "merged")
    assert not list(quants.packed(merged))
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    tuned = load(run.run, precision="fp32").model
    assert off(merged(input_ids=IDS).logits, tuned(input_ids=IDS).logits) <= 1e-2  # its files are rounded
    theirs: Any = GptOssForCausalLM.from_pretrained(str(tmp_path / "merged"), dtype=torch.float32).eval()
    assert off(theirs(input_ids=IDS).logits, merged(input_ids=IDS).logits) <= 1e-6


def test_settings_that_are_not_understood_are_refused() -> None:
    with pytest.raises(ModelError, match="inputs that 32 divides"):
        QUANTIZER.stack((2, 64, 48), OPTIONS, transposed=True)
    with pytest.raises(ModelError, match="modules_to_not_convert"):
        QUANTIZER.check({"quant_method": "mxfp4", "modules_to_not_convert": 3})
