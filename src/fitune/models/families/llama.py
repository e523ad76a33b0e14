"""Llama 1, 2 and 3 (Touvron et al. 2023, arXiv:2302.13971), and what shares their architecture."""

from fitune.models.family import Family

FAMILY = Family(
    model_type="llama",
    blocks="model.layers",
    attention="self_attn",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    out="self_attn.o_proj",
    mlp="mlp",
    mlp_in=("mlp.gate_proj", "mlp.up_proj"),
    mlp_out="mlp.down_proj",
    final_norm="model.norm",
    lora_targets=("q_proj", "v_proj"),
    bias_flags=("attention_bias", "mlp_bias"),
)
