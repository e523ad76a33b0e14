"""Log-likelihoods for lm-eval: fitune's flat batches beside lm-eval's own `hf` model, on rows of mixed length.

    python benchmarks/harness.py [--model FOLDER] [--rows 400] [--repeats 5] [--write]

Both score the same requests, in turns, so that what else the machine does meets both: questions of several lengths with
four answers each (multiple choice), and texts with one continuation. Printed: the ratio of CPU seconds, the median of
the turns, and the largest relative difference of a log-likelihood. Needs lm-eval.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

from fitune.commands.demo import bundled
from fitune.core.events import Silent
from fitune.engine.loading import load

RESULT = Path(__file__).parents[1] / "results" / "harness.json"


def requests(rows: int, kind: str) -> list[Any]:
    """Requests as lm-eval makes them. kind: choices (four answers to each question) or texts."""
    from lm_eval.api.instance import Instance

    rng = random.Random(kind)
    lines = (bundled() / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    turns = [[m["content"] for m in json.loads(line)["messages"]] for line in lines]
    found = []
    for _ in range(rows):
        shots = rng.sample(turns, rng.choice([0, 0, 1, 2, 4, 8]))
        context = "\n".join(f"{q} {a}" for q, a in shots) + ("\n" if shots else "") + rng.choice(turns)[0]
        answers = [turn[1] for turn in rng.sample(turns, 4 if kind == "choices" else 1)]
        found += [Instance("loglikelihood", {}, (context, " " + answer), n) for n, answer in enumerate(answers)]
    return found


def measured(model: Any, some: list[Any]) -> tuple[float, list[tuple[float, bool]]]:
    """CPU seconds, and what was found."""
    began = time.process_time()
    found = model.loglikelihood(some, disable_tqdm=True)
    return time.process_time() - began, found


def compared(folder: str, rows: int, repeats: int, batch: int) -> dict[str, dict[str, float]]:
    """Both models on both kinds of requests."""
    from lm_eval.models.huggingface import HFLM

    from fitune.commands.harness_model import FlatLM

    ours = FlatLM(load(folder, device="cpu", precision="fp32"), "flat", Silent())
    theirs = HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=batch)
    results = {}
    for kind in ("choices", "texts"):
        some = requests(rows, kind)
        for model in (ours, theirs):
            model.loglikelihood(some[:40], disable_tqdm=True)  # kernels are made before
        turns = [(measured(ours, some), measured(theirs, some)) for _ in range(repeats)]
        pairs = list(zip(turns[0][0][1], turns[0][1][1], strict=True))
        results[kind] = {
            "requests": len(some),
            "ratio": statistics.median(other[0] / mine[0] for mine, other in turns),
            "least_ratio": min(other[0] / mine[0] for mine, other in turns),
            "largest_relative_difference": max(abs(a[0] - b[0]) / max(1.0, abs(b[0])) for a, b in pairs),
            "greedy_differs": sum(bool(a[1]) != bool(b[1]) for a, b in pairs),
        }
    return results


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(bundled() / "model"))
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16, help="batch size of lm-eval's own model")
    parser.add_argument("--write", action="store_true", help="write results/harness.json")
    args = parser.parse_args()
    found = compared(args.model, args.rows, args.repeats, args.batch)
    print(json.dumps(found, indent=1))
    if args.write:
        record = {"command": "python benchmarks/harness.py --write", "model": Path(args.model).name, "rows": args.rows,
                  "batch": args.batch, **found}  # fmt: skip
        RESULT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
