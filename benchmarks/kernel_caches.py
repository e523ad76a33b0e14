"""Resident memory that compiled kernels take: one for each number of tokens, kept until a bound of their cache.

    python benchmarks/kernel_caches.py [--sizes 200] [--bounds 1024 128 64 8]

Products of five small bf16 matrices, forward and backward, with a new number of tokens each step, in a process for each
bound of oneDNN's caches (`ONEDNN_PRIMITIVE_CACHE_CAPACITY`, `LRU_CACHE_CAPACITY`); 1,024 is torch's own. Prints the MiB
by which the process grew, and the seconds, of which only the ratio in one run means anything. On a processor whose
bf16 products need no compiled kernels nothing grows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

WORK = """
import json, sys, time
import psutil, torch
sizes = int(sys.argv[1])
process, layers = psutil.Process(), [torch.nn.Linear(96, 96, dtype=torch.bfloat16) for _ in range(5)]
def step(tokens):
    x = torch.randn(tokens, 96, dtype=torch.bfloat16)
    for layer in layers:
        x = layer(x).relu()
    x.sum().backward()
step(700)
before, began = process.memory_info().rss, time.perf_counter()
for tokens in range(100, 100 + sizes):
    step(tokens)
print(json.dumps([(process.memory_info().rss - before) / 2**20, time.perf_counter() - began]))
"""


def main() -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, default=200)
    parser.add_argument("--bounds", type=int, nargs="+", default=[1024, 128, 64, 8])
    args = parser.parse_args()
    for bound in args.bounds:
        caches = dict.fromkeys(("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"), str(bound))
        done = subprocess.run(
            [sys.executable, "-c", WORK, str(args.sizes)], env={**os.environ, **caches}, capture_output=True, text=True
        )
        grown, seconds = json.loads(done.stdout)
        print(f"bound {bound:>5}: {grown:6.0f} MiB after {args.sizes} sizes, {seconds:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
