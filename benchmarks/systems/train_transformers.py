"""Plain transformers with PEFT, in a loop of one's own: `python train_transformers.py SETTINGS.json`.

The rows of a step are padded to its longest. With `micro`, they are sorted by length and go through the model in groups
of so many, each padded to its own longest; the loss is that of the whole step all the same. With `quant`, the frozen
weights are bitsandbytes'.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import meter as meters


def padded(rows: list[dict[str, list[int]]], device: str) -> dict[str, Any]:
    """Rows side by side, padded on the right."""
    import torch

    width = max(len(row["ids"]) for row in rows)

    def filled(values: list[list[int]], value: int) -> Any:
        return torch.tensor([one + [value] * (width - len(one)) for one in values], device=device)

    return {
        "input_ids": filled([row["ids"] for row in rows], 0),
        "attention_mask": filled([[1] * len(row["ids"]) for row in rows], 0),
        "labels": filled([row["labels"] for row in rows], -100),
    }


def micro_batches(rows: list[dict[str, list[int]]], size: int | None) -> list[list[dict[str, list[int]]]]:
    """The rows of a step as they go through the model: at once, or of like length together."""
    if size is None:
        return [rows]
    ordered = sorted(rows, key=lambda row: len(row["ids"]))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def model_of(settings: Mapping[str, Any]) -> Any:
    """The base with the adapter on it."""
    import torch
    from peft import PeftModel, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[settings["precision"]]
    how: dict[str, Any] = {"dtype": dtype, "device_map": {"": settings["device"]}}
    quant = settings["options"].get("quant")
    if quant == "nf4":
        how["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    elif quant == "int8":
        how["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(settings["model"], **how)
    if quant:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return PeftModel.from_pretrained(model, settings["adapter"], is_trainable=True).train()


def main() -> None:
    """The loop."""
    settings = meters.settings()
    meter = meters.Meter(settings)
    import torch

    steps, model = meters.rows_of(settings), model_of(settings)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True)
    with meter.counting():
        meter.ready()
        for rows, lr in zip(steps, settings["lr"], strict=False):
            for group in optimizer.param_groups:
                group["lr"] = lr
            labels = sum(label >= 0 for row in rows for label in row["labels"][1:])
            loss = 0.0
            for micro in micro_batches(rows, settings["options"].get("micro")):
                batch = padded(micro, settings["device"])
                part = model(**batch, num_items_in_batch=labels).loss
                part.backward()
                loss += part.item()
            norm = torch.nn.utils.clip_grad_norm_(trained, settings["max_grad_norm"])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            meter.step()
            meter.loss(loss, norm.item())
    meter.write(**meters.counts(steps))


if __name__ == "__main__":
    main()
