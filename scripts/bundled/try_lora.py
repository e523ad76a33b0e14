"""Prove that the demo works: plain PEFT LoRA on the training rows, greedy exact match on the held-out rows.

    python scripts/bundled/try_lora.py --seeds 0 1 2

Prints the share of right answers before and after, in all and by kind, and the seconds of training.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from pretrain import answers
from transformers import AutoModelForCausalLM, AutoTokenizer

BUNDLED = Path(__file__).resolve().parents[2] / "src" / "fitune" / "bundled"
Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """Read a JSON lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def encode(tokenizer: Any, rows: list[Row]) -> list[tuple[list[int], int]]:
    """Token ids of each row and the length of its prompt, which does not count in the loss."""
    encoded = []
    for one in rows:
        prompt = tokenizer.apply_chat_template(one["messages"][:-1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(one["messages"], tokenize=False)
        ids = tokenizer.encode(whole, add_special_tokens=False)
        encoded.append((ids, len(tokenizer.encode(prompt, add_special_tokens=False))))
    return encoded


def score(model: Any, tokenizer: Any, rows: list[Row], show: int = 0) -> dict[str, float]:
    """Exact match in all and by kind."""
    given = answers(model, tokenizer, [one["messages"][0]["content"] for one in rows], limit=64)
    hits: dict[str, list[bool]] = {"all": []}
    for one, answer in zip(rows, given, strict=True):
        right = one["messages"][1]["content"]
        hits["all"].append(answer == right)
        hits.setdefault(one["kind"], []).append(answer == right)
        if answer != right and show > 0:
            show -= 1
            print(f"  {one['messages'][0]['content']!r} -> {answer!r}, not {right!r}")
    return {kind: round(sum(row) / len(row), 3) for kind, row in hits.items()}


def tune(model: Any, data: list[tuple[list[int], int]], pad: int, args: argparse.Namespace, seed: int) -> float:
    """Train the adapter in place and return the last loss."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.rate, weight_decay=0.0)
    rng = random.Random(seed)
    steps = args.epochs * math.ceil(len(data) / args.batch)
    warmup = max(1, steps // 20)
    step, last = 0, 0.0
    model.train()
    for _ in range(args.epochs):
        order = rng.sample(range(len(data)), len(data))
        for start in range(0, len(order), args.batch):
            group = [data[i] for i in order[start : start + args.batch]]
            width = max(len(ids) for ids, _ in group)
            ids = torch.tensor([row + [pad] * (width - len(row)) for row, _ in group])
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row, _ in group])
            labels = ids.clone()
            for index, (row, prompt) in enumerate(group):
                labels[index, :prompt] = -100
                labels[index, len(row) :] = -100
            share = min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
            for one in optimizer.param_groups:
                one["lr"] = args.rate * share
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            step, last = step + 1, loss.item()
    return last


def main() -> None:
    """Run the proof for each seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUNDLED / "model")
    parser.add_argument("--data", type=Path, default=BUNDLED / "data")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--show", type=int, default=10, help="how many wrong answers to print")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    train, held_out = (read_rows(args.data / f"{name}.jsonl") for name in ("train", "held_out"))
    data = encode(tokenizer, train)
    for seed in args.seeds:
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        if seed == args.seeds[0]:
            print("before", score(base, tokenizer, held_out, args.show), flush=True)
        config = LoraConfig(
            r=args.rank, lora_alpha=args.alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model = get_peft_model(base, config)
        began = time.monotonic()
        last = tune(model, data, tokenizer.pad_token_id, args, seed)
        seconds = time.monotonic() - began
        after = score(model, tokenizer, held_out, args.show)
        print(f"seed {seed}: {seconds:.1f}s loss {last:.4f}", after, flush=True)


if __name__ == "__main__":
    main()
