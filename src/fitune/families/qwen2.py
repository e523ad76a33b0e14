"""Qwen 1.5, 2 and 2.5 (arXiv:2407.10671): Llama's layout with biases on q, k and v."""

from fitune.families.base import Family

FAMILY = Family(
    model_type="qwen2",
    blocks="model.layers",
    attention=("q_proj", "k_proj", "v_proj", "o_proj"),
    mlp=("gate_proj", "up_proj", "down_proj"),
    lora_targets=("q_proj", "v_proj"),
)
