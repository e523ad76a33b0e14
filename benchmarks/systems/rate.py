"""The rate of this machine's matrix products, by which a floor of operations becomes one of time.

    python rate.py SETTINGS.json

Out: operations per second of the best of some products, in fp32, and in bf16 where the processor computes it.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import meter as meters

SIZE, TRIES = 2048, 6


def rate(dtype: str, device: str) -> float:
    """Operations per second of a square product."""
    import torch

    left, right = (torch.randn(SIZE, SIZE, dtype=getattr(torch, dtype), device=device) for _ in range(2))
    best = float("inf")
    for _ in range(TRIES):
        began = time.perf_counter()
        product = left @ right
        product[0, 0].item()  # waits for a GPU
        best = min(best, time.perf_counter() - began)
    return 2 * SIZE**3 / best


def main() -> None:
    """Measure."""
    import torch

    settings = meters.settings()
    fast = settings["device"] != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    found = {
        "fp32": rate("float32", settings["device"]),
        "bf16": rate("bfloat16", settings["device"]) if fast else None,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if settings["device"] != "cpu" else None,
    }
    Path(settings["result"]).write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
