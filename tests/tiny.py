"""Tiny random models, a tiny tokenizer and tiny data, all made here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
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
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from fitune import dataset
from fitune.cache import Cache
from fitune.config import LengthPolicy
from fitune.console import Watcher
from fitune.encode import Encoder
from fitune.families.chatglm_model import ChatGLMConfig, ChatGLMForConditionalGeneration
from fitune.records import Conversation, DataReport
from fitune.store import Rows, Samples
from fitune.store import write_rows as write_rows_

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
UNKNOWN = ["opt", "gpt_neox", "phi3"]  # not in the table: found by their names


def make_model(kind: str, seed: int = 0, vocabulary: int = 400) -> Any:
    """A random model of three blocks. KV heads < heads and a head width that is not width / heads where the family
    allows it; qwen2, gpt2, bloom and opt have tied heads; biases are random, not zero."""
    torch.manual_seed(seed)
    model = _make(kind, vocabulary)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.eval()


def _make(kind: str, vocabulary: int) -> Any:
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
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**common, tie_word_embeddings=True))
    if kind == "glm":
        return GlmForCausalLM(GlmConfig(**common, head_dim=12, attention_bias=True, pad_token_id=0))
    if kind == "phi3":
        return Phi3ForCausalLM(Phi3Config(**common, pad_token_id=0))
    return LlamaForCausalLM(LlamaConfig(**common, head_dim=12, tie_word_embeddings=kind == "llama-tied"))


def save(kind: str, folder: Path) -> Path:
    """A random model with the tiny tokenizer, as a folder."""
    make_model(kind).save_pretrained(str(folder))
    make_tokenizer().save_pretrained(str(folder))
    return folder


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
    conversations: Sequence[Conversation], encoder: Encoder, report: DataReport, policy: LengthPolicy = "cut"
) -> tuple[Samples, NDArray]:
    """The samples that a run would train on, and of each the number of its row."""
    rows, cache = as_rows(conversations), Cache()

    def encode(some: Rows, one: Encoder) -> Samples:
        return dataset.encode(some, one, cache, "", Watcher())

    whole = encode(rows, encoder.with_max_length(None))
    samples, of = dataset.fit(whole, np.arange(len(rows)), encoder, policy, encode)
    dataset.count(samples, of, len(rows), report)
    return samples, of


def write_rows(path: Path, count: int) -> Path:
    """Those rows as JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(count)), encoding="utf-8")
    return path
