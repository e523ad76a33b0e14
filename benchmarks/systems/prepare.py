"""What all systems begin with, written once: `python prepare.py SETTINGS.json`, in fitune's environment.

In: a shape, a folder with a tokenizer, a file of rows. Out, in the folder that the settings name: a model with random
weights (its seed makes it the same on every machine with the same torch), an adapter with random A and B, the rows as a
user has them, and `rows.json`: the rows of each step as ids and labels in the order in which fitune trains them, the
learning rate of each step, and the operations that it takes at least (fitune/memory/flops.py).

B is not zero, as it would be at the start of a run: the losses then depend on all that is trained from the first step
on, and a fault in any of it is seen in them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import meter as meters
import train_fitune

SHAPES: dict[str, dict[str, Any]] = {
    "46.6M": {
        "model_type": "llama", "vocab_size": 151_936, "hidden_size": 256, "intermediate_size": 912,
        "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 2048,
    },
    "0.5B": {
        "model_type": "qwen2", "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32_768,
        "rope_theta": 1e6,
    },
    "tiny": {
        "model_type": "llama", "vocab_size": 0, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 2048,
    },
}  # fmt: skip
SPREAD = 0.05  # standard deviation of the random weights: logits are about as far apart as a real model's


def make_model(settings: Mapping[str, Any], folder: Path) -> None:
    """A random model with a tokenizer beside it; and the adapter. The values are those that bf16 has, so that runs in
    either precision begin with the same; they are saved in the precision of the run, which LLaMA-Factory computes in
    whatever else it is asked for."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(settings["tokenizer"])
    shape = dict(SHAPES[settings["shape"]])
    shape["vocab_size"] = shape["vocab_size"] or len(tokenizer)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.for_model(**shape, **ends, tie_word_embeddings=True, initializer_range=SPREAD)
    torch.manual_seed(settings["seed"])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).bfloat16()
    model = model.float() if settings["precision"] == "fp32" else model
    model.save_pretrained(str(folder / "model"))
    tokenizer.save_pretrained(str(folder / "model"))
    lora = LoraConfig(
        r=settings["rank"],
        lora_alpha=settings["alpha"],
        target_modules=list(settings["targets"]),
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    tuned = get_peft_model(model.float(), lora)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=SPREAD)
    tuned.save_pretrained(str(folder / "adapter"))


def write_rows(settings: Mapping[str, Any], path: Path) -> None:
    """As many rows as the steps take, drawn from the data."""
    text = Path(settings["raw"]).read_text(encoding="utf-8")
    found = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    count = settings["steps"] * settings["batch"]
    if len(found) < count:
        raise SystemExit(f"{settings['raw']}: {len(found)} rows, {count} needed; fix: fewer --steps")
    chosen = random.Random(settings["seed"]).sample(found, count)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in chosen)
    path.write_text("".join(lines), encoding="utf-8")


def order(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The steps as fitune makes them of the rows."""
    from fitune.commands import planned_rows
    from fitune.commands.request import to_train
    from fitune.core.config import build
    from fitune.core.events import Silent
    from fitune.engine import optim, step
    from fitune.memory.flops import counts, per_token
    from fitune.models import adapters
    from fitune.models.load import load_model

    values = {**settings, "options": {}, "precision": "fp32", "device": "cpu"}
    request = to_train(build(train_fitune.config(values, Path(settings["work"]) / "nothing")))
    rows = planned_rows.read(request, Path(settings["model"]), Silent(), to_train=True)
    config = request.config.model_copy(update={"max_length": rows.rows.max_length})
    loader = planned_rows.make_loader(config, rows.data.samples, "flat")
    batches = [micro[0] for _, micro in loader.steps(0, settings["steps"])]
    model = adapters.attach(load_model(Path(settings["model"]), precision="fp32"), config)
    step.last_block_is_ready(model)  # then the floor is that of a last block which works on label rows alone
    work = counts(model, config)
    lengths = [[int(n) for n in batch.bounds[1:] - batch.bounds[:-1]] for batch in batches]
    floors = [
        per_token(work, each, batch.targets / len(batch.ids)) * len(batch.ids)
        for each, batch in zip(lengths, batches, strict=True)
    ]
    total = settings["steps"]
    return {
        "steps": [documents(batch) for batch in batches],
        "lr": [optim.learning_rate(step, total, settings["peak"], config.warmup) for step in range(total)],
        "floors": floors,
        "parameters": work.total,
        "trained": work.trainable,
    }


def documents(batch: Any) -> list[dict[str, list[int]]]:
    """The rows of a flat batch, with labels as transformers has them: in the place of the token, -100 elsewhere."""
    labels = [-100] * len(batch.ids)
    for row, label in zip(batch.label_rows.tolist(), batch.labels.tolist(), strict=True):
        labels[row + 1] = label
    ids, bounds = batch.ids.tolist(), batch.bounds.tolist()
    return [{"ids": ids[a:b], "labels": labels[a:b]} for a, b in pairwise(bounds)]


def main() -> None:
    """Write all of it."""
    settings = meters.settings()
    folder = Path(settings["work"])
    make_model(settings, folder)
    write_rows(settings, folder / "rows.jsonl")
    (folder / "rows.json").write_text(json.dumps(order(settings)), encoding="utf-8")


if __name__ == "__main__":
    main()
