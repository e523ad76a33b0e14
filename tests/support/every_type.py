"""A tiny random model of any causal model type that transformers has, from its own config class.

In: a model type. Out: its config with every size made small, by rules for the names of sizes; what a type needs beside
them is a row of OWN. Two blocks, hidden states of 32, a vocabulary of 400; of a type whose blocks differ as many as it
takes to have each kind once.
"""

from __future__ import annotations

import dataclasses
import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from support import tiny

TYPES: tuple[str, ...] = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY = 400  # of support/tiny.py's tokenizer
# the first that fits a whole name decides
RULES: tuple[tuple[str, int], ...] = (
    ("vocab_size(_per_layer_input)?|n_tokens", VOCABULARY),
    ("pad_token_id", 0),
    ("(bos|decoder_start)_token_id", 2),
    ("(eos|sep|cls)_token_id", 1),
    ("num_hidden_layers|n_layers?|num_layers|num_(en|de)coder_layers|(en|de)coder_layers|depth|num_blocks", 2),
    ("num_key_value_heads|num_key_value_groups|linear_num_key_heads|kv_n_heads|n_kv_heads", 2),
    ("(moe_|mamba_|swa_)?num_(attention_)?heads|n_heads?|linear_num_(value_)?heads", 4),
    ("num_(en|de)coder_attention_heads|(en|de)coder_attention_heads|attention_heads|mamba_n_heads", 4),
    ("hidden_size|d_model|n_embd|n_embed|emb_dim|word_embed_proj_dim|dim|embedding_size|hidden_size_global", 32),
    ("(input|output)_embedding_size|(pronunciation|shape)_embed_dim|width", 32),
    ("head_dim|d_head|d_kv|(linear|global|swa)_(key|value)?_?head_dim|dim_head|(swa_)?v_head_dim|dim_kv", 8),
    ("linear_(key_|value_)?head_dim|mamba_(d_)?head(_dim)?|attention_head_(dim|size)|global_head_dim", 8),
    ("qk_nope_head_dim|qk_rope_head_dim|kv_lora_rank|o_lora_rank|index_head_dim|rotary_dim", 8),
    ("q_lora_rank|hc_lowrank|time_step_rank|router_hidden_size|adapter_rank|altup_rank|laurel_rank", 16),
    (".*intermediate_size.*|ffn_(hidden_size|dim)|n_inner|(en|de)coder_ffn_dim|dim_ff|dff|d_inner|mlp_dim", 64),
    ("feed_forward_size|expert_ffn_hidden_size|moe_ffn_hidden_size|ffn_dim_expert", 64),
    ("num_(local_|routed_)?experts|n_routed_experts|moe_num_experts|num_moe_experts", 4),
    ("(num_experts_per_(tok|token)|moe_top_?k|num_selected_experts|moe_k|top_k)", 2),
    ("n_group|num_expert_group|topk_group|o_groups", 1),
    ("first_k_dense_replace|num_dense_layers|moe_num_shared_experts|num_nextn_predict_layers", 1),
    ("sliding_window|attention_chunk_size|local_attention|attention_window_size|window_size", 16),
    ("index_topk", 8),
    ("index_n_heads", 2),
    ("max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length|context_length", 256),
    ("max_(source|target)_positions", 256),
    ("(mamba_)?(d_)?(ssm_)?state(_size)?|mamba_d_state", 8),
    ("(mamba_)?chunk_size|mamba_chunk_size", 16),
    ("mamba_n_groups|mamba_ngroups|n_groups", 2),
)  # fmt: skip
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
CONVOLUTION = {"layer_types": ["conv", "full_attention"]}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
SHARED_KEYS = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
PLAIN_LAYERS = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
EIGHT = {"head_dim": 8}
RELATIVE = {
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "sliding_window_size": 16,
    "d_rel": 4, "rel_extent": 16, "layer_types": ["hybrid_sliding", "hybrid"],
}  # fmt: skip
# what no rule knows
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("granitemoehybrid", "kimi_linear", "bailing_hybrid", "olmo_hybrid"), LINEAR),
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"), LINEAR),
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "falcon_h1": {"mamba_d_ssm": 32},
    "gemma3n_text": {
        **SHARED_KEYS,
        "hidden_size_per_layer_input": 8,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    },
    "gemma4_text": {**SHARED_KEYS, "hidden_size_per_layer_input": 8},
    "gemma4_unified_text": SHARED_KEYS,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"), EIGHT),
    **dict.fromkeys(("inkling_text", "inkling2_text"), RELATIVE),
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "jetmoe": {"kv_channels": 8},
    "lfm2": CONVOLUTION,
    "lfm2_moe": CONVOLUTION,
    "lfm3": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "sliding_attention"]},
    "longcat_flash": {"zero_expert_num": 2, "n_routed_experts": 4},
    "mamba2": {"num_heads": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "moshi": {"audio_vocab_size": 32},
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"], "indexer_n_heads": 2, "indexer_kv_heads": 1,
        "indexer_head_dim": 8, "indexer_budget": 16, "indexer_compress_ratio": 4,
    },
    "reformer": {
        "is_decoder": True, "axial_pos_shape": [16, 16], "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 16, "lsh_attn_chunk_length": 16,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "num_key_value_heads": 2},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "mamba_dt_rank": 4,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "mamba_headdim": 8},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip

# causal model types of transformers that are no decoders of text by themselves, and what they are
NO_DECODERS: dict[str, str] = {
    **dict.fromkeys(
        ("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
         "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm", "xlm-roberta", "xlm-roberta-xl",
         "xlnet", "xmod"),
        "encoder",
    ),
    **dict.fromkeys(
        ("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart",
         "prophetnet", "trocr", "whisper"),
        "encoder-decoder",
    ),
    **dict.fromkeys(("moshi", "musicgen", "musicgen_melody"), "audio"),
    **dict.fromkeys(
        ("cohere_compass_text", "emu3", "fuyu", "gemma3n", "git", "got_ocr2", "mllama", "moss_transcribe_diarize"),
        "more than text",
    ),
    **dict.fromkeys(("phi4_multimodal", "dots3_note", "gemma4", "gemma4_unified", "llama4"), "more than text"),
    **dict.fromkeys(("gemma3", "qwen3_5", "qwen3_5_moe", "qwen4_exp"), "more than text"),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), "draft model"),
}  # fmt: skip


# what a config class may want before it has values: transformers 5.17's of MusicGen has no defaults of these
PARTS: dict[str, Any] = {
    "text_encoder": {"model_type": "t5"},
    "audio_encoder": {"model_type": "encodec"},
    "decoder": {},
}
WANTED = {"musicgen": PARTS, "musicgen_melody": PARTS}


def config_of(kind: str) -> PretrainedConfig:
    """The small config of a type."""
    return CONFIG_MAPPING[kind](**{**small(CONFIG_MAPPING[kind]), **OWN.get(kind, {})})


def small(kind: type[PretrainedConfig]) -> dict[str, Any]:
    """The settings of a config class whose names say that they are sizes, made small; of those inside it too. Weights
    are large enough that what a token sees moves its logits."""
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    found: dict[str, Any] = {}
    for name, value in defaults.items():
        if isinstance(value, int) and not isinstance(value, bool):
            rule = next((size for pattern, size in RULES if re.fullmatch(pattern, name)), None)
            found |= {} if rule is None else {name: rule}
        elif isinstance(value, float) and re.fullmatch("initializer_range|init_std|init_method_std", name):
            found[name] = 0.2
    heads = defaults.get("num_attention_heads")
    if "num_key_value_heads" in found and defaults["num_key_value_heads"] == heads:
        found["num_key_value_heads"] = found["num_attention_heads"]
    inner: Any
    for name, inner in kind.sub_configs.items():
        sized: Any = inner
        if inner is not PretrainedConfig and dataclasses.is_dataclass(inner):
            found[name] = {**small(sized), **OWN.get(sized.model_type, {})}
    return found


def model_of(kind: str, seed: int = 0) -> Any:
    """A random model of a type, in transformers' class for causal models; nothing in it is zero from the start, so that
    whatever is tuned has an effect."""
    torch.manual_seed(seed)
    return filled(AutoModelForCausalLM.from_config(config_of(kind)).eval())


def filled(model: Any) -> Any:
    """The same, its biases and whatever is zero random."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or not parameter.any():
                parameter.normal_(std=0.1)
    return model


# sizes of what sees and hears in models that take more than text
EYE: dict[str, Any] = {
    "image_size": 28, "patch_size": 14, "depth": 2, "num_hidden_layers": 2, "hidden_size": 32, "embed_dim": 32,
    "out_hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "num_heads": 4,
    "head_dim": 8, "spatial_merge_size": 2, "fullatt_block_indexes": [1], "deepstack_visual_indexes": [0],
    "num_position_embeddings": 16, "position_embedding_size": 16, "projection_dim": 32, "vision_output_dim": 32,
    "projector_input_dim": 32, "projector_output_dim": 32, "pooling_kernel_size": 1,
}  # fmt: skip


def whole_of(kind: str, **more: Any) -> Any:
    """A random model of a type that takes images too, eyes and all, in transformers' class for it."""
    usual: Any = CONFIG_MAPPING[kind]()
    text: Any = type(usual.get_text_config(decoder=True))
    settings: dict[str, Any] = {
        "text_config": {**small(text), **OWN.get(text.model_type, {}), "model_type": text.model_type}
    }
    seeing = getattr(usual, "vision_config", None) or usual.sub_configs["vision_config"]()
    sizes = {name: size for name, size in EYE.items() if name in seeing.to_dict()}
    settings["vision_config"] = {**sizes, "model_type": seeing.model_type}
    if getattr(usual, "audio_config", None) is not None:
        settings["audio_config"] = None
    torch.manual_seed(0)
    return filled(AutoModelForImageTextToText.from_config(CONFIG_MAPPING[kind](**settings, **more)).eval())


def default_values(kind: str) -> dict[str, Any]:
    """What config.json of a type says where all is as its class has it; a draft model's class has no such."""
    own: Any = CONFIG_MAPPING[kind]
    draft = NO_DECODERS.get(kind) == "draft model"
    found = {"text_config": PLAIN_LAYERS} if draft else own(**deepcopy(WANTED.get(kind, {}))).to_dict()
    return json.loads(json.dumps(found, default=str)) | {"model_type": kind}


def save(kind: str, folder: Path) -> Path:
    """A random model of a type with the tiny tokenizer, as a folder; of what is no decoder of text config.json alone,
    from which it is refused."""
    if kind in NO_DECODERS:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(default_values(kind)), encoding="utf-8")
    else:
        model_of(kind).save_pretrained(str(folder))
    tiny.make_tokenizer().save_pretrained(str(folder))
    return folder
