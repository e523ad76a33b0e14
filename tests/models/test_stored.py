"""Checkpoints that others quantized: loaded as they are, planned, tuned, talked to and merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fitune
from fitune.checks import runchecks
from fitune.commands.merge import merge
from fitune.commands.train import train
from fitune.commands.verify import verify
from fitune.core.config import build
from fitune.core.errors import ConfigError, ModelError
from fitune.engine.loading import load
from fitune.models import quant as quants
from fitune.models.configs import read_config
from fitune.models.load import load_model, outline
from fitune.models.quant.stored import Stored
from support import packings, tiny

IDS = torch.arange(5, 25)[None]
QUICK = ("gptq-4", "fp8")  # the values of all are compared above
NAMES = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.full) for name in packings.KINDS]


def _off(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).detach().abs().max() / other.detach().abs().max())


@pytest.mark.parametrize("name", packings.KINDS)
def test_a_packed_folder_has_the_values_of_its_format(name: str, tmp_path: Path) -> None:
    """Of every weight and of the whole model, in each precision; what is planned has the bytes of what is loaded."""
    plain = packings.published(name, tmp_path / "model")
    model = load_model(tmp_path / "model")
    layers = dict(quants.layers(model))
    linear = {path for path, module in plain.named_modules() if type(module) is torch.nn.Linear}
    assert set(layers) == linear - {"lm_head"}
    for path, layer in layers.items():
        assert torch.equal(layer.plain_weight(torch.float32), plain.get_submodule(path).weight), path
    assert _off(model(input_ids=IDS).logits, plain(input_ids=IDS).logits) <= 1e-6
    made = outline(read_config(tmp_path / "model"), precision="fp32")
    kept = {name: (value.dtype, value.shape) for name, value in model.state_dict().items()}
    assert {name: (value.dtype, value.shape) for name, value in made.state_dict().items()} == kept


def test_the_values_do_not_depend_on_the_precision(tmp_path: Path) -> None:
    packings.published("gptq-4", tmp_path / "model")
    one, other = (dict(quants.layers(load_model(tmp_path / "model", precision=p))) for p in ("fp32", "bf16"))
    for path, layer in one.items():
        assert torch.equal(layer.plain_weight(torch.float32), other[path].plain_weight(torch.float32))
        assert torch.equal(layer.plain_weight(torch.float32).bfloat16(), other[path].plain_weight(torch.bfloat16))


@pytest.mark.parametrize("name", NAMES)
def test_it_plans_trains_and_merges(name: str, tmp_path: Path) -> None:
    plain = packings.published(name, tmp_path / "model")
    data = tiny.write_rows(tmp_path / "rows.jsonl", 20)
    settings: dict[str, Any] = {
        "model": str(tmp_path / "model"), "data": [str(data)], "max_steps": 3, "precision": "fp32", "lr": 1e-2,
        "sample_prompts": 0, "cache": "none",
    }  # fmt: skip
    run = train(build({**settings, "output": str(tmp_path / "run")}))
    before = json.loads((tmp_path / "run" / "data.json").read_text())["findings"]
    findings = {
        one["rule"]: one["level"] for one in [*before, *json.loads((tmp_path / "run" / "checks.json").read_text())]
    }
    assert (findings["base-loaded"], findings["frozen-intact"]) == ("ok", "ok")
    assert merge(run.run, tmp_path / "merged").merge_error <= 1e-5
    merged: Any = load_model(tmp_path / "merged")
    assert not any(True for _ in quants.layers(merged))
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    tuned = load(run.run, precision="fp32").model
    assert _off(merged(input_ids=IDS).logits, tuned(input_ids=IDS).logits) <= 1e-2  # its files are rounded
    assert _off(merged(input_ids=IDS).logits, plain(input_ids=IDS).logits) > 1e-4


@pytest.mark.parametrize("name", ["gptq-4", "fp8"])
def test_the_plan_is_what_is_allocated(name: str, tmp_path: Path) -> None:
    packings.published(name, tmp_path / "model")
    data = tiny.write_rows(tmp_path / "rows.jsonl", 20)
    found = verify(build({"model": str(tmp_path / "model"), "data": [str(data)], "batch_size": 16, "device": "cpu"}))
    assert abs(found.error) <= 0.005, found.error


@pytest.mark.full
@pytest.mark.parametrize("method", ["prompt", "p-tuning", "prefix", "bitfit", "ia3", "adapter"])
def test_other_methods_take_packed_weights(method: str, tmp_path: Path) -> None:
    packings.published("gptq-4", tmp_path / "model", "qwen2")
    data = tiny.write_rows(tmp_path / "rows.jsonl", 20)
    run = train(
        build({
            "model": str(tmp_path / "model"), "data": [str(data)], "method": method, "max_steps": 3, "cache": "none",
            "precision": "fp32", "output": str(tmp_path / "run"), "sample_prompts": 0,
        })
    )  # fmt: skip
    assert run.losses if hasattr(run, "losses") else run.run


def test_what_changes_weights_is_refused(tmp_path: Path) -> None:
    packings.published("awq", tmp_path / "model")
    data = tiny.write_rows(tmp_path / "rows.jsonl", 20)
    values: dict[str, Any] = {"model": str(tmp_path / "model"), "data": [str(data)], "output": str(tmp_path / "run")}
    with pytest.raises(ConfigError, match="full does not go with quant awq"):
        train(build({**values, "method": "full"}))
    with pytest.raises(ConfigError, match="quantized already, as awq"):
        train(build({**values, "quant": "nf4"}))


GROUPS = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float", "strategy": "group"}}}
UNKNOWN: dict[str, tuple[dict[str, Any], str]] = {
    "another tool": ({"quant_method": "hqq", "axis": 1}, "quantized by hqq.*axis.*expected.*gptq, awq"),
    "5 bits": ({"quant_method": "gptq", "bits": 5, "group_size": 128}, "bits 5.*one of 2, 3, 4, 8"),
    "marlin": ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "Marlin kernel.*in format gptq"),
    "marlin of older files": ({"quant_method": "gptq", "bits": 4, "is_marlin_format": True}, "Marlin.*in format gptq"),
    "awq for marlin": ({"quant_method": "awq", "bits": 4, "version": "marlin"}, "Marlin kernel.*in format gemm"),
    "sparse marlin": ({"quant_method": "compressed-tensors", "format": "marlin-24", "config_groups": GROUPS},
                      "Marlin kernel.*in format pack-quantized"),
    "modelopt's others": ({"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"}, "quant_algo 'NVFP4_AWQ'.*FP8"),
    "modelopt, mixed": ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, "quant_algo 'MIXED_PREC"),
    "groups of nvfp4": ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 32}, "group_size 32.*16"),
    "layers of their own": ({"quant_method": "gptq", "bits": 4, "dynamic": {"x": {}}}, "settings of single layers"),
    "gemv": ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version 'gemv'"),
    "nvfp4 of other groups": ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized",
                               "config_groups": GROUPS}, "NVFP4 of another kind.*groups of 16"),
    "mxfp4 of linear layers": ({"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized",
                                "config_groups": GROUPS}, "format 'mxfp4-pack-quantized'"),
    "no groups": ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "config_groups"),
    "e5m2": ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt 'e5m2'"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_understood_is_refused_with_what_was_found(name: str, tmp_path: Path) -> None:
    config, text = UNKNOWN[name]
    folder = tiny.save("llama", tmp_path / "model")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "quantization_config": config}))
    with pytest.raises(ModelError, match=f"(?s){text}"):
        read_config(folder)


@pytest.mark.full
def test_numbers_of_compressed_tensors_own(tmp_path: Path) -> None:
    """NVFP4, packed and made plain by the library that writes such files."""
    own = pytest.importorskip("compressed_tensors.compressors.nvfp4", reason="compressed-tensors is not installed")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    values = packings.KINDS["compressed-nvfp4"].config
    weights = quantization.QuantizationArgs(**values["config_groups"]["group_0"]["weights"])
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=weights)
    weight = torch.randn(32, 64)
    whole = torch.tensor([448 * 6 / float(weight.abs().max())])
    scales = (weight.view(32, 4, 16).abs().amax(-1) / 6 * whole).to(torch.float8_e4m3fn)
    state = {"weight": weight, "weight_scale": scales.float(), "weight_global_scale": whole}
    packed = own.NVFP4PackedCompressor.compress(state, scheme)
    numbers = own.unpack_fp4_from_uint8(packed["weight_packed"], 32, 64, torch.float32)
    wide = scales.float().repeat_interleave(16, 1) / whole
    in_16_bits = own.NVFP4PackedCompressor.decompress(packed, scheme)["weight"].float()
    options = Stored(name="compressed-tensors", values=values)
    layer = quants.find("compressed-tensors").empty(torch.nn.Linear(64, 32, bias=False), options)
    layer.load_state_dict(packed, assign=True)
    plain = layer.plain_weight(torch.float32)
    assert torch.equal(plain, numbers * wide)
    assert _off(plain, in_16_bits) < 2**-7
    assert _off(plain, weight) < 0.2


def test_older_folders_of_modelopt_have_their_settings_in_a_file_beside(tmp_path: Path) -> None:
    packings.published("modelopt-nvfp4", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    values = json.loads(path.read_text())
    found = values.pop("quantization_config")
    path.write_text(json.dumps(values))
    settings = {"quant_algo": found["quant_algo"], "group_size": 16, "exclude_modules": ["lm_head"]}
    beside = {"producer": {"name": "modelopt", "version": "0.29.0"}, "quantization": settings}
    (tmp_path / "model" / "hf_quant_config.json").write_text(json.dumps(beside))
    assert len(dict(quants.layers(load_model(tmp_path / "model")))) == 21
    beside["quantization"] = {"quant_algo": "W4A8_AWQ"}
    (tmp_path / "model" / "hf_quant_config.json").write_text(json.dumps(beside))
    with pytest.raises(ModelError, match="quantized by modelopt; quantization_config: quant_algo 'W4A8_AWQ'"):
        read_config(tmp_path / "model")


def test_packed_weights_in_the_wrong_layer_are_refused(tmp_path: Path) -> None:
    for name in ("gptq-4", "fp8"):
        packings.published(name, tmp_path / name)
        model: Any = load_model(tmp_path / name)
        assert runchecks.base_loaded(runchecks.compared(model, tmp_path / name)).level == "ok"
        blocks = model.model.layers
        blocks[0].mlp, blocks[1].mlp = blocks[1].mlp, blocks[0].mlp
        assert runchecks.base_loaded(runchecks.compared(model, tmp_path / name)).level == "refuse"


def test_plain_weights_beside_a_packed_config_are_refused(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "quantization_config": packings.KINDS["awq"].config}))
    with pytest.raises(ModelError, match="the weights beside it are not quantized"):
        read_config(folder)


def test_a_config_alone_is_planned_by_what_it_leaves_out(tmp_path: Path) -> None:
    packings.published("fp8", tmp_path / "model")
    known = outline(read_config(tmp_path / "model"), precision="fp32")
    (tmp_path / "model" / "model.safetensors").unlink()
    alone = outline(read_config(tmp_path / "model"), precision="fp32")
    assert {name for name, _ in quants.layers(alone)} == {name for name, _ in quants.layers(known)}
    assert fitune.plan(str(tmp_path / "model" / "config.json"), batch_size=1, max_length=32).needed > 0
