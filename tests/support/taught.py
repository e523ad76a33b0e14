"""Tiny models of each family that llama.cpp has, taught until they are sure of their answers.

In: the name of a kind. Out: a folder with the model, and what `fitune export --to gguf --verify` finds of it. A random
model prefers its next token by so little that two programs may choose two. These answer each prompt of the comparison
with tokens of one cycle through the vocabulary: the prompt decides where an answer starts and how far it steps, so that
no token comes twice in an answer and no two answers are the same.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from fitune.commands.export_gguf import GgufOptions, export_gguf
from fitune.commands.same_answers import PROMPTS, TOKENS, Sizes, questions
from fitune.engine.generation import SIDE_BY_SIDE, most_probable
from fitune.engine.loading import load
from fitune.models.configs import longest_row
from fitune.models.load import Tuned
from support import tiny

TAUGHT = [
    "llama", "llama-tied", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2",
    "gemma3", "phi3", "glm", "glm4", "gpt2", "gpt_neox", "bloom",
]  # fmt: skip
# Kinds whose logits alone are compared: teaching one takes minutes
UNTAUGHT = [
    "qwen3_next", "qwen3_5", "qwen3_5_moe", "phi", "glm4_moe", "gpt_oss", "deepseek_v2", "deepseek_v3", "granite",
    "granitemoe", "granitemoeshared", "olmo2", "olmoe", "cohere", "cohere2", "smollm3", "starcoder2", "stablelm",
    "ernie4_5", "seed_oss", "hunyuan_v1_dense", "arcee", "nemotron", "lfm2",
]  # fmt: skip
KINDS = [*TAUGHT, *UNTAUGHT]
FIRST, CYCLE = 5, 380  # of the tiny vocabulary, behind its control tokens
STEPS, TOGETHER, RATE = 200, 20, 0.01
SLOW = {"gemma", "gemma2", "gemma3", "gpt2", "gpt_neox", "bloom"}  # twice as many: GELU from a table takes a wider lead
STRINGS = 1_000  # one tokenizer for all: published ones have a test of their own
WIDE = {"sliding_window": 256}  # of kinds whose window llama.cpp has not: the context would end with it


@dataclass(frozen=True)
class Row:
    """What the comparison found of a family.

    Args:
        family: the kind of the tiny model.
        architecture: llama.cpp's name of it.
        prompts, prompts_same, tokens, strings, strings_same: compared, and equal.
        ties: answers that differ where two tokens are equally probable.
        logits: the largest difference, relative to the largest logit.
        margin: by how much the least sure token of all answers leads, relative to the largest logit.
        distinct: tokens of the answer with the fewest different ones.
        answers: different ones.
    """

    family: str
    architecture: str
    prompts: int
    prompts_same: int
    tokens: int
    strings: int
    strings_same: int
    ties: int
    logits: float
    margin: float
    distinct: int
    answers: int


def made(kind: str, **settings: Any) -> Any:
    """A random model with what llama.cpp expects of its kind."""
    if kind == "glm":  # heads that share the width of the model
        return tiny.make_model("glm", head_dim=8, **settings)
    if kind in ("qwen3_next", "qwen3_5"):  # a quarter of a head turns, and that is pairs; states of wilder ones swing
        settings = {"head_dim": 16, "initializer_range": 0.1, **settings}
    if kind == "gpt_oss":  # its own stretch of positions is rounded there, which has a test of its own
        settings = {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, **settings}
    if kind in ("qwen3_moe", "qwen3_next"):
        settings = {"norm_topk_prob": True, **settings}
    return tiny.make_model(kind, **settings)


def compared(kind: str, place: Path) -> Row:
    """Teach a model, and export it with the whole comparison.

    Args:
        kind: one of KINDS; the record has those of TAUGHT.
        place: an empty folder.
    """
    folder = place / "model"
    model = made(kind, **(WIDE if kind in ("mistral", "phi3") else {}))
    model.save_pretrained(str(folder))
    tiny.make_tokenizer().save_pretrained(str(folder))
    prompts = _prompts(load(folder, device="cpu", precision="fp32"))
    steps = 2 * STEPS if kind in SLOW else STEPS
    _teach(model, list(zip(prompts, _targets(len(prompts)), strict=True)), steps)
    model.save_pretrained(str(folder))
    done = export_gguf(folder, place / "a.gguf", GgufOptions(verify=True, sizes=Sizes(strings=STRINGS)))
    found = done.compared
    assert found is not None
    tuned = load(folder, device="cpu", precision="fp32")
    answers = [ids for start in range(0, len(prompts), SIDE_BY_SIDE) for ids in
               most_probable(tuned, prompts[start : start + SIDE_BY_SIDE], TOKENS)]  # fmt: skip
    return Row(
        kind, done.architecture, found.prompts, found.prompts_same, found.tokens, found.strings, found.strings_same,
        len(found.ties), found.logits, _margin(tuned.model, prompts, answers),
        min(len(set(ids)) for ids in answers), len({tuple(ids) for ids in answers}),
    )  # fmt: skip


def _prompts(tuned: Tuned) -> list[list[int]]:
    """Those of the comparison itself."""
    return [ids for _, ids in questions(tuned, Sizes(), longest_row(tuned.model.config))]


def _targets(count: int) -> list[list[int]]:
    """(count, TOKENS): walks on one cycle, from a place of their own, every second one by steps of two."""
    order = torch.Generator().manual_seed(0)
    cycle = (FIRST + torch.randperm(CYCLE, generator=order)).tolist()
    starts = torch.randperm(CYCLE, generator=order)[:count].tolist()
    return [[cycle[(start + (1 + n % 2) * k) % CYCLE] for k in range(TOKENS)] for n, start in enumerate(starts)]


def _teach(model: Any, rows: Sequence[tuple[list[int], list[int]]], steps: int) -> None:
    """Train on prompts and answers, rows of like length together."""
    ordered = sorted(rows, key=lambda row: len(row[0]))
    batches = [_batch(ordered[n : n + TOGETHER]) for n in range(0, len(ordered), TOGETHER)]
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    order = torch.Generator().manual_seed(0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, 2 * (steps - step) / steps)
        ids, labels = batches[int(torch.randint(len(batches), (), generator=order))]
        loss = cross_entropy(model(input_ids=ids).logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def _batch(rows: Sequence[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, longest): ids, filled on the right where no earlier token sees it, and labels of the answers."""
    longest = max(len(prompt) for prompt, _ in rows) + TOKENS
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for n, (prompt, answer) in enumerate(rows):
        ids[n, : len(prompt) + TOKENS] = torch.tensor(prompt + answer)
        labels[n, len(prompt) - 1 : len(prompt) + TOKENS - 1] = torch.tensor(answer)
    return ids, labels


@torch.no_grad()
def _margin(model: Any, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> float:
    """By how much the first of two tokens leads, at the least sure place of all answers."""
    least = float("inf")
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        first, second = logits.topk(2).values.unbind(-1)
        least = min(least, float(((first - second) / logits.abs().amax(-1)).min()))
    return least


HEADS = {
    "": "| family | in llama.cpp | prompts equal | tokens equal | ties | logits differ by | least lead |",
    ".zh-CN": "| 架构 | llama.cpp 中的名字 | 相同的提示 | 相同的 token | 并列 | logits 最大差 | 最小领先 |",
}


def lines(rows: Sequence[Row], language: str) -> list[str]:
    """The table of the page of a language ("" or ".zh-CN")."""
    of = {"": "of", ".zh-CN": "/"}[language]
    found = [HEADS[language], "|---|---|---|---|---|---|---|"]
    for row in rows:
        tokens = f"{row.tokens:,} {of} {row.prompts * TOKENS:,}"
        found.append(
            f"| {row.family} | {row.architecture} | {row.prompts_same} {of} {row.prompts} | {tokens} | {row.ties} | "
            f"{row.logits:.1e} | {row.margin:.1e} |"
        )
    return found


def read(file: Path) -> list[Row]:
    """The rows of results/gguf_families.json."""
    return [Row(**values) for values in json.loads(file.read_text(encoding="utf-8"))["families"]]


def record(rows: Sequence[Row]) -> dict[str, object]:
    """For JSON."""
    import importlib.metadata

    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "llama-cpp-python")}
    return {
        "command": "python scripts/gguf_families.py --write", "prompts": PROMPTS, "tokens_each": TOKENS, **versions,
        "families": [asdict(row) for row in rows],
    }  # fmt: skip
