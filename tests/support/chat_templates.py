"""Jinja chat templates with the structure of published ones (templates/*.jinja), and a vocabulary with their tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


def read(name: str) -> str:
    """One of the templates beside this file."""
    return (Path(__file__).parent / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


# Qwen3: thoughts stand behind the last question only, the last answer has at least an empty one
QWEN3 = read("qwen3")
# the thinking half of the family: the prompt opens the thought
_HEADER = "{{- '<|im_start|>assistant\\n' }}\n    {%- if enable_thinking"
QWEN3_THINKING = QWEN3.replace(_HEADER, _HEADER.replace("assistant\\n", "assistant\\n<think>\\n"))
# Qwen2.5: a default system text, nothing depends on what follows
QWEN25 = read("qwen2.5")
# DeepSeek-R1 and its distillations: thoughts of all answers are dropped, the prompt opens one, arguments are text, and
# calls are written only where there is no content
R1 = read("r1")
# DeepSeek-V3.1: the prompt opens or closes the thought, the answer begins with the closing tag
V31 = read("v3.1")
# Gemma 2: no system role, strict alternation, texts are stripped
GEMMA2 = read("gemma2")
# Gemma 3: the template itself puts the system text into the first turn
GEMMA3 = read("gemma3")
# Mistral v0.3: system text and tools stand before the last question, ids of calls are a must, no header
MISTRAL = read("mistral")
# Llama 3.1: today's date in a system text of its own, tools in the first question, one call at a time
LLAMA31 = read("llama3.1")
# GLM-4.5: thoughts behind the last question only; an answer ends in nothing, the next role's token is its end
GLM45 = read("glm4.5")
# gpt-oss: channels; the last answer ends otherwise than those before it, and a call otherwise again
CHANNELS = read("channels")

SPECIAL = [
    "<pad>", "<eos>", "<s>", "<|im_start|>", "<|im_end|>", "<|User|>", "<|Assistant|>", "<|end_of_sentence|>",
    "<|tool_calls_begin|>", "<|tool_call_begin|>", "<|tool_sep|>", "<|tool_call_end|>", "<|tool_calls_end|>",
    "<|tool_outputs_begin|>", "<|tool_output_begin|>", "<|tool_output_end|>", "<|tool_outputs_end|>",
    "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]",
    "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[gMASK]", "<sop>",
    "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>",
    "<|return|>", "<|call|>", "<|turn>", "<turn|>", "<|think|>", "<|channel>", "<channel|>", "<|tool>", "<tool|>",
    "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>', "<|im_sep|>", "<|tool|>",
    "<|/tool|>", "<|tool_call|>", "<|/tool_call|>", "<|tool_response|>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]",
    "<|endoftext|>", "<|thought_start|>", "<|thought_end|>", "<|tool_call_start|>",
]  # fmt: skip
PLAIN = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"]
# as Qwen's: a full stop and the line breaks behind it make one token, whoever wrote which
SPLIT = r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


# as in the vocabularies of Llama's first two versions: a line break is a token of its own
LINES = r" ?\p{L}+|[^\p{L}]"


def make_tokenizer(jinja: object, eos: str = "<eos>", *, as_llama: bool = False) -> Any:
    """A byte-level BPE with every token of these templates, tags of thoughts and calls among them as plain ones.

    as_llama: line breaks are tokens of their own, and a text begins with BOS.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LINES if as_llama else SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["Two make five.\n\nIt is.\n", "A cherry.\n"] * 20, trainer)
    if as_llama:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=eos, bos_token="<s>", pad_token="<pad>", additional_special_tokens=SPECIAL[3:]
    )
    tokenizer.add_tokens(PLAIN)
    tokenizer.chat_template = jinja
    return tokenizer
