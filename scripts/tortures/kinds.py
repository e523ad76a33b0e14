"""The runs that are tortured: small ones of every kind of method, each with its unbroken outcome."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from support import tiny
from tortures.children import Ran, Trouble, fitune, names, outcome, together

COMMON = [
    "--max-steps", 6, "--batch-size", 2, "--save-every", 2, "--eval-every", 3, "--sample-prompts", 1,
    "--sample-tokens", 4, "--precision", "fp32", "--max-length", 48,
]  # fmt: skip
LORA = ["--lora.rank", 4]
# What is tuned and how: the flags, beside the model's kind.
KINDS: dict[str, tuple[str, list[object]]] = {
    "lora": ("llama", [*LORA, "--lora.dropout", 0.2]),
    "full": ("llama", ["--method", "full"]),
    "freeze": ("llama", ["--method", "freeze"]),
    "tail": ("llama", ["--method", "tail"]),
    "bitfit": ("gpt2", ["--method", "bitfit"]),
    "prompt": ("llama", ["--method", "prompt", "--prompt.tokens", 4]),
    "p-tuning": ("llama", ["--method", "p-tuning", "--p-tuning.tokens", 4]),
    "prefix": ("llama", ["--method", "prefix", "--prefix.tokens", 4]),
    "adapter": ("llama", ["--method", "adapter", "--bottleneck.width", 8]),
    "ia3": ("llama", ["--method", "ia3"]),
    "pissa": ("llama", [*LORA, "--lora.init", "pissa"]),
    "new-tokens": ("qwen2", [*LORA, "--new-tokens", "<zz>"]),
    "accumulation": ("llama", [*LORA, "--accumulation", 2, "--lora.dropout", 0.1]),
    "nf4": ("llama", [*LORA, "--quant", "nf4"]),
    "int8": ("llama", [*LORA, "--quant", "int8"]),
    "bf16": ("llama", [*LORA, "--precision", "bf16"]),
    "fp16": ("llama", [*LORA, "--precision", "fp16"]),
    "8bit": ("llama", [*LORA, "--optimizer", "adamw-8bit"]),
    "in-backward": ("llama", ["--method", "full", "--optimizer-in-backward", "--max-grad-norm", 0]),
    "chatglm": ("chatglm", [*LORA]),
    "best": ("llama", [*LORA, "--final", "best", "--lr", 0.05]),
}  # fmt: skip
MAIN = ("lora", "full", "prefix", "nf4", "best")  # where only a few are tried


@dataclass
class Bench:
    """What all cases share: models, data, and the unbroken run of each kind.

    Args:
        root: a folder for everything.
    """

    root: Path

    def model(self, kind: str) -> Path:
        """A model folder."""
        folder = self.root / "models" / kind
        if not folder.exists():
            folder.parent.mkdir(exist_ok=True)
            tiny.save(kind, folder)
        return folder

    @property
    def data(self) -> Path:
        """The rows."""
        file = self.root / "rows.jsonl"
        return file if file.exists() else tiny.write_rows(file, 24)

    def words(self, kind: str, output: Path) -> list[object]:
        """The command of a run."""
        model, flags = KINDS[kind]
        common = dict(zip(COMMON[::2], COMMON[1::2], strict=True))
        common |= {"--model": self.model(model), "--data": self.data, "--output": output}
        own = {flag for flag in flags if isinstance(flag, str) and flag.startswith("--")}
        return ["train", *(x for flag, value in common.items() if flag not in own for x in (flag, value)), *flags]

    def prepare(self, kinds: list[str], workers: int) -> None:
        """Models, data and unbroken runs, before anything is forked for a case."""
        together([lambda: self.data, *(partial(self.model, m) for m in sorted({KINDS[kind][0] for kind in kinds}))], 1)
        self.unbroken(kinds[0])  # it measures the machine, for all
        together([partial(self.unbroken, kind) for kind in kinds[1:]], workers)

    def unbroken(self, kind: str) -> dict[str, Any]:
        """Of the unbroken run: outcome, names of its files, its events, its seconds."""
        file = self.root / "unbroken" / f"{kind}.json"
        if file.exists():
            return dict(json.loads(file.read_text(encoding="utf-8")))
        run, events = self.root / "unbroken" / kind, self.root / "unbroken" / f"{kind}.events"
        run.parent.mkdir(exist_ok=True)
        done = fitune(*self.words(kind, run), place=run.parent / f"{kind}.said", trouble=Trouble(run, record=events))
        if done.code:
            raise RuntimeError(f"the unbroken run of {kind} failed: {done.last()}")
        record = {
            "outcome": outcome(run), "names": sorted(names(run)), "cpu": done.cpu,
            "events": events.read_text(encoding="utf-8").splitlines(),
        }  # fmt: skip
        file.write_text(json.dumps(record), encoding="utf-8")
        return record

    def finished(self, kind: str) -> Path:
        """The folder of the unbroken run."""
        self.unbroken(kind)
        return self.root / "unbroken" / kind


@dataclass(frozen=True)
class Verdict:
    """What became of a case. result: refused, equal, SILENT, TRACEBACK, DEAD END, or SLOW."""

    result: str
    says: str = ""


BAD = ("SILENT", "TRACEBACK", "DEAD END", "SLOW")


def go_on(bench: Bench, kind: str, run: Path, place: Path) -> tuple[Ran, str]:
    """As a user would after a broken run: resume it, or the same command again. How it ended, and by which."""
    resumed = fitune("train", "--resume", "--output", run, place=place)
    if resumed.code == 0 or resumed.traceback:
        return resumed, "resume"
    again = fitune(*bench.words(kind, run), place=place)
    if again.code:
        return Ran(again.code, again.out, f"{resumed.last()} || {again.err}"), "neither"
    return again, "again"


def judged(bench: Bench, kind: str, run: Path, ended: Ran) -> Verdict:
    """Is a run that was broken and went on the unbroken one?"""
    if ended.code:
        return Verdict("TRACEBACK" if ended.traceback else "DEAD END", ended.last())
    wanted = bench.unbroken(kind)
    found = outcome(run)
    differing = sorted(n for n in {*found, *wanted["outcome"]} if found.get(n) != wanted["outcome"].get(n))
    if differing:
        return Verdict("SILENT", f"ended otherwise than the unbroken run: {', '.join(differing)}")
    if lacking := sorted(set(wanted["names"]) - names(run)):
        return Verdict("SILENT", f"ended without {', '.join(lacking[:5])}")
    return Verdict("equal")


def copy(source: Path, target: Path) -> Path:
    """A copy of a run folder."""
    shutil.copytree(source, target, symlinks=True)
    return target


def drawn(seed: int, kind: str, number: int) -> random.Random:
    """The random numbers of a case: they follow from the seed and its name alone."""
    return random.Random(f"{seed}/{kind}/{number}")  # no secret
