"""OPT (arXiv:2205.01068): learned positions; the MLP's layers stand in the block itself."""

from fitune.models.family import Family

FAMILY = Family(
    model_type="opt",
    blocks="model.decoder.layers",
    attention="self_attn",
    qkv=("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"),
    out="self_attn.out_proj",
    mlp=None,
    mlp_in=("fc1",),
    mlp_out="fc2",
    final_norm="model.decoder.final_layer_norm",
    lora_targets=("q_proj", "v_proj"),
)
