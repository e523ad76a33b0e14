"""BLOOM (arXiv:2211.05100): ALiBi in place of positions, q, k and v in one layer, interleaved by head.

transformers has no attention interface for it, so the attention modules of an instance are replaced by
`kernels.alibi.AlibiAttention`, which shares their layers and names.
"""

from fitune.models.family import Family
from fitune.models.interfaces import CausalLM
from fitune.models.kernels.alibi import AlibiAttention


def _make_flat(model: CausalLM) -> None:
    AlibiAttention.put_into(model, [(block, "self_attention") for block in FAMILY.block_list(model)])


FAMILY = Family(
    model_type="bloom",
    blocks="transformer.h",
    attention="self_attention",
    qkv=("self_attention.query_key_value",),
    out="self_attention.dense",
    mlp="mlp",
    mlp_in=("mlp.dense_h_to_4h",),
    mlp_out="mlp.dense_4h_to_h",
    final_norm="transformer.ln_f",
    lora_targets=("query_key_value",),
    make_flat=_make_flat,
)
