"""Preferences in TRL: `python preference_trl.py SETTINGS.json`.

In: what `preference_fitune.py` computed: the batches, as ids. Out: the same of TRL: of each batch the loss, the
rewards, the gradients and the operations. The trainers are TRL's, with their defaults but for what is compared; the
batches are made by its collators and go through its `compute_loss`. The reference is the base model: TRL copies the
adapter that it is given first, whose B is zero.

ORPO's loss in TRL has the prompt in it and is a mean over the tokens of all rows, where the paper has the mean over
those of an answer. So its log-probabilities and its odds are compared with the paper's first term beside them; on
prompts of one token, a pair in a batch, both are the same, and there its own loss is compared ("orpo-whole").
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import meter as meters

DUMMY = {"prompt": ["a"] * 2, "chosen": ["b"] * 2, "rejected": ["c"] * 2}


def trainer_of(settings: Mapping[str, Any], model: Any, tokenizer: Any) -> Any:
    """TRL's trainer for an objective."""
    from datasets import Dataset

    objective, options = settings["objective"].split("-")[0], settings["options"]
    shared: dict[str, Any] = {
        "output_dir": f"{settings['work']}/trl", "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True,
        "bf16": False, "max_length": 4096, "gradient_checkpointing": False, "beta": options["beta"],
    }  # fmt: skip
    rows = Dataset.from_dict(DUMMY)
    if objective in ("dpo", "ipo"):
        from trl import DPOConfig, DPOTrainer

        args = DPOConfig(loss_type=["sigmoid" if objective == "dpo" else "ipo"], **shared)
        return DPOTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
    if objective == "kto":
        from trl import KTOConfig, KTOTrainer

        weights = {name: options[name] for name in ("desirable_weight", "undesirable_weight")}
        args = KTOConfig(**shared, **weights)
        some = {"prompt": DUMMY["prompt"], "completion": DUMMY["chosen"], "label": [True, False]}
        return KTOTrainer(model=model, args=args, train_dataset=Dataset.from_dict(some), processing_class=tokenizer)
    if objective == "orpo":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        return ORPOTrainer(model=model, args=ORPOConfig(**shared), train_dataset=rows, processing_class=tokenizer)
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    args = CPOConfig(loss_type="simpo", cpo_alpha=0.0, simpo_gamma=options["gamma"], **shared)
    return CPOTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)


def batch_of(rows: list[dict[str, Any]], trainer: Any, objective: str) -> Any:
    """The rows as TRL's collator gives them to its trainer."""
    if objective in ("dpo", "ipo"):
        keys = {"prompt": "prompt_ids", "chosen": "chosen_ids", "rejected": "rejected_ids"}
        return trainer.data_collator([{theirs: row[ours] for ours, theirs in keys.items()} for row in rows])
    if objective == "kto":
        keys = {"prompt": "prompt_ids", "chosen": "completion_ids", "rejected": "KL_completion_ids",
                "desirable": "label"}  # fmt: skip
        return trainer.data_collator([{theirs: row[ours] for ours, theirs in keys.items()} for row in rows])
    features = []
    for row in rows:
        one: dict[str, Any] = {}
        for side in ("chosen", "rejected"):
            ids = row["prompt"] + row[side]
            one |= {f"{side}_input_ids": ids, f"{side}_attention_mask": [1] * len(ids)}
            one[f"{side}_labels"] = [-100] * len(row["prompt"]) + row[side]
        features.append(one)
    return trainer.data_collator(features)


def loss_of(trainer: Any, inputs: Any, objective: str) -> tuple[Any, dict[str, float | None]]:
    """The loss of a batch and its rewards."""
    if objective == "orpo":  # the paper's first term in the place of TRL's
        chosen, rejected = trainer.concatenated_forward(trainer.model, inputs)[:2]
        odds, good, bad, *_ = trainer.odds_ratio_loss(chosen, rejected)
        rewards = {"chosen": good.mean().item(), "rejected": bad.mean().item()}
        return -chosen.mean() - odds.mean(), rewards
    if objective.startswith("orpo") or objective == "simpo":
        loss, seen = trainer.get_batch_loss_metrics(trainer.model, inputs)
        return loss, {side: float(seen[f"rewards/{side}"]) for side in ("chosen", "rejected")}
    loss = trainer.compute_loss(trainer.model, inputs)
    seen = trainer._metrics["train"]
    found = {side: seen[f"rewards/{side}"][-1] if seen[f"rewards/{side}"] else None for side in ("chosen", "rejected")}
    seen.clear()
    return loss, found


def main() -> None:
    """Compute all of it."""
    settings = meters.settings()
    import torch
    from peft import LoraConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    objective = settings["objective"]
    base = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    lora = LoraConfig(r=settings["rank"], lora_alpha=settings["alpha"], target_modules=list(settings["targets"]),
                      lora_dropout=0.0, task_type="CAUSAL_LM")  # fmt: skip
    model = get_peft_model(base, lora)
    trainer = trainer_of(settings, model, AutoTokenizer.from_pretrained(settings["model"]))
    set_peft_model_state_dict(trainer.model, load_peft_weights(settings["adapter"]))
    trained = {name: one for name, one in trainer.model.named_parameters() if one.requires_grad}
    trainer.model.train()
    found, gradients = [], {}
    for number, batch in enumerate(json.loads(Path(settings["computed"]).read_text(encoding="utf-8"))["batches"]):
        inputs = batch_of(batch["rows"], trainer, objective)
        made: list[tuple[float, dict[str, float | None]]] = []

        def work(inputs: Any = inputs, made: list[tuple[float, dict[str, float | None]]] = made) -> None:
            loss, rewards = loss_of(trainer, inputs, objective)
            loss.backward()
            made.append((loss.item(), rewards))

        flops = meters.flops_of(work)
        for name, one in trained.items():
            if one.grad is not None:
                gradients[f"{number}.{name}"] = one.grad.detach().clone()
        trainer.model.zero_grad(set_to_none=True)
        found.append({"loss": made[0][0], **made[0][1], "flops": flops})
    save_file(gradients, str(Path(settings["work"]) / "gradients.safetensors"))
    result = {"batches": found, "versions": meters.versions()}
    Path(settings["result"]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
