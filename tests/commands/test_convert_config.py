"""Configs of other tools as settings of fitune: what is carried over, what is left out, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from fitune.commands.convert_config import BESIDE, WHY, convert_config
from fitune.core.config import build
from fitune.core.errors import ConfigError
from support.command import run

LLAMA_FACTORY = """
model_name_or_path: Qwen/Qwen2.5-7B-Instruct
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 16
lora_alpha: 32
lora_target: all
quantization_bit: 4
quantization_type: nf4
double_quantization: true
dataset: rows.jsonl,more.jsonl
template: qwen
cutoff_len: 2048
packing: true
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
val_size: 0.1
resize_vocab: true
output_dir: saves/qwen
"""
SWIFT = {
    "model": "Qwen/Qwen3-8B", "rlhf_type": "dpo", "train_type": "lora", "dataset": ["pairs.jsonl"], "beta": 0.3,
    "torch_dtype": "bfloat16", "target_modules": "q_proj,v_proj", "lora_rank": 8, "learning_rate": "1e-4",
    "deepspeed": "zero2",
}  # fmt: skip
TRL = {"model_name_or_path": "m", "dataset_name": "d.jsonl", "use_peft": False, "load_in_8bit": False, "lora_r": 4,
       "optim": "paged_adamw_8bit", "gradient_checkpointing": True, "lr_scheduler_type": "linear"}  # fmt: skip


def converted(values: Any, folder: Path) -> Any:
    file = folder / ("theirs.yaml" if isinstance(values, str) else "theirs.json")
    file.write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")
    return convert_config(file)


def test_a_config_of_llama_factory(tmp_path: Path) -> None:
    found = converted(LLAMA_FACTORY, tmp_path)
    assert found.settings == {
        "model": "Qwen/Qwen2.5-7B-Instruct", "objective": "sft", "method": "lora",
        "lora": {"rank": 16, "alpha": 32, "targets": "all-linear"}, "data": ["rows.jsonl", "more.jsonl"],
        "quant": {"name": "nf4", "kind": "nf4", "double": True}, "max_length": 2048, "batch_size": 2,
        "accumulation": 8, "lr": 1e-4, "epochs": 3.0, "warmup": 0.1, "precision": "bf16", "val_share": 0.1,
        "output": "saves/qwen",
    }  # fmt: skip
    assert set(found.left_out) == {"template", "packing", "resize_vocab"}
    assert "never see each other" in found.left_out["packing"]
    assert "theirs was qwen" in found.left_out["template"]
    assert found.defaults == {}
    assert yaml.safe_load(found.as_yaml()) == found.settings


def test_configs_of_ms_swift_and_trl(tmp_path: Path) -> None:
    swift = converted(SWIFT, tmp_path)
    assert swift.settings["dpo"] == {"beta": 0.3}
    assert swift.settings["lora"] == {"targets": ["q_proj", "v_proj"], "rank": 8}
    assert swift.settings["lr"] == 1e-4
    assert "deepspeed" in swift.left_out
    assert {"epochs", "rows of a micro-batch"} == set(swift.defaults)
    trl = converted(TRL, tmp_path)
    assert trl.settings == {
        "model": "m", "data": ["d.jsonl"], "method": "full", "optimizer": "paged-adamw-8bit", "checkpointing": True,
    }  # fmt: skip
    assert "as a cosine" in trl.left_out["lr_scheduler_type"]
    assert "learning rate" in trl.defaults


def test_what_a_key_becomes_is_a_setting() -> None:
    for key, change in BESIDE.items():
        value: Any = {"pref_loss": "simpo", "loss_type": "sigmoid", "new_special_tokens": "<a>,<b>"}.get(key, 0.5)
        value = 2 if key in ("save_total_limit", "freeze_trainable_layers", "max_steps") else value
        value = ["<a>"] if key == "add_tokens" else value
        assert build({"model": "m", "data": ["d"], **(change(value) or {})})
    assert set(WHY) <= set(BESIDE)
    assert BESIDE["val_size"](200) is None
    assert BESIDE["freeze_trainable_layers"](-2) is None
    assert BESIDE["loss_type"]("hinge") is None


def test_numbers_as_text_and_what_means_something_else(tmp_path: Path) -> None:
    given = {"stage": "kto", "pref_beta": "0.2", "dataset": "a,b", "val_size": 200, "lora_rank": "8", "use_dora": True}
    found = converted(given, tmp_path)
    assert found.settings == {
        "objective": "kto", "data": ["a", "b"], "lora": {"rank": 8, "dora": True}, "kto": {"beta": 0.2},
    }  # fmt: skip
    assert found.left_out == {"val_size": f"200: {WHY['val_size']}"}


def test_what_stands_for_nothing_and_rows_of_a_data_set(tmp_path: Path) -> None:
    """As they are published: no limit of steps, keys without a value, ms-swift's rows of a data set."""
    given = {
        "model": "m", "dataset": ["org/one#500", "two"], "max_steps": -1, "lora_alpha": None,
        "use_bnb_nested_quant": True, "init_weights": "pissa", "beta": 0.1, "freeze_trainable_layers": 2,
        "system": "Be brief.",
    }  # fmt: skip
    found = converted(given, tmp_path)
    assert found.settings == {
        "model": "m", "data": [{"path": "org/one", "take": 500}, "two"], "lora": {"init": "pissa"},
    }  # fmt: skip
    assert set(found.left_out) == {"beta", "freeze", "quant", "system"}
    assert converted({"model": "m", "max_steps": 20}, tmp_path).settings["max_steps"] == 20


def test_values_that_are_none_and_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_length"):
        converted({"model": "m", "cutoff_len": -3}, tmp_path)
    for key in ("val_size", "save_total_limit", "freeze_trainable_layers"):
        for wrong in ("many", None, [1]):
            with pytest.raises(ConfigError, match=f"{key}: wrong value"):
                converted({"model": "m", key: wrong}, tmp_path)
    with pytest.raises(ConfigError, match="no config of LLaMA-Factory"):
        converted({"colour": "green"}, tmp_path)
    with pytest.raises(ConfigError, match="no such file"):
        convert_config(tmp_path / "none.yaml")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "theirs.yaml").write_text(LLAMA_FACTORY)
    out = tmp_path / "ours.yaml"
    code, text, err = run(["convert-config", tmp_path / "theirs.yaml", "--output", out, "--json"], capsys, monkeypatch)
    assert code == 0, err
    assert json.loads(text)["settings"]["lora"]["rank"] == 16
    assert yaml.safe_load(out.read_text())["quant"]["name"] == "nf4"
    code, text, _ = run(["convert-config", tmp_path / "theirs.yaml"], capsys, monkeypatch)
    assert "# packing was left out" in text
    code, _, err = run(["convert-config", tmp_path / "theirs.yaml", "--output", out], capsys, monkeypatch)
    assert code == 2
