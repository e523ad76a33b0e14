"""LLaMA-Factory, by the function that its command line calls: `python train_llamafactory.py SETTINGS.json`.

The options are its arguments; what is not among them is its default. Rows come as the tokenized data set that it writes
and reads itself (`tokenized_path`).
"""

from __future__ import annotations

import shutil
import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any

import meter as meters


def tokenized(steps: list[list[dict[str, list[int]]]], folder: Path) -> None:
    """The rows as LLaMA-Factory writes them."""
    from datasets import Dataset, DatasetDict

    rows = [
        {"input_ids": row["ids"], "attention_mask": [1] * len(row["ids"]), "labels": row["labels"]}
        for step in steps
        for row in step
    ]
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(str(folder))


def arguments(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What a YAML file of `llamafactory-cli train` would hold."""
    return {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": settings["model"],
        "adapter_name_or_path": settings["adapter"],
        "finetuning_type": "lora",
        "dataset": "rows",
        "tokenized_path": str(folder / "rows"),
        "template": "qwen",
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": settings["batch"],
        "gradient_accumulation_steps": 1,
        "max_steps": settings["steps"],
        "disable_shuffling": True,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "max_grad_norm": settings["max_grad_norm"],
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": settings["device"] == "cpu",
        "bf16": settings["precision"] == "bf16",
        **settings["options"],
    }


def main() -> None:
    """Train."""
    settings = meters.settings()
    meter = meters.Meter(settings)
    # It imports torchaudio, whose one build is for CUDA, and calls it for rows with sound alone
    sys.modules["torchaudio"] = module_from_spec(ModuleSpec("torchaudio", None))
    from llamafactory.train.tuner import run_exp

    steps, folder = meters.rows_of(settings), Path(settings["work"]) / "llamafactory"
    shutil.rmtree(folder, ignore_errors=True)
    tokenized(steps, folder / "rows")
    marks = meters.hugging_face_callback(meter)
    with meter.counting():
        run_exp(arguments(settings, folder), [marks])
    meter.write(tokens=marks.tokens, labels=marks.labels)


if __name__ == "__main__":
    main()
