"""ChatGLM-6B, version 1: q, k and v in one layer, interleaved by head; see chatglm_model.py."""

from fitune.models.families import chatglm_model
from fitune.models.family import Family

FAMILY = Family(
    model_type=chatglm_model.ChatGLMConfig.model_type,
    blocks="transformer.layers",
    attention="attention",
    qkv=("attention.query_key_value",),
    out="attention.dense",
    mlp="mlp",
    mlp_in=("mlp.dense_h_to_4h",),
    mlp_out="mlp.dense_4h_to_h",
    final_norm="transformer.final_layernorm",
    lora_targets=("query_key_value",),
)
