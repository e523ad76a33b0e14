"""What `scripts/gpu_accept.py` needs on a bare GPU machine, made on a machine without a GPU.

    python scripts/gpu_prepare.py [--root DIR] [--wheels | --cases] [--python 3.12]

`.whl/` gets wheels of fitune and of what GPU images lack (they have torch, transformers and PEFT): pinned to the tested
versions, bitsandbytes with its libraries for CUDA 13.0 and the CPU alone (4 MB of 43). `.gpu/` gets the commit, and the
configurations whose memory is measured there, chosen by plans that are made here: some of each method, and pairs around
the limits of cards of 24, 80 and 141 GB, one whose plan takes 0.97 of the limit and one of 1.05. git ignores both
folders. With the tree they stay under 64 MiB. On the GPU machine, in a copy of the tree with both:

    python3 scripts/gpu_accept.py --out results/gpu
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
MISSING = (
    "absl-py", "annotated-types", "anyio", "attrs", "bitsandbytes", "certifi", "charset-normalizer", "cloudpickle",
    "colorama", "cyclopts", "defusedxml", "docstring-parser", "et-xmlfile", "gguf", "h11", "hypothesis", "idna",
    "iniconfig", "jinja2", "joblib", "lxml", "markdown-it-py", "mdurl", "nltk", "openpyxl", "peft", "platformdirs",
    "pluggy", "portalocker", "protobuf", "psutil", "pydantic", "pydantic-core", "pygments", "pytest",
    "pytest-timeout", "requests", "rich", "rich-rst", "rouge-score", "sacrebleu", "sentencepiece", "six",
    "sortedcontainers", "starlette", "tabulate", "typing-inspection", "urllib3", "uvicorn",
)  # fmt: skip
PLATFORMS = [f"manylinux_{n}_x86_64" for n in ("2_17", "2_24", "2_27", "2_28", "2_34")]
PLATFORMS += ["manylinux2014_x86_64", "manylinux1_x86_64"]
KEPT_LIBRARIES = ("cuda130.so", "cpu.so")
MOST_MIB = 64  # of wheels and tree together, so that they travel
AIMS = ((0.97, 1.05),)  # plans, in limits: one that just fits, and one that just does not
MOST = 2  # configurations around a limit
# By GB: the name, MiB as torch says, and MiB of the limit that is set, which leaves the driver what is its own
CARDS = {
    "24": ("NVIDIA GeForce RTX 4090", 24_081, 22_528),
    "80": ("NVIDIA H100 80GB HBM3", 81_079, 77_824),
    "141": ("NVIDIA H200", 143_155, 138_240),
}
PLAIN = {
    "24": (("llama-3.2-1b", "lora", False, 2, 1024), ("llama-3.1-8b", "qlora", True, 2, 2048)),
    "80": (
        ("llama-3.2-1b", "full", False, 2, 1024),
        ("llama-3.1-8b", "lora", False, 2, 2048),
        ("llama-3.1-8b", "qlora", True, 2, 2048),
        ("llama-3.2-3b", "prefix", False, 2, 1024),
        ("llama-3.1-8b", "lora, blocks 0-15 in main memory", False, 2, 2048),
        ("llama-3.1-8b", "lora, blocks 0-15 recomputed", False, 2, 2048),
        ("llama-3.1-8b", "dpo", False, 4, 1024),
    ),
}
PLAIN["141"] = PLAIN["80"]


def main() -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="where .whl and .gpu are made")
    parser.add_argument("--python", default="3.12", help="of the GPU machine")
    parser.add_argument("--cards", nargs="*", choices=CARDS, default=list(CARDS), help="GB of the cards")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--wheels", action="store_true", help="the wheels alone")
    which.add_argument("--cases", action="store_true", help="the configurations alone")
    args = parser.parse_args()
    problems: list[str] = []
    if not args.cases:
        problems += wheels(args.root / ".whl", args.python)
    if not args.wheels:
        problems += cases(args.root / ".gpu" / "cases.json", args.cards)
    prepared(args.root / ".gpu" / "prepared.json")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


# ---- wheels ----


def wheels(folder: Path, python: str) -> list[str]:
    """Fill the folder; what could not be had."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    problems = [why for name in (None, *MISSING) if (why := wheel(name, folder, python))]
    for path in folder.glob("bitsandbytes-*.whl"):
        repack(path)
    size, tree = mib(folder.iterdir()), mib(tracked())
    print(f"{folder}: {len(list(folder.iterdir()))} wheels, {size:.1f} MiB; the tree {tree:.1f} MiB")
    if size + tree > MOST_MIB:
        problems.append(f"wheels and tree take {size + tree:.0f} MiB, more than {MOST_MIB}")
    return problems + [f"{path.name}: cannot be unpacked onto a path" for path in folder.iterdir() if not flat(path)]


def wheel(name: str | None, folder: Path, python: str) -> str | None:
    """The wheel of a package in the version that is installed here, or of fitune itself; why not, or None."""
    pip = [sys.executable, "-m", "pip"]
    quiet = ["--quiet", "--disable-pip-version-check", "--no-deps"]
    if name is None:
        return failed("fitune", [*pip, "wheel", str(ROOT), *quiet, "-w", str(folder)])
    try:
        wanted = f"{name}=={metadata.version(name)}"
    except metadata.PackageNotFoundError:
        return None  # nothing here needs it
    target = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    target += [word for platform in PLATFORMS for word in ("--platform", platform)]
    if failed(wanted, [*pip, "download", *quiet, *target, "-d", str(folder), wanted]) is None:
        return None
    return failed(wanted, [*pip, "wheel", *quiet, "-w", str(folder), wanted])  # of Python alone: it can be built


def failed(name: str, command: Sequence[str]) -> str | None:
    """Why a command failed, or None."""
    done = subprocess.run(command, capture_output=True, text=True)
    return None if done.returncode == 0 else f"{name}: {done.stderr.strip()[-200:]}"


def repack(path: Path) -> None:
    """A wheel of bitsandbytes with the libraries that are needed alone."""
    new = path.with_suffix(".new")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(new, "w", zipfile.ZIP_DEFLATED) as made:
        for item in old.infolist():
            if not item.filename.endswith(".so") or item.filename.endswith(KEPT_LIBRARIES):
                made.writestr(item, old.read(item.filename))
    new.replace(path)


def flat(path: Path) -> bool:
    """Has a wheel its modules at its root, so that unpacking it installs it?"""
    with zipfile.ZipFile(path) as packed:
        return not any(".data/purelib/" in name or ".data/platlib/" in name for name in packed.namelist())


def tracked() -> list[Path]:
    """The files of the tree."""
    done = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True)
    return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def mib(files: Any) -> float:
    """Of all of them."""
    return float(sum(path.stat().st_size for path in files)) / 2**20


# ---- configurations ----


def cases(path: Path, cards: Sequence[str]) -> list[str]:
    """Write the configurations for each size of card; where there are too few."""
    sys.path[:0] = [str(ROOT / "benchmarks")]
    import memory_gpu

    found, problems = {}, []
    for size in cards:
        name, total, limit = CARDS[size]
        card = memory_gpu.Card(name, "planned", total * memory_gpu.MIB, total * memory_gpu.MIB, "bf16")
        near = memory_gpu.around(limit * memory_gpu.MIB, card, MOST, AIMS)
        plain = [memory_gpu.Case(*values) for values in PLAIN[size]]
        found[size] = {"plain": [asdict(case) for case in plain], "capped": [asdict(case) for case in near]}
        print(f"{size} GB: {len(plain)} configurations, around the limit: {', '.join(case.name for case in near)}")
        if len(near) < MOST:
            problems.append(f"{size} GB: {len(near)} configurations around the limit, not {MOST}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return problems


def prepared(path: Path) -> None:
    """From which commit, and when: a copy without its history cannot say."""
    done = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    path.write_text(json.dumps({"commit": done.stdout.strip(), "date": now}), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
