"""How many numbers of tokens a model meets in an epoch, with and without a filler, and what the filler costs.

    python benchmarks/sizes.py [DATA] --tokenizer FOLDER [--batch-sizes 1 2 4 8 16 32]

For each batch size: distinct numbers of tokens of an epoch's micro-batches, as they are and rounded up
(fitune.data.batches.rounded), and how many tokens more that is; once flat, once padded with rows of like length
together.
alpaca_zh_demo with Qwen2's tokenizer and batches of 8: see docs/memory.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from fitune.core.config import build
from fitune.data import pipeline, tokenizer
from fitune.data.batches import Loader, rounded
from fitune.data.store import lengths_of


def costs(lengths: np.ndarray, micro_batches: list[np.ndarray], *, padded: bool) -> tuple[int, int, float]:
    """Distinct sizes without and with a filler, and the share of tokens that it adds."""
    if padded:
        longest, rows = (np.array([f(lengths[m]) for m in micro_batches]) for f in (np.max, len))
        full = np.array([rounded(int(n)) for n in longest])
        return (
            len({*zip(longest, rows, strict=True)}),
            len({*zip(full, rows, strict=True)}),
            _more(full * rows, longest * rows),
        )
    plain = np.array([lengths[rows].sum() for rows in micro_batches])
    full = np.array([rounded(int(n)) for n in plain])
    return len(set(plain)), len(set(full)), _more(full, plain)


def _more(full: np.ndarray, plain: np.ndarray) -> float:
    return float(full.sum() / plain.sum() - 1)


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", default="../shared/data/alpaca_zh_demo.json")
    parser.add_argument("--tokenizer", type=Path, default=Path("../shared/tokenizers/qwen2"))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    words = tokenizer.load(args.tokenizer)
    config = build({"model": str(args.tokenizer), "data": [args.data], "skip_bad": True})
    found = pipeline.read(config, pipeline.Target(args.tokenizer, words, limit=4096, vocabulary=len(words)))
    lengths = lengths_of(found.samples).astype(np.int64)
    print(f"{len(lengths):,} rows, {lengths.sum():,} tokens, {lengths.mean():.0f} a row")
    for size in args.batch_sizes:
        for padded in (False, True):
            loader = Loader(found.samples, size, 1, args.seed, None, padded)
            micro_batches = [rows for step in loader.epoch_steps(0) for rows in step]
            plain, few, more = costs(lengths, micro_batches, padded=padded)
            layout = "padded" if padded else "flat"
            print(f"{size:>3} rows, {layout:>6}: {plain:>3} sizes, {few:>2} with a filler, {more:.2%} more work")


if __name__ == "__main__":
    main()
