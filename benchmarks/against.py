"""fitune beside other systems, in one run: the same rows in the same order, from the same weights.

    python benchmarks/against.py --quick                     a table in minutes, on two cores
    python benchmarks/against.py --shapes 46.6M 0.5B --precisions fp32 bf16 --out FILE.json [--add]
    python benchmarks/against.py --show FILE.json            its tables again
    python benchmarks/against.py --pages                     those of the documentation, and its picture

Each system is installed into an environment of its own below build/against (pip alone needs the network), and trains in
a process of its own, one after the other, all of them again in each round. The processes are in `systems/`. Weights,
LoRA's initial matrices, rows, learning rates and the effective batch are the same, and the loss of every step is
compared with that of plain transformers: a system that is off by more than 1e-3 (in fp32 1e-4) is listed, and does not
count. The first steps are not measured. Operations, processed tokens and bytes saved for the backward pass are counted
in one more process of each system, so that counting takes no time of the others.

The tokenizer and the rows come from `--tokenizer` and `--data`; by default qwen2's and alpaca_zh_demo below `--shared`
(../shared, or $FITUNE_SHARED). Without them fitune's own small tokenizer does not fit the shapes, but `--shapes tiny`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import against_results as results
from fitune.core import processor as processors
from fitune.core.files import write_json

ROOT = Path(__file__).resolve().parents[1]
SYSTEMS = ROOT / "benchmarks" / "systems"
PINNED = ROOT / "src" / "fitune" / "constraints.txt"
WORK = ROOT / "build" / "against"
RESULTS, PICTURE = ROOT / "results" / "against.json", ROOT / "docs" / "performance.svg"
PAGES = {"en": ROOT / "docs" / "performance.md", "zh": ROOT / "docs" / "performance.zh-CN.md"}


@dataclass(frozen=True)
class Environment:
    """What pip installs for a system. pinned: by fitune's own constraints, so that both use the same torch and
    transformers; alone: without what they ask for. torch comes first, so that nothing else picks a build of it."""

    requirements: tuple[str, ...]
    pinned: bool = True
    alone: tuple[str, ...] = ()
    torch: str = "torch==2.13.0"


# LLaMA-Factory asks for older releases than TRL does; and for torchvision, torchaudio, gradio and modelscope, which a
# training of text never calls, and of which the first two come for CUDA alone.
ENVIRONMENTS = {
    "fitune": Environment(("--editable", str(ROOT))),
    "transformers": Environment(("transformers", "peft", "accelerate", "bitsandbytes")),
    "trl": Environment(("trl==1.16.0", "datasets==5.2.0", "transformers", "peft", "accelerate")),
    "llamafactory": Environment(
        (
            "transformers==5.6.0", "peft==0.18.1", "accelerate==1.11.0", "datasets==4.0.0", "trl==0.24.0", "omegaconf",
            "pandas", "pydantic", "scipy", "sentencepiece", "tiktoken", "protobuf", "einops", "psutil",
        ),
        pinned=False,
        alone=("llamafactory==0.9.5",),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class System:
    """One row of the table. driver: `systems/train_<driver>.py`, which also names its environment. about: how it is
    set, for people. reference: the system whose losses it must have."""

    name: str
    driver: str
    about: str
    options: dict[str, Any] = field(default_factory=dict)
    reference: str = "transformers"


FITUNE = "fitune"
TABLE = {
    one.name: one
    for one in (
        System(FITUNE, "fitune", "its defaults"),
        System("trl", "trl", "its defaults: padded, activation checkpointing"),
        System("trl-packed", "trl", "padding_free, which is what packing computes, on the rows of a step",
               {"padding_free": True}),
        System("trl-best", "trl", "padding_free, no checkpointing",
               {"padding_free": True, "gradient_checkpointing": False}),
        System("llamafactory", "llamafactory", "its defaults: padded, activation checkpointing"),
        System("llamafactory-best", "llamafactory", "no checkpointing", {"disable_gradient_checkpointing": True}),
        System("transformers", "transformers", "with PEFT, in a loop of one's own: padded"),
        System("transformers-sorted", "transformers", "the rows of a step by length, two at a time", {"micro": 2}),
        System("transformers-nf4", "transformers", "bitsandbytes' NF4", {"quant": "nf4"}, "transformers-nf4"),
        System("fitune-nf4", "fitune", "quant nf4", {"quant": "nf4"}, "transformers-nf4"),
        System("transformers-int8", "transformers", "bitsandbytes' LLM.int8()", {"quant": "int8"}, "transformers-int8"),
        System("fitune-int8", "fitune", "quant int8", {"quant": "int8"}, "transformers-int8"),
    )
}  # fmt: skip
QUANTIZED = ("transformers-nf4", "fitune-nf4", "transformers-int8", "fitune-int8")
DEFAULT = [name for name in TABLE if name not in QUANTIZED]
QUICK = [name for name in DEFAULT if name not in ("trl-packed", "llamafactory")]


@dataclass(frozen=True)
class Setting:
    """What all systems share in a comparison."""

    shape: str
    precision: str
    steps: int
    warm: int
    batch: int = 8
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    peak: float = 2e-3
    max_grad_norm: float = 1.0
    seed: int = 7
    device: str = "cpu"


class Bench:
    """The machine's side of it: environments, folders, processes.

    Args:
        work: the folder for all of it.
        interpreters: Python of an environment that is there already, by its name.
        threads: of each process.
    """

    def __init__(self, work: Path, interpreters: dict[str, Path], threads: int) -> None:
        self.work, self.interpreters, self.threads = work.resolve(), interpreters, threads

    def python(self, name: str) -> Path:
        """The interpreter of an environment, which is made where it is not there."""
        if name not in self.interpreters:
            self.interpreters[name] = install(name, self.work / "venvs" / name)
        return self.interpreters[name]

    def run(self, driver: str, environment: str, settings: dict[str, Any], name: str) -> dict[str, Any]:
        """What a driver of `systems/` wrote.

        Raises:
            Failed: it ended with an error.
        """
        folder = self.work / "runs" / name
        folder.mkdir(parents=True, exist_ok=True)
        given, result = folder / "settings.json", folder / "result.json"
        result.unlink(missing_ok=True)
        whole = {"work": str(folder), **settings, "result": str(result), "began": time.time()}
        given.write_text(json.dumps(whole, indent=1), encoding="utf-8")
        command = [str(self.python(environment)), str(SYSTEMS / f"{driver}.py"), str(given)]
        with (folder / "log.txt").open("w", encoding="utf-8") as log:
            done = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, env=self._variables(environment), check=False
            )
        if done.returncode:
            lines = (folder / "log.txt").read_text(encoding="utf-8").strip().splitlines() or ["no output"]
            raise Failed(f"exit code {done.returncode}: {lines[-1][:300]}")
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
        return found

    def _variables(self, environment: str) -> dict[str, str]:
        found = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        found |= {"OMP_NUM_THREADS": str(self.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        return {**found, "PYTHONPATH": str(ROOT / "src")} if environment == "fitune" else found


class Failed(Exception):
    """A process ended with an error."""


def install(name: str, folder: Path) -> Path:
    """An environment with a system in it; nothing is done where it is there already, as it is asked for here."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    wanted, mark = ENVIRONMENTS[name], folder / "installed.json"
    asked = json.dumps(asdict(wanted)) + (PINNED.read_text(encoding="utf-8") if wanted.pinned else "")
    if mark.exists() and mark.read_text(encoding="utf-8") == asked:
        return python
    print(f"installing {name} into {folder}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    pinned = ["--constraint", str(PINNED)] if wanted.pinned else []
    subprocess.run([*pip, wanted.torch], check=True)
    subprocess.run([*pip, *pinned, *wanted.requirements], check=True)
    if wanted.alone:
        subprocess.run([*pip, "--no-deps", *wanted.alone], check=True)
    mark.write_text(asked, encoding="utf-8")
    return python


def compare(
    bench: Bench, setting: Setting, systems: list[System], args: argparse.Namespace, where: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """All systems in one setting; after each round what is known by then, so that a run that is ended keeps the rounds
    before.

    Args:
        bench: where they run.
        setting: what they share.
        systems: rows of the table.
        args: `rounds`, how often each one trains; `count`, operations too, in a process more for each; `tokenizer` and
            `data`.
        where: commit, date, machine.
    """
    name = f"{setting.shape}-{setting.precision}"
    folder = bench.work / "inputs" / name
    shared: dict[str, Any] = {
        **asdict(setting), "tokenizer": str(args.tokenizer.resolve()), "raw": str(args.data.resolve()),
        "options": {}, "count": False, "model": str(folder / "model"), "adapter": str(folder / "adapter"),
        "data": str(folder / "rows.jsonl"), "rows": str(folder / "rows.json"), "cache": str(bench.work / "cache"),
        "work": str(folder),
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    bench.run("prepare", "fitune", shared, f"{name}-prepare")
    del shared["work"]
    rows = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    shared["lr"] = rows["lr"]
    found = results.new(asdict(setting), where, rows, {one.name: asdict(one) for one in systems})
    for number in range(args.rounds + args.count):
        counting = number == args.rounds
        for one in systems:
            settings = {**shared, "options": one.options, "count": counting}
            try:
                made = bench.run(f"train_{one.driver}", one.driver, settings, f"{name}-{one.name}")
            except Failed as error:
                print(f"{name} {one.name}: {error}", flush=True)
                if not counting:  # what was timed before stays as it is
                    results.failed(found, one.name, str(error))
                continue
            results.add(found, one.name, made, counting=counting)
            which = "counting" if counting else f"round {number + 1}"
            print(f"{name} {which} {results.line(one.name, made)}", flush=True)
        if not counting:
            found["rates"].append(bench.run("rate", "fitune", {"device": setting.device}, f"{name}-rate"))
        results.judge(found)
        yield found


def commit() -> str:
    """Of this checkout; with a plus where it was changed."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "src") else "")


def parsed() -> argparse.Namespace:
    """The arguments; `--quick` is a short form of some."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the 46.6M shape in fp32, 2 rounds of 3 steps")
    parser.add_argument("--shapes", nargs="+", default=["46.6M"], choices=["46.6M", "0.5B", "tiny"])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"],
                        help="bf16 is left out where the processor has no instructions for it")  # fmt: skip
    parser.add_argument("--systems", nargs="+", default=DEFAULT, choices=list(TABLE))
    parser.add_argument("--quantized", action="store_true", help="also NF4 and int8, with plain transformers beside")
    parser.add_argument("--reference", default="transformers", choices=list(TABLE), help="whose losses are right")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="measured steps")
    parser.add_argument("--warm", type=int, default=2, help="steps before them")
    parser.add_argument("--batch", type=int, default=8, help="rows of a step")
    parser.add_argument("--no-count", dest="count", action="store_false", help="do not count operations")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=processors.cores())
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("FITUNE_SHARED", ROOT.parent / "shared")))
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--interpreter", nargs="+", default=[], metavar="NAME=PATH", help="an environment of yours")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--add", action="store_true", help="keep what else the file of --out has")
    parser.add_argument("--show", type=Path, help="print the tables of a file, and do nothing else")
    parser.add_argument("--pages", action="store_true", help="write the documentation's tables and picture anew")
    args = parser.parse_args()
    if args.quick:
        args.systems = QUICK if args.systems == DEFAULT else args.systems
        args.shapes, args.precisions, args.rounds, args.steps, args.warm = ["46.6M"], ["fp32"], 2, 2, 1
    args.systems = list(dict.fromkeys([*args.systems, *(QUANTIZED if args.quantized else ())]))
    args.tokenizer = args.tokenizer or args.shared / "tokenizers" / "qwen2"
    args.data = args.data or args.shared / "data" / "alpaca_zh_demo.json"
    return args


def no_bf16(rate: Mapping[str, Any]) -> str | None:
    """Why nothing is measured in bf16; None: it is.

    Args:
        rate: of square products in fp32 and bf16, as systems/rate.py measures them.
    """
    if rate["bf16"] is None:
        return "this processor has no instructions for it"
    return None if rate["bf16"] > rate["fp32"] else "a product is not faster in it here"


def main() -> int:
    """See the module's text."""
    args = parsed()
    if args.show or args.pages:
        record = read(args.show or RESULTS)
        print("\n".join(results.lines(record)))
        if args.pages:
            write_pages(record)
        return 0
    for path in (args.tokenizer, args.data):
        if not path.exists():
            sys.exit(f"{path}: not there; fix: --tokenizer FOLDER --data ROWS.json, or --shared FOLDER with both")
    given = dict(pair.split("=", 1) for pair in args.interpreter)
    bench = Bench(args.work, {name: Path(path) for name, path in given.items()}, args.threads)
    systems = [
        TABLE[name] if name in QUANTIZED else replace(TABLE[name], reference=args.reference) for name in args.systems
    ]
    for one in systems:
        bench.python(one.driver)
    kept = read(args.out)["runs"] if args.add and args.out and args.out.exists() else []
    made: list[dict[str, Any]] = []
    if "bf16" in args.precisions:
        why = no_bf16(bench.run("rate", "fitune", {"device": args.device}, "rate"))
        if why:
            args.precisions.remove("bf16")
            print(f"no bf16: {why}", flush=True)
    for shape in args.shapes:
        for precision in args.precisions:
            setting = Setting(shape, precision, args.warm + args.steps, args.warm, args.batch, device=args.device)
            for so_far in compare(bench, setting, systems, args, where(args)):
                names = {results.title(run) for run in (*made, so_far)}
                record = {"runs": [*(run for run in kept if results.title(run) not in names), *made, so_far]}
                if args.out:
                    write_json(args.out, record)
            made.append(so_far)
    print("\n".join(results.lines({"runs": made})))
    return int(any(not run["systems"].get(FITUNE, {"counted": True})["counted"] for run in made))


def where(args: argparse.Namespace) -> dict[str, Any]:
    """What a comparison was made by, and on what."""
    return {
        "command": asked(args),
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "threads": args.threads,
        "processor": processor(),
        "data": args.data.name,
    }


def asked(args: argparse.Namespace) -> str:
    """The command that makes the same again on any machine: no paths of this one."""
    named = ("rounds", "steps", "warm", "batch", "device", "threads", "reference")
    numbers = [f"--{name} {getattr(args, name)}" for name in named]
    lists = [f"--{name} {' '.join(getattr(args, name))}" for name in ("shapes", "precisions", "systems")]
    return " ".join(["python benchmarks/against.py", *lists, *numbers])


def read(path: Path) -> dict[str, Any]:
    """A file of results."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def write_pages(record: dict[str, Any]) -> None:
    """The tables of both pages, and the picture that they show."""
    for language, path in PAGES.items():
        path.write_text(results.page(path.read_text(encoding="utf-8"), record, language), encoding="utf-8")
    PICTURE.write_text(results.picture(record), encoding="utf-8")


def processor() -> str:
    """Its name, where the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


if __name__ == "__main__":
    sys.exit(main())
