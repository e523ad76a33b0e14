"""GPT-NeoX and Pythia (arXiv:2204.06745, arXiv:2304.01373): attention and MLP side by side, q, k and v in one layer."""

from fitune.models.family import Family

FAMILY = Family(
    model_type="gpt_neox",
    blocks="gpt_neox.layers",
    attention="attention",
    qkv=("attention.query_key_value",),
    out="attention.dense",
    mlp="mlp",
    mlp_in=("mlp.dense_h_to_4h",),
    mlp_out="mlp.dense_4h_to_h",
    final_norm="gpt_neox.final_layer_norm",
    lora_targets=("query_key_value",),
)
