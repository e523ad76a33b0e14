"""A model that is read block by block is the one that is read whole, and never holds two blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from fitune.core.config import RunConfig
from fitune.core.errors import ModelError
from fitune.core.options import QuantOptions
from fitune.memory.measure import most_allocated
from fitune.models import adapters, by_blocks, families
from fitune.models import quant as quants
from fitune.models.interfaces import causal_lm
from fitune.models.load import Files, load_model, opened
from fitune.models.quant import PLAIN
from support import contract, tiny

pytestmark = pytest.mark.unit
FULL = pytest.mark.full
KINDS = ["qwen2", "qwen3_moe"]  # tied; fused experts
MORE = [pytest.param(kind, marks=FULL) for kind in ("llama", "bloom", "chatglm", "gpt2", "gemma3", "phi3", "opt")]
VARIANTS = [
    "lora-all",
    *(pytest.param(one, marks=FULL) for one in ("full", "freeze", "bitfit", "ia3", "houlsby", "prefix")),
]


def files(folder: Path, precision: str = "fp32", storage: str = "auto", quant: QuantOptions = PLAIN) -> Files:
    return opened(folder, precision=precision, device="cpu", quant=quant, storage=storage)


def begun(
    folder: Path, precision: str = "fp32", storage: str = "auto", config: RunConfig | None = None
) -> by_blocks.ByBlocks:
    asked = config or contract.config_for("lora")
    found = by_blocks.opened(files(folder, precision, storage, asked.quant), asked, lambda part: None)
    assert found is not None
    return found


def filled(reading: by_blocks.ByBlocks, model: Any) -> Any:
    inner = causal_lm(model)
    for block in families.of(inner).block_list(inner):
        assert reading.fill(block)
    reading.check()
    return model


def tensors(model: Any) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


@pytest.mark.parametrize(("precision", "storage"), [("fp32", "bf16"), pytest.param("bf16", "auto", marks=FULL)])
@pytest.mark.parametrize("kind", [*KINDS, *MORE])
def test_the_model_is_the_one_that_is_read_whole(kind: str, precision: str, storage: str, tmp_path: Path) -> None:
    folder = tiny.save(kind, tmp_path / kind)
    whole, reading = load_model(folder, precision=precision, storage=storage), begun(folder, precision, storage)
    model = filled(reading, reading.begun())
    assert type(model) is type(whole)
    assert {name: one.dtype for name, one in tensors(model).items()} == {
        name: one.dtype for name, one in tensors(whole).items()
    }
    assert all(torch.equal(one, tensors(whole)[name]) for name, one in tensors(model).items())
    assert torch.equal(contract.logits(model), contract.logits(whole))


@pytest.mark.parametrize("quant", ["nf4", pytest.param("int8", marks=FULL)])
@pytest.mark.parametrize("kind", ["llama", *(pytest.param(kind, marks=FULL) for kind in ("gpt2", "chatglm", "opt"))])
def test_packed_layers_are_those_of_a_model_that_is_read_whole(kind: str, quant: str, tmp_path: Path) -> None:
    folder, config = tiny.save(kind, tmp_path / kind), contract.config_for("lora-all", quant=quant)
    whole = adapters.attach(load_model(folder, quant=config.quant), config)
    reading = begun(folder, config=config)
    model = filled(reading, adapters.attach(reading.begun(), config))
    for name, one in tensors(model).items():
        other = tensors(whole)[name]
        assert (type(one), one.dtype) == (type(other), other.dtype), name
        assert torch.equal(one, other), name
    assert quants.name_of(causal_lm(model)) == quant
    assert torch.equal(contract.logits(model), contract.logits(whole))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_method_put_on_before_has_the_values_of_one_put_on_a_whole_model(variant: str, tmp_path: Path) -> None:
    folder, config = tiny.save("qwen2", tmp_path / "qwen2"), contract.config_for(variant)
    whole = adapters.attach(load_model(folder), config)
    reading = begun(folder, config=config)
    model = filled(reading, adapters.attach(reading.begun(), config))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == {
        name: p.requires_grad for name, p in whole.named_parameters()
    }
    assert all(torch.equal(one, tensors(whole)[name]) for name, one in tensors(model).items())


def test_no_more_than_a_block_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model whose tensors are cast as they are read, so that they are not pages of the file. The profiler counts
    nothing of other threads."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "vocab_size": 100}
    made = LlamaForCausalLM(LlamaConfig(num_hidden_layers=8, **sizes))
    made.save_pretrained(folder := tmp_path / "llama")
    reading = begun(folder, "bf16")

    def read() -> None:
        model = reading.begun()
        for block in families.of(model).block_list(model):
            reading.fill(block)
            for parameter in block.parameters():  # as where a part of each is kept
                parameter.data = parameter.data.new_empty(0)

    def read_whole() -> None:
        load_model(folder, precision="bf16")

    half = sum(p.numel() for p in made.parameters())  # bytes of half of the model
    mapped = (folder / "model.safetensors").stat().st_size
    assert most_allocated(read, mapped=mapped) < half
    assert most_allocated(read_whole, mapped=mapped) > half


def test_what_is_missing_or_left_over_is_named_as_of_a_whole_model(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "llama")
    stored = load_file(folder / "model.safetensors")
    for name, wrong in (
        ("missing", {"model.layers.1.mlp.up_proj.weight": None}),
        ("left", {"model.more": torch.ones(2)}),
    ):
        held = {key: one for key, one in {**stored, **wrong}.items() if one is not None}
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
        reading = begun(folder)
        with pytest.raises(ModelError, match="not in the weights" if name == "missing" else "have no place"):
            filled(reading, reading.begun())


READERS: list[dict[str, Any]] = [
    {"lora": {"init": "pissa"}},
    {"lora": {"dora": True}},
    {"lora": {}, "method": "tail"},
    {"lora": {}, "method": "full", "adapter": "a"},
]


@pytest.mark.parametrize("more", READERS)
def test_a_method_that_reads_weights_gets_them_whole(more: dict[str, Any], tmp_path: Path) -> None:
    config = contract.config_for("lora", **more)
    assert by_blocks.opened(files(tiny.save("llama", tmp_path / "llama")), config, lambda part: None) is None
