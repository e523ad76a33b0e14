"""Llama 1, 2 and 3 (Touvron et al. 2023, arXiv:2302.13971), and what shares their architecture."""

from fitune.families.base import Family

FAMILY = Family(
    model_type="llama",
    blocks="model.layers",
    attention=("q_proj", "k_proj", "v_proj", "o_proj"),
    mlp=("gate_proj", "up_proj", "down_proj"),
    lora_targets=("q_proj", "v_proj"),
)
