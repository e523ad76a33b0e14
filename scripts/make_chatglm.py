"""A small random ChatGLM in its published layout: `python scripts/make_chatglm.py 1|2|3 FOLDER --tokenizer FOLDER`.

The vocabulary is the published one (130,528 rows in version 1, 65,024 in 2 and 3), the rest is small. Tokenizer files
are copied from a folder that has them. For trying things out and for tests: it knows nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import GlmForCausalLM

from fitune.models.families import original
from fitune.models.families.chatglm_model import ChatGLMForConditionalGeneration

TOKENIZER = ("ice_text.model", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")
FIRST: dict[str, Any] = {
    "_name_or_path": "THUDM/chatglm-6b", "architectures": ["ChatGLMModel"], "model_type": "chatglm",
    "auto_map": {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"},
    "bos_token_id": 130004, "eos_token_id": 130005, "mask_token_id": 130000, "gmask_token_id": 130001,
    "pad_token_id": 3, "hidden_size": 64, "inner_hidden_size": 256, "layernorm_epsilon": 1e-5,
    "max_sequence_length": 2048, "num_attention_heads": 4, "num_layers": 3, "position_encoding_2d": True,
    "torch_dtype": "float32", "use_cache": True, "vocab_size": 130528,
}  # fmt: skip
LATER: dict[str, Any] = {
    "architectures": ["ChatGLMModel"], "model_type": "chatglm",
    "auto_map": {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"},
    "add_bias_linear": False, "add_qkv_bias": True, "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0, "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True, "ffn_hidden_size": 160, "fp32_residual_connection": False, "hidden_dropout": 0.0,
    "hidden_size": 64, "kv_channels": 16, "layernorm_epsilon": 1e-5, "multi_query_attention": True,
    "multi_query_group_num": 2, "num_attention_heads": 4, "num_layers": 3, "original_rope": True,
    "padded_vocab_size": 65024, "post_layer_norm": True, "rmsnorm": True, "seq_length": 8192, "use_cache": True,
    "torch_dtype": "float32", "tie_word_embeddings": False, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def make(version: int, folder: Path, tokenizer: Path | None, seed: int = 0) -> Path:
    """Write the model.

    Args:
        version: 1, 2 or 3.
        folder: new.
        tokenizer: a folder with the published tokenizer's files.
        seed: of the weights.
    """
    values = FIRST if version == 1 else {"_name_or_path": f"THUDM/chatglm{version}-6b", **LATER}
    torch.manual_seed(seed)
    config = original.config_of({name: value for name, value in values.items() if name != "auto_map"})
    if version == 1:
        state = ChatGLMForConditionalGeneration(config).state_dict()
    else:
        native = GlmForCausalLM(config).state_dict()
        state = dict(original.published(native, lambda name: native[name]))
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(values, indent=1), encoding="utf-8")
    for name in TOKENIZER:
        if tokenizer is not None and (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)
    settings = folder / "tokenizer_config.json"
    if settings.is_file() and version > 1:  # 2 and 3 share a vocabulary; the name decides which prompts it is for
        named = {**json.loads(settings.read_text(encoding="utf-8")), "name_or_path": values["_name_or_path"]}
        settings.write_text(json.dumps(named, indent=1), encoding="utf-8")
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("version", type=int, choices=(1, 2, 3))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    given = parser.parse_args()
    print(make(given.version, given.folder, given.tokenizer))
