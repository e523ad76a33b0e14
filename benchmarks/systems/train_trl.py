"""TRL's SFTTrainer: `python train_trl.py SETTINGS.json`.

The options are fields of SFTConfig; what is not among them is TRL's default. Rows come as ids and labels, which the
trainer takes as they are.
"""

from __future__ import annotations

import meter as meters


def main() -> None:
    """Train."""
    settings = meters.settings()
    meter = meters.Meter(settings)
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    steps = meters.rows_of(settings)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[settings["precision"]]
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=dtype)
    model = PeftModel.from_pretrained(model, settings["adapter"], is_trainable=True)
    rows = [{"input_ids": row["ids"], "labels": row["labels"]} for step in steps for row in step]
    config = SFTConfig(
        output_dir=f"{settings['work']}/trl",
        per_device_train_batch_size=len(steps[0]),
        max_steps=len(steps),
        max_length=None,
        train_sampling_strategy="sequential",
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        max_grad_norm=settings["max_grad_norm"],
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=settings["device"] == "cpu",
        **{"bf16": False, **settings["options"]},
    )
    marks = meters.hugging_face_callback(meter)
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(settings["model"]),
        callbacks=[marks],
    )
    with meter.counting():
        trainer.train()
    meter.write(tokens=marks.tokens, labels=marks.labels)


if __name__ == "__main__":
    main()
