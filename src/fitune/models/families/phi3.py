"""Phi-3 and 3.5 (arXiv:2404.14219): q, k and v in one layer, gate and up in one layer."""

from dataclasses import replace

from fitune.models.families import llama

FAMILY = replace(
    llama.FAMILY,
    model_type="phi3",
    qkv=("self_attn.qkv_proj",),
    mlp_in=("mlp.gate_up_proj",),
    lora_targets=("qkv_proj",),
    bias_flags=(),
)
