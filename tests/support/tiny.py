"""Tiny random models, a tiny tokenizer and tiny data, all made here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from fitune.core.config import LengthPolicy
from fitune.core.events import Silent
from fitune.core.records import Conversation
from fitune.data import fitting
from fitune.data.cache import Cache
from fitune.data.encode import Encoder
from fitune.data.store import Rows, Samples
from fitune.data.store import write_rows as write_rows_
from fitune.models.families.chatglm_model import ChatGLMConfig, ChatGLMForConditionalGeneration

CHAT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL = ["<pad>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
TEXT = [
    "the capital of Norland is Mira",
    "北国的首都是米拉",
    "two plus three is five",
    "一加二等于三",
    "Hello, world!",
] * 8


def make_tokenizer(special: Sequence[str] = SPECIAL) -> Any:
    """A byte-level BPE with a chat template whose stop token is not the pad token."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(TEXT, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=special[1], pad_token=special[0], additional_special_tokens=list(special[2:])
    )
    tokenizer.chat_template = CHAT
    return tokenizer


FAMILIES = ["llama", "qwen2", "gpt2", "glm", "bloom", "chatglm"]
MORE = ["mistral", "qwen3", "gpt_neox", "opt", "gemma2", "gemma3", "phi3", "glm4"]
UNKNOWN = ["phi", "olmo2"]  # not in the table: found by their names
PARTIAL = ["qwen3_moe", "mixtral", "gpt_oss", "qwen3_next", "qwen3_5"]  # experts, or blocks of several kinds


def make_model(kind: str, seed: int = 0, vocabulary: int = 400, **settings: Any) -> Any:
    """A random model of three blocks. KV heads < heads and a head width that is not width / heads where the family
    allows it; qwen2, gpt2, bloom and opt have tied heads; biases are random, not zero. settings: further ones, for glm
    and the kinds of SHAPES."""
    torch.manual_seed(seed)
    model = _make(kind, vocabulary, settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.eval()


def _make(kind: str, vocabulary: int, settings: dict[str, Any]) -> Any:
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=vocabulary, n_embd=32, n_layer=3, n_head=4, n_positions=256, n_inner=64, initializer_range=0.2
        )
        return GPT2LMHeadModel(config)
    if kind == "bloom":  # six heads: the slopes are no plain powers
        return BloomForCausalLM(
            BloomConfig(vocab_size=vocabulary, hidden_size=48, n_layer=3, n_head=6, initializer_range=0.2)
        )
    if kind == "chatglm":
        return ChatGLMForConditionalGeneration(
            ChatGLMConfig(
                vocab_size=vocabulary, hidden_size=48, num_layers=3, num_attention_heads=4, inner_hidden_size=96,
                max_sequence_length=256, bos_token_id=6, eos_token_id=1, mask_token_id=8, gmask_token_id=7,
                pad_token_id=0, initializer_range=0.2,
            )
        )  # fmt: skip
    if kind == "opt":
        return OPTForCausalLM(
            OPTConfig(
                vocab_size=vocabulary, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=3,
                num_attention_heads=4, max_position_embeddings=256, init_std=0.2, dropout=0.0, pad_token_id=0,
            )
        )  # fmt: skip
    if kind == "gpt_neox":
        return GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
                num_attention_heads=4, max_position_embeddings=256, initializer_range=0.2,
            )
        )  # fmt: skip
    common = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
    }
    if kind in SHAPES:
        return _other(kind, common, settings)
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**common, tie_word_embeddings=True))
    if kind == "glm":
        return GlmForCausalLM(
            GlmConfig(**{**common, "head_dim": 12, "attention_bias": True, "pad_token_id": 0, **settings})
        )
    return LlamaForCausalLM(LlamaConfig(**common, head_dim=12, tie_word_embeddings=kind == "llama-tied"))


EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_experts": 4}
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
BALANCED = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
    "n_group": 1, "topk_group": 1,
}  # fmt: skip
LATENT = {
    "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4,
}  # fmt: skip
# transformers' classes, and what is set beside the common sizes: windows of 8, so that documents are longer than them
SHAPES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mistral": ("MistralForCausalLM", "MistralConfig", {"head_dim": 12, "sliding_window": 8}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 12, "tie_word_embeddings": True}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {"head_dim": 12}),
    "gemma2": (
        "Gemma2ForCausalLM", "Gemma2Config",
        {"head_dim": 12, "sliding_window": 8, "query_pre_attn_scalar": 12, "attn_logit_softcapping": 5.0,
         "final_logit_softcapping": 30.0},
    ),
    "gemma3": (
        "Gemma3ForCausalLM", "Gemma3TextConfig",
        {"head_dim": 12, "sliding_window": 8, "query_pre_attn_scalar": 12,
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {"pad_token_id": 0, "sliding_window": 8}),
    "glm4": ("Glm4ForCausalLM", "Glm4Config", {"head_dim": 12, "attention_bias": True, "pad_token_id": 0}),
    "phi": ("PhiForCausalLM", "PhiConfig", {"num_key_value_heads": 4}),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", {}),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", {}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", {"shared_expert_intermediate_size": 48, **EXPERTS}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {"head_dim": 12, **EXPERTS}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": (
        "GptOssForCausalLM", "GptOssConfig",
        {"head_dim": 12, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    ),
    "granite": (
        "GraniteForCausalLM", "GraniteConfig",
        {"attention_multiplier": 0.3, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0,
         "pad_token_id": 0},
    ),
    "granitemoe": (
        "GraniteMoeForCausalLM", "GraniteMoeConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0},
    ),
    "granitemoeshared": (
        "GraniteMoeSharedForCausalLM", "GraniteMoeSharedConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 16, "pad_token_id": 0},
    ),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", {}),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", {"num_hidden_layers": 4, "pad_token_id": 0}),
    "cohere": ("CohereForCausalLM", "CohereConfig", {"logit_scale": 0.5}),
    "cohere2": (
        "Cohere2ForCausalLM", "Cohere2Config", {"logit_scale": 0.5, "sliding_window": 8, "num_hidden_layers": 4},
    ),
    "ernie4_5": ("Ernie4_5ForCausalLM", "Ernie4_5Config", {"pad_token_id": 0}),
    "seed_oss": ("SeedOssForCausalLM", "SeedOssConfig", {"head_dim": 12, "pad_token_id": 0}),
    "hunyuan_v1_dense": ("HunYuanDenseV1ForCausalLM", "HunYuanDenseV1Config", {"head_dim": 12, "pad_token_id": 0}),
    "arcee": ("ArceeForCausalLM", "ArceeConfig", {"pad_token_id": 0}),
    "nemotron": ("NemotronForCausalLM", "NemotronConfig", {"pad_token_id": 0}),
    "olmoe": (
        "OlmoeForCausalLM", "OlmoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4},
    ),
    "glm4_moe": (
        "Glm4MoeForCausalLM", "Glm4MoeConfig",
        {"head_dim": 12, "attention_bias": True, "use_qk_norm": True, "routed_scaling_factor": 1.5, "pad_token_id": 0,
         **BALANCED},
    ),
    "deepseek_v2": ("DeepseekV2ForCausalLM", "DeepseekV2Config", {"q_lora_rank": 8, **LATENT, **BALANCED}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", {"q_lora_rank": 8, **LATENT, **BALANCED}),
    "lfm2": (
        "Lfm2ForCausalLM", "Lfm2Config",
        {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2, "pad_token_id": 0},
    ),
    "qwen3_next": (
        "Qwen3NextForCausalLM", "Qwen3NextConfig",
        {"head_dim": 12, "num_hidden_layers": 4, "shared_expert_intermediate_size": 32, **EXPERTS, **LINEAR},
    ),
    "qwen3_5_moe": (
        "Qwen3_5MoeForCausalLM", "Qwen3_5MoeTextConfig",
        {"head_dim": 16, "num_hidden_layers": 4, "shared_expert_intermediate_size": 32, **EXPERTS, **LINEAR},
    ),
    "qwen3_5": ("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", {"head_dim": 12, "num_hidden_layers": 4, **LINEAR}),
}  # fmt: skip


def _other(kind: str, common: dict[str, Any], settings: dict[str, Any]) -> Any:
    model, config, extra = SHAPES[kind]
    return getattr(transformers, model)(getattr(transformers, config)(**{**common, **extra, **settings}))


def save(kind: str, folder: Path) -> Path:
    """A random model with the tiny tokenizer, as a folder."""
    make_model(kind).save_pretrained(str(folder))
    make_tokenizer().save_pretrained(str(folder))
    return folder


DATA_ROWS = 16  # of the file that the fixture `data_file` writes


def rows(count: int) -> list[dict[str, Any]]:
    """Questions with answers of different lengths, in two languages."""
    made = []
    for n in range(count):
        question = f"what is {n} plus {n}?" if n % 2 else f"{n} 加 {n} 等于几？"
        answer = " ".join([str(2 * n)] * (1 + n % 5)) if n % 2 else f"等于 {2 * n}。"
        made.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
    return made


def as_rows(conversations: Sequence[Conversation]) -> Rows:
    """Conversations as they lie on disk."""
    cache = Cache()
    folder = cache.entry("rows", "test", lambda path: write_rows_(path, ((0, row) for row in conversations), {}))
    return Rows(folder, "test", keep=cache)


def encoded(
    conversations: Sequence[Conversation], encoder: Encoder, policy: LengthPolicy = "cut"
) -> tuple[Samples, NDArray]:
    """The samples that a run would train on, and of each the number of its row."""
    rows, cache = as_rows(conversations), Cache()

    def encode(some: Rows, one: Encoder) -> Samples:
        return fitting.encode(some, one, cache, "", Silent())

    whole = encode(rows, encoder.with_max_length(None))
    return fitting.fit(whole, np.arange(len(rows)), encoder, policy, encode)


def write_pairs(path: Path, count: int) -> Path:
    """The same questions, each with a right answer and a wrong one."""
    made = [
        {"prompt": turns[0]["content"], "chosen": turns[1]["content"], "rejected": f"no idea, {n % 7}, or so"}
        for n, turns in enumerate(row["messages"] for row in rows(count))
    ]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in made), encoding="utf-8")
    return path


def write_rows(path: Path, count: int) -> Path:
    """Those rows as JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(count)), encoding="utf-8")
    return path
