"""How long preparing takes and what it holds: made rows, or a file of yours.

    python scripts/scale.py rows 1000000 build/million.jsonl     # make rows (ends in .parquet: as Parquet)
    python scripts/scale.py time DATA --model FOLDER             # prepare twice: anew, then from the cache
    python scripts/scale.py train 1000000 results/scale.json     # both kinds of file: prepare, train, peak memory

`time` leaves imports out; `train` runs `fitune train` as a process of its own and takes its peak resident memory from
the operating system.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

WORDS = [*("the", "capital", "river", "north", "bridge", "seven", "walk", "answer"), *"北国的首都是米拉河桥山问题答"]


def rows(count: int) -> Iterator[dict[str, str]]:
    """Instructions with answers of different lengths, half of them Chinese; the same for the same count."""
    draw = random.Random(count)
    for number in range(count):
        words = draw.choices(WORDS, k=draw.randint(6, 60))
        cut = draw.randint(2, len(words) - 2)
        yield {"instruction": f"{number}: {' '.join(words[:cut])}?", "output": " ".join(words[cut:])}


def write(path: Path, count: int) -> None:
    """The rows as JSON lines or Parquet; neither is held whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix != ".parquet":
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(count))
        return
    import pyarrow as pa
    from pyarrow import parquet

    schema = pa.schema([("instruction", pa.string()), ("output", pa.string())])
    with parquet.ParquetWriter(path, schema) as out:
        some: list[dict[str, str]] = []
        for row in rows(count):
            some.append(row)
            if len(some) == 20_000:
                out.write_table(pa.Table.from_pylist(some, schema))
                some = []
        if some:
            out.write_table(pa.Table.from_pylist(some, schema))


def timed(data: str, model: str) -> dict[str, float]:
    """Seconds to prepare, anew and from the cache, without the imports."""
    from fitune.checks import datachecks
    from fitune.core.config import build
    from fitune.data import tokenizer

    folder = Path(model)
    words = tokenizer.load(folder)
    seconds = {}
    with tempfile.TemporaryDirectory() as cache:
        config = build({"model": model, "data": [data], "skip_bad": True, "cache": cache})
        for name in ("anew", "from the cache"):
            start = time.perf_counter()
            found = datachecks.read(config, folder, words, limit=4096, vocabulary=len(words))
            seconds[name] = round(time.perf_counter() - start, 2)
            print(f"{name}: {seconds[name]} s, {len(found.samples):,} samples, {found.report.tokens:,} tokens")
    return seconds


def trained(path: Path, folder: Path) -> dict[str, float]:
    """Twenty steps of `fitune train` on that file, anew and again from the cache: seconds and peak memory."""
    from fitune.commands.demo import bundled

    figures: dict[str, float] = {"file_mib": round(path.stat().st_size / 2**20, 1)}
    environment = {**os.environ, "FITUNE_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "2"}
    for name in ("anew", "cached"):
        command = [
            *(sys.executable, "-m", "fitune", "train", "--model", str(bundled() / "model"), "--data", str(path)),
            *("--max-steps", "20", "--eval-every", "20", "--output", str(folder / f"run-{path.suffix[1:]}-{name}")),
        ]
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{' '.join(command)}: failed")
        figures[f"{name}_seconds"] = round(time.perf_counter() - start, 1)
        figures[f"{name}_peak_mib"] = round(usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 1024), 1)
    return figures


def record(count: int, output: Path) -> None:
    """Both kinds of file, written down."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kinds = {}
        for suffix in ("jsonl", "parquet"):
            path = folder / f"rows.{suffix}"
            write(path, count)
            kinds[suffix] = trained(path, folder)
            print(suffix, kinds[suffix])
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "tokenizers", "pyarrow")}
    values = {
        "command": f"python scripts/scale.py train {count} {output}",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"cores": os.cpu_count(), "processor": platform.machine()},
        "versions": versions,
        "rows": count,
        **kinds,
    }
    output.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    made = verbs.add_parser("rows")
    made.add_argument("count", type=int)
    made.add_argument("path", type=Path)
    time_it = verbs.add_parser("time")
    time_it.add_argument("data")
    time_it.add_argument("--model", required=True)
    train_it = verbs.add_parser("train")
    train_it.add_argument("count", type=int)
    train_it.add_argument("output", type=Path)
    given = parser.parse_args()
    if given.verb == "rows":
        write(given.path, given.count)
    elif given.verb == "time":
        timed(given.data, given.model)
    else:
        record(given.count, given.output)


if __name__ == "__main__":
    main()
