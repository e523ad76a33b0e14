"""GPT-2 (Radford et al. 2019): q, k and v in one Conv1D, whose weight is stored inputs x outputs."""

from fitune.models.family import Family

FAMILY = Family(
    model_type="gpt2",
    blocks="transformer.h",
    attention="attn",
    qkv=("attn.c_attn",),
    out="attn.c_proj",
    mlp="mlp",
    mlp_in=("mlp.c_fc",),
    mlp_out="mlp.c_proj",
    final_norm="transformer.ln_f",
    lora_targets=("c_attn",),
)
