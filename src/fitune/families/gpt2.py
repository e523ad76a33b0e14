"""GPT-2 (Radford et al. 2019): q, k and v in one Conv1D, whose weight is stored inputs x outputs."""

from fitune.families.base import Family

FAMILY = Family(
    model_type="gpt2",
    blocks="transformer.h",
    attention=("c_attn", "attn.c_proj"),
    mlp=("c_fc", "mlp.c_proj"),
    lora_targets=("c_attn",),
)
