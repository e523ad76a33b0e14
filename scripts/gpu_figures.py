"""Sections of `scripts/gpu_checks.py` with figures: tokens a second, and memory beside what was predicted.

Every figure of memory is printed beside the plan that was made before the GPU was touched.
"""

from __future__ import annotations

import cProfile
import json
import pstats
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpu_checks import ROOT, Here, Run, fitune, section, timed

CASES = ROOT / ".gpu" / "cases.json"  # of scripts/gpu_prepare.py
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "4090": 165.0, "L40S": 362.0}  # 16 bits, dense, data sheets
OF_CARD = ((60, "llama-3.1-8b"), (22, "llama-3.2-3b"), (0, "llama-3.2-1b"))  # GiB from which a model's steps fit
TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
TRUE, RUN_TRUE = 0.025, 0.10  # how far tensors may be off a plan, and what a whole process takes


# ---- throughput ----


@section
def throughput(here: Here) -> None:
    """Tokens a second of LoRA on all linear layers of a random model, rank 16, bf16: many documents without fitune's
    kernels and with them, one document, a longer batch, and on nf4; the operations that took longest."""
    from fitune.models.kernels import fused

    shapes = [("34 documents, 4,096 tokens", 34, 4096), ("1 document, 4,096 tokens", 1, 4096), ("68, 8,192", 68, 8192)]
    for quant in ("none", "nf4"):
        bench = Bench(here, quant)
        with fused.eager():
            bench.measure(f"{bench.of}: {shapes[0][0]}, torch's kernels", *shapes[0][1:])
        for name, documents, tokens in shapes if quant == "none" else shapes[:1]:
            bench.measure(f"{bench.of}: {name}", documents, tokens)
        bench.profile(f"{bench.of}: longest operations")
        del bench
        forget()


class Bench:
    """A random model with LoRA on it, and steps of made-up batches."""

    def __init__(self, here: Here, quant: str) -> None:
        import memory_gpu
        from fitune.core import catalog
        from fitune.core.config import build
        from fitune.engine import optim
        from fitune.models.configs import config_of
        from fitune.models.devices import pick_device
        from fitune.models.parts import trainable

        self.here, self.device, self.strict = here, pick_device(here.device), True
        name = model_for(self.device)
        self.of = f"{'tiny' if here.dry else name} {quant}"
        self.shape = config_of(catalog.find(name).config)
        if here.dry:
            self.shape.update(TINY)
        lora = {"rank": 16, "targets": "all-linear"}
        self.config = build({"model": "-", "data": ["-"], "precision": "bf16", "lora": lora, "quant": quant})
        self.model = memory_gpu.build_model(self.config, self.shape, self.device)
        self.model.train()
        self.trained = trainable(self.model)
        self.optimizer = optim.make(self.trained, self.config)

    def step(self, documents: int, tokens: int) -> Any:
        """One optimizer step; where an operation has no deterministic algorithm, that is a failed check, said once."""
        from fitune.engine.step import training_step
        from fitune.memory.steps import made_up
        from fitune.models import determinism

        tokens = tokens // 32 if self.here.dry else tokens
        batch = made_up(min(documents, tokens), max(2, tokens // documents), self.shape.vocab_size)
        with determinism.exact(self.device):
            determinism.strict(self.strict)
            try:
                return training_step(self.model, [batch], self.optimizer, 1.0)
            except RuntimeError as error:
                lacking = determinism.lacking(error)
                if not self.strict or lacking is None:
                    raise
            self.strict = False
            self.here.say(f"{self.of}: deterministic", False, lacking=lacking)
            self.optimizer.zero_grad(set_to_none=True)
            determinism.strict(False)
            return training_step(self.model, [batch], self.optimizer, 1.0)

    def measure(self, name: str, documents: int, tokens: int) -> None:
        """Say the tokens a second of a batch; that it does not fit is a failed check."""
        times, warm = (2, 1) if self.here.dry else (10, 3)
        try:
            seconds = timed(lambda: self.step(documents, tokens), self.device, times=times, warm=warm)
            done = self.step(documents, tokens)
        except RuntimeError as error:
            self.here.say(name, False, why=" ".join(str(error).split())[:200], **peak(self.device))
            return
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        rate = done.tokens / seconds
        figures = {"tokens_per_second": round(rate), "ms": round(1000 * seconds, 1)}
        if share := self.share_of_peak(rate):
            figures["share_of_peak"] = share
        self.here.say(name, done.finite, **figures, **peak(self.device))

    def share_of_peak(self, rate: float) -> float | None:
        """By 4 operations a parameter and token: forward, and the gradient of the input."""
        from torch import cuda

        card = cuda.get_device_name(self.device) if self.device.type == "cuda" else ""
        most = next((value for part, value in PEAK_TFLOPS.items() if part in card), None)
        if most is None or self.config.quant.name != "none":
            return None
        parameters = sum(p.numel() for p in self.model.parameters() if not p.requires_grad)
        return round(float(4 * parameters * rate / most / 1e12), 3)

    def profile(self, name: str, most: int = 12) -> None:
        """Say which operations of a step took longest, and which were most; and where Python spent the time of one."""
        import torch

        cuda = self.device.type == "cuda"
        kind = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
        with torch.profiler.profile(activities=[kind]) as seen:
            self.step(34, 4096)
            if cuda:
                torch.cuda.synchronize(self.device)
        key = "self_device_time_total" if cuda else "self_cpu_time_total"
        rows = sorted(seen.key_averages(), key=lambda row: -getattr(row, key))
        took = sum(getattr(row, key) for row in rows) / 1000
        longest = [f"{row.key[:50]} {getattr(row, key) / 1000:.1f} ms x {row.count}" for row in rows[:most]]
        often = [f"{row.key[:90]} x {row.count}" for row in sorted(rows, key=lambda row: -row.count)[: 2 * most]]
        launches = sum(row.count for row in rows)
        self.here.say(name, took > 0, ms=round(took, 1), launches=launches, longest=longest, often=often)
        with cProfile.Profile() as python:
            self.step(34, 4096)
        calls = sorted(pstats.Stats(python).get_stats_profile().func_profiles.items(), key=lambda one: -one[1].tottime)
        spent = [f"{of.file_name[-30:]} {called} {of.tottime:.3f} s x {of.ncalls}" for called, of in calls[: 3 * most]]
        self.here.say(f"{name}: Python", bool(spent), longest=spent)


def model_for(device: Any) -> str:
    """The largest of three models whose steps fit onto a card."""
    import torch

    total = torch.cuda.mem_get_info(device)[1] / 2**30 if device.type == "cuda" else 0
    return next(name for least, name in OF_CARD if total >= least)


def peak(device: Any) -> dict[str, Any]:
    """The most bytes allocated so far."""
    import torch

    return {"allocated_mib": torch.cuda.max_memory_allocated(device) >> 20} if device.type == "cuda" else {}


def forget() -> None:
    """Give back what is not needed any more."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# ---- whole runs ----


@section
def runs(here: Here) -> None:
    """Whole runs of `fitune train` on a random model: what the process took, by the driver, beside what was said
    before."""
    folder = random_model(here)
    cases = (("lora", ()), ("nf4, checkpointing", ("--quant", "nf4", "--checkpointing")))
    for name, flags in cases[-1:] if here.together else cases:
        found = fitune(here, *long_run(here, folder, name, flags).args)
        off = found["peak_memory_mib"] / found["expected_memory_mib"] - 1
        figures = {key: round(found[key], 1) for key in ("peak_memory_mib", "expected_memory_mib")}
        rate = {"tokens_per_second": round(found["real_tokens_per_second"])}
        here.say(f"{name}: peak beside plan", here.dry or abs(off) <= RUN_TRUE, off=f"{off:+.1%}", **figures, **rate)


def random_model(here: Here) -> Path:
    """A random Llama of 0.4 billion parameters, made on the device, with the bundled tokenizer and longer rows."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from fitune.commands import demo

    bundled, folder = demo.bundled(), here.work / "model"
    tokenizer = AutoTokenizer.from_pretrained(str(bundled / "model"), trust_remote_code=False)
    large = {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 16, "num_attention_heads": 12,
             "num_key_value_heads": 4, "head_dim": 128, "vocab_size": len(tokenizer)}  # fmt: skip
    sizes = {**TINY, "vocab_size": len(tokenizer)} if here.dry else large
    config = LlamaConfig(**sizes, max_position_embeddings=4096, eos_token_id=tokenizer.eos_token_id, dtype="bfloat16")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(here.device):
            LlamaForCausalLM(config).save_pretrained(str(folder))
    finally:
        torch.set_default_dtype(before)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        if (bundled / "model" / name).exists():
            shutil.copy(bundled / "model" / name, folder)
    rows = [json.loads(text) for text in (bundled / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for at in range(8 if here.dry else 512):
            turns = [turn for n in range(1 + at % 5) for turn in rows[(at + n) % len(rows)]["messages"]
                     if turn["role"] != "system"]  # fmt: skip
            file.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
    forget()
    return folder


def long_run(here: Here, folder: Path, name: str, flags: tuple[object, ...]) -> Run:
    """A run on that model."""
    size = (2, 2, 256) if here.dry else (10, 32, 1024)
    steps, batch, length = size
    output = here.work / f"run-{name.replace(', ', '-')}"
    given = ("--model", folder, "--data", folder / "rows.jsonl", "--device", here.device, "--precision", "bf16")
    shape = ("--max-steps", steps, "--batch-size", batch, "--max-length", length, "--max-lost", 1)
    less = ("--val-share", 0, "--sample-prompts", 0, "--lora.targets", "all-linear")
    return Run(output, ("train", *given, *shape, *less, *flags, "--output", output))


# ---- memory ----


@section
def memory(here: Here) -> None:
    """Configurations that were chosen beforehand: allocated and reserved bytes beside the plan's."""
    if here.dry:
        run = long_run(here, random_model(here), "plan", ())
        found = fitune(here, "plan", run.args[2], "--data", run.args[4], "--verify", "--device", "cpu", "--max-lost", 1)
        here.say("plan --verify", True, **{k: v for k, v in found.items() if isinstance(v, int | float)})
    measure(here, capped=False)


@section
def capped(here: Here) -> None:
    """On a card made smaller: what was said to fit goes through, and what was not, does not."""
    measure(here, capped=True)


def measure(here: Here, *, capped: bool) -> None:
    """Each configuration in a process of its own: plans side by side, one at a time on the GPU."""
    import memory_gpu

    if here.dry:
        pretended(here, capped=capped)
        return
    found, why = memory_gpu.ask({"do": "probe"})
    if found is None:
        here.say("the GPU can be used", False, why=why)
        return
    card = memory_gpu.Card(**found)
    if not CASES.exists():
        here.say("configurations", False, why=f"{CASES} is not there: run scripts/gpu_prepare.py, and carry it")
        return
    chosen = chosen_for(json.loads(CASES.read_text(encoding="utf-8")), card.total)
    cases = [memory_gpu.Case(**values) for values in chosen["capped" if capped else "plain"]]
    ends = time.monotonic() + here.seconds - 15

    def on_row(row: Mapping[str, Any]) -> None:
        passed, figures = judged(row)
        here.say(row["name"], passed, **figures)

    runs = memory_gpu.Runs(card, on_row, ends)
    runs.workers = len(cases)
    runs.all(cases, [])


def chosen_for(sizes: Mapping[str, Any], total: int) -> Mapping[str, Any]:
    """Of the configurations by size of card in GB: those of the largest that is not larger, or of the smallest.

    Args:
        sizes: what scripts/gpu_prepare.py wrote.
        total: bytes of the card, of which the driver keeps some.
    """
    fitting = [size for size in sizes if int(size) * 0.9e9 <= total]
    found: Mapping[str, Any] = sizes[max(fitting, key=int) if fitting else min(sizes, key=int)]
    return found


def judged(row: Mapping[str, Any]) -> tuple[bool, dict[str, Any]]:
    """Of what was measured: did it go as was said, and the figures. Allocated bytes within 2.5 % where it ran without a
    cap; what was said to fit must not die, and what was said not to fit may run: plans are on the safe side."""
    predicted = row.get("predicted")
    if predicted is None or "measured" not in row:
        return False, {"why": row.get("left_out") or row.get("failed") or "no answer"}
    figures: dict[str, Any] = {"said_to_fit": predicted["fits"], "seconds": row["measured"]["seconds"]}
    cap = row["case"]["cap"]
    if cap is not None:
        figures["plan_of_limit"] = round(predicted["needed"] / cap, 3)
    if row["died"]:
        return not predicted["fits"], {"died": row["died"], **figures}
    off = {name: row["measured"][f"max_{name}"] / predicted[name] - 1 for name in ("allocated", "reserved")}
    figures |= {f"{name}_off": f"{value:+.2%}" for name, value in off.items()}
    return cap is not None or abs(off["allocated"]) <= TRUE, figures


def pretended(here: Here, *, capped: bool) -> None:
    """A dry run: a real plan of a card that is not there, for which a stand-in says that it took what was planned."""
    import memory_gpu
    from fitune.memory import plan

    card = memory_gpu.Card("NVIDIA H100 80GB HBM3", "none", 80 * memory_gpu.GIB, 79 * memory_gpu.GIB, "bf16")
    case = memory_gpu.Case("llama-3.2-1b", "lora", False, 1, 64, 2 * memory_gpu.GIB if capped else None)

    def took(work: plan.Work, card: Any, limit: int | None) -> tuple[dict[str, Any], str | None]:
        made = plan.plan(work, card.device(case.cap), name=case.model)
        died = None if limit is None or (made.reserved or 0) <= limit else "out of memory"
        return {"max_allocated": made.allocated, "max_reserved": made.reserved, "outside": 0, "seconds": 0.0}, died

    rows: list[dict[str, Any]] = []
    memory_gpu.run_one(case, card, rows.append, wait=False, measure=took)
    passed, figures = judged(rows[-1])
    here.say(case.name, passed, **figures)
    assert asdict(case) == rows[-1]["case"]
