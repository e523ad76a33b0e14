"""What fitune does, in figures that a change of its organisation must leave alone.

`python scripts/record_behaviour.py OUT.json` trains eight small models (each in a process of its own) and writes the
SHA-256 of each tensor that was tuned, the losses of each step to the last bit, and what `fitune plan --json` and
`fitune inspect --json` print in three cases each. Run it before the first move and after the last, on one machine and
with one thread (`OMP_NUM_THREADS=1`); `python scripts/record_behaviour.py --compare BEFORE.json AFTER.json` names every
difference and exits with 1 where there is one. Bits differ between machines, and between versions of torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COMMON = ["--max-steps", "6", "--batch-size", "4", "--max-length", "64", "--save-every", "3", "--precision", "fp32"]
# name: (family of tests/support/tiny.py, flags)
RUNS: dict[str, tuple[str, list[str]]] = {
    "lora fp32": ("llama", ["--method", "lora"]),
    "full adamw-8bit": ("llama", ["--method", "full", "--optimizer", "adamw-8bit", "--lr", "1e-3"]),
    "p-tuning with dropout": ("gpt2", ["--method", "p-tuning"]),  # the model drops out a tenth
    "nf4 lora": ("llama", ["--method", "lora", "--quant", "nf4"]),
    "chatglm lora": ("chatglm", ["--method", "lora"]),
    "bloom bitfit": ("bloom", ["--method", "bitfit"]),
    "prefix": ("llama", ["--method", "prefix"]),
    "tail": ("qwen2", ["--method", "tail"]),
}
PLANS = {
    "lora of a catalog model": ["llama-3.1-8b", "--gpu", "24GB", "--max-length", "1024"],
    "nf4 with checkpointing": ["qwen2.5-7b", "--gpu", "12GB", "--quant", "nf4", "--checkpointing", "true"],
    "a method for a folder": ["llama", "--method", "full", "--gpu", "8GB", "--max-length", "64"],
}
INSPECTS = {
    "a chat template": ["--model", "llama"],
    "cut to 24 tokens": ["--model", "qwen2", "--max-length", "24"],
    "chatglm": ["--model", "chatglm"],
}
OF_THE_MOMENT = ("seconds", "free", "busy", "load", "version", "created", "time")  # parts of keys that are left out


def fitune(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The program, in a folder."""
    return subprocess.run(
        [sys.executable, "-m", "fitune", *arguments],
        cwd=folder, text=True, capture_output=True, check=False,
        env={**os.environ, "FITUNE_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "COLUMNS": "80"},
    )  # fmt: skip


def models(folder: Path) -> None:
    """The families that the runs name, and rows."""
    sys.path.insert(0, str(ROOT / "tests"))
    from support import tiny  # type: ignore[import-not-found]  # of the tests' folder

    for family in {family for family, _ in RUNS.values()}:
        tiny.save(family, folder / family)
    tiny.write_rows(folder / "rows.jsonl", 40)


def tensors(folder: Path) -> dict[str, str]:
    """SHA-256 of each tensor of an adapter or a model."""
    import torch
    from safetensors import safe_open

    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(str(path), "pt") as file:
            for name in sorted(file.keys()):
                bits = file.get_tensor(name).contiguous().reshape(-1).view(torch.uint8)
                found[f"{path.name}:{name}"] = hashlib.sha256(bits.numpy().tobytes()).hexdigest()
    return found


def run(folder: Path, name: str) -> dict[str, Any]:
    """What one run made."""
    family, flags = RUNS[name]
    output = folder / "runs" / name.replace(" ", "-")
    done = fitune(folder, "train", "--model", family, "--data", "rows.jsonl", "--output", str(output), *COMMON, *flags)
    if done.returncode:
        return {"exit": done.returncode, "said": done.stderr[-2000:]}
    steps = [json.loads(line) for line in (output / "steps.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [float(step["loss"]).hex() for step in steps]
    return {"exit": 0, "losses": losses, "tensors": tensors(output / "adapter")}


def printed(folder: Path, verb: str, arguments: list[str]) -> Any:
    """What a verb prints as JSON, without what is of the moment."""
    done = fitune(folder, verb, *arguments, "--data", "rows.jsonl", "--json")
    if done.returncode not in (0, 1):
        return {"exit": done.returncode, "said": done.stderr[-2000:]}
    return lasting(json.loads(done.stdout), str(folder))


def lasting(value: Any, folder: str) -> Any:
    """Without figures of the moment and without the temporary folder's name."""
    if isinstance(value, Mapping):
        kept = {key: each for key, each in value.items() if not any(word in str(key) for word in OF_THE_MOMENT)}
        return {key: lasting(each, folder) for key, each in kept.items()}
    if isinstance(value, list):
        return [lasting(each, folder) for each in value]
    return value.replace(folder, "FOLDER") if isinstance(value, str) else value


def record() -> dict[str, Any]:
    """Everything."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place).resolve()
        models(folder)
        return {
            "versions": {name: metadata.version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
            "runs": {name: run(folder, name) for name in RUNS},
            "plans": {name: printed(folder, "plan", flags) for name, flags in PLANS.items()},
            "inspections": {name: printed(folder, "inspect", flags) for name, flags in INSPECTS.items()},
        }


def differences(before: Any, after: Any, where: str = "") -> Iterator[str]:
    """Every place where two records differ."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in [*before, *(key for key in after if key not in before)]:
            yield from differences(before.get(key), after.get(key), f"{where}/{key}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for at, (old, new) in enumerate(zip(before, after, strict=True)):
            yield from differences(old, new, f"{where}/{at}")
    elif before != after:
        yield f"{where}: {str(before)[:200]} -> {str(after)[:200]}"


def main(arguments: list[str]) -> int:
    """Record, or compare two records."""
    if arguments[:1] == ["--compare"] and len(arguments) == 3:
        before, after = (json.loads(Path(path).read_text(encoding="utf-8")) for path in arguments[1:])
        found = list(differences(before, after))
        print("\n".join(found) or "equal")
        return bool(found)
    if len(arguments) != 1:
        print(__doc__)
        return 2
    made = record()
    Path(arguments[0]).write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    failed = [f"{name}: {found}" for part in ("runs", "plans", "inspections") for name, found in made[part].items()
              if isinstance(found, dict) and found.get("exit")]  # fmt: skip
    print("\n".join(failed) or f"{len(RUNS)} runs, {len(PLANS)} plans, {len(INSPECTS)} inspections: {arguments[0]}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
