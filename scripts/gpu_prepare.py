"""What `scripts/gpu_accept.py` needs on a bare GPU machine, made on a machine without a GPU.

    python scripts/gpu_prepare.py [--root DIR] [--wheels | --cases]

`.whl/` gets wheels for Python 3.12 of fitune and of what GPU images lack (they have torch, transformers and PEFT):
pinned to the tested versions, bitsandbytes with its libraries for CUDA 13.0 and the CPU alone (4 MB of 43). `.gpu/`
gets the configurations whose memory is measured there, chosen by plans that are made here: some of each method, and
pairs around the limits of cards of 80 and 141 GB, one that just fits and one that just does not. On the GPU machine:

    python3 -m pip install --no-index --no-deps --target "$HOME/site" .whl/*.whl
    PYTHONPATH="$HOME/site" python3 scripts/gpu_accept.py --out results/gpu
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import zipfile
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parent.parent
MISSING = (
    "annotated-types", "attrs", "bitsandbytes", "cyclopts", "docstring-parser", "et-xmlfile", "iniconfig", "nltk",
    "openpyxl", "platformdirs", "pluggy", "pydantic", "pydantic-core", "pytest", "pytest-timeout", "rich-rst",
    "rouge-score", "typing-inspection",
)  # fmt: skip
PLATFORMS = [f"manylinux_{n}_x86_64" for n in ("2_17", "2_24", "2_27", "2_28", "2_34")]
PLATFORMS += ["manylinux2014_x86_64", "manylinux1_x86_64"]
KEPT_LIBRARIES = ("cuda130.so", "cpu.so")
MOST_MIB = 60  # of all wheels, so that they travel
CARDS = {"80": "NVIDIA H100 80GB HBM3", "141": "NVIDIA H200"}
CARD_MIB = {"80": 81_079, "141": 143_155}  # as torch says of them
PLAIN = (
    ("llama-3.2-1b", "full", False, 2, 1024),
    ("llama-3.1-8b", "lora", False, 2, 2048),
    ("llama-3.1-8b", "qlora", True, 2, 2048),
    ("llama-3.2-3b", "prefix", False, 2, 1024),
)


def main() -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="where .whl and .gpu are made")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--wheels", action="store_true", help="the wheels alone")
    which.add_argument("--cases", action="store_true", help="the configurations alone")
    args = parser.parse_args()
    problems: list[str] = []
    if not args.cases:
        problems += wheels(args.root / ".whl")
    if not args.wheels:
        cases(args.root / ".gpu" / "cases.json")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


def wheels(folder: Path) -> list[str]:
    """Fill the folder; what could not be had."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    problems = [why for name in (None, *MISSING) if (why := wheel(name, folder))]
    for path in folder.glob("bitsandbytes-*.whl"):
        repack(path)
    size = sum(path.stat().st_size for path in folder.iterdir()) / 2**20
    print(f"{folder}: {len(list(folder.iterdir()))} wheels, {size:.1f} MiB")
    if size > MOST_MIB:
        problems.append(f"the wheels take {size:.0f} MiB, more than {MOST_MIB}")
    return problems


def wheel(name: str | None, folder: Path) -> str | None:
    """The wheel of a package in the version that is installed here, or of fitune itself; why not, or None."""
    pip = [sys.executable, "-m", "pip"]
    quiet = ["--quiet", "--disable-pip-version-check", "--no-deps"]
    if name is None:
        done = subprocess.run([*pip, "wheel", str(ROOT), *quiet, "-w", str(folder)], capture_output=True, text=True)
        return None if done.returncode == 0 else f"fitune: {done.stderr.strip()[-200:]}"
    try:
        wanted = f"{name}=={metadata.version(name)}"
    except metadata.PackageNotFoundError:
        return f"{name}: not installed here, so its version is not known"
    target = ["--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"]
    target += [word for platform in PLATFORMS for word in ("--platform", platform)]
    done = subprocess.run(
        [*pip, "download", *quiet, *target, "-d", str(folder), wanted], capture_output=True, text=True
    )
    if done.returncode:  # there is none: a package of Python alone can be built
        done = subprocess.run([*pip, "wheel", *quiet, "-w", str(folder), wanted], capture_output=True, text=True)
    return None if done.returncode == 0 else f"{wanted}: {done.stderr.strip()[-200:]}"


def repack(path: Path) -> None:
    """A wheel of bitsandbytes with the libraries that are needed alone."""
    new = path.with_suffix(".new")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(new, "w", zipfile.ZIP_DEFLATED) as made:
        for item in old.infolist():
            if not item.filename.endswith(".so") or item.filename.endswith(KEPT_LIBRARIES):
                made.writestr(item, old.read(item.filename))
    new.replace(path)


def cases(path: Path, most: int = 2) -> None:
    """Write the configurations for each size of card.

    Args:
        path: the file.
        most: how many around the limit of a card.
    """
    sys.path[:0] = [str(ROOT / "benchmarks")]
    import memory_gpu

    found = {}
    for size, name in CARDS.items():
        total = CARD_MIB[size] * memory_gpu.MIB
        card = memory_gpu.Card(name, "planned", total, total, "bf16")
        near = memory_gpu.around(total, card, most)
        plain = [memory_gpu.Case(*values) for values in PLAIN]
        found[size] = {"plain": [asdict(case) for case in plain], "capped": [asdict(case) for case in near]}
        print(f"{size} GB: {len(plain)} configurations, around the limit: {', '.join(case.name for case in near)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
