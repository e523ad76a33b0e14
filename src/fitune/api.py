"""fitune from Python: the same verbs and the same settings as on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fitune.config import build
from fitune.console import Watcher
from fitune.converting import Converted, convert
from fitune.errors import ConfigError
from fitune.evaluation import Evaluation, evaluate
from fitune.exporting import Exported, export
from fitune.generation import Sampling, answer
from fitune.hub import Downloaded, download
from fitune.loading import load as _load
from fitune.memory.plan import Plan
from fitune.merging import Merged, merge
from fitune.model import Tuned, load_model
from fitune.planning import plan
from fitune.quantizing import QuantizedModel, quantize
from fitune.records import Message
from fitune.training import Result, resume_config
from fitune.training import train as _train

__all__ = [
    "Converted",
    "Downloaded",
    "Evaluation",
    "Exported",
    "Merged",
    "Plan",
    "QuantizedModel",
    "Result",
    "Tuned",
    "convert",
    "download",
    "evaluate",
    "export",
    "generate",
    "load",
    "load_model",
    "merge",
    "plan",
    "quantize",
    "train",
]


def train(*, resume: bool = False, watch: Watcher | None = None, **settings: Any) -> Result:
    """Fine-tune a model.

    Args:
        resume: go on with the run in `output`.
        watch: is told what happens; None is silent.
        settings: the fields of RunConfig: model, data, method, output, ...

    Returns:
        Losses, parameters, speed, memory, and where the run folder is.

    Raises:
        FituneError: what is wrong, and how to mend it.

    Example:
        >>> fitune.train(model="models/llama", data=["rows.jsonl"], method="lora", output="runs/first")
    """
    if isinstance(settings.get("data"), (str, Path)):
        settings["data"] = [str(settings["data"])]
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}
    if resume:
        if "output" not in settings:
            raise ConfigError("resume: which run?", expected="output, the run folder")
        return _train(resume_config(settings["output"], settings), resume=True, watch=watch)
    return _train(build(settings), watch=watch)


def load(
    run_or_model: str | Path,
    *,
    model: str | Path | None = None,
    device: str = "auto",
    template: str = "auto",
    precision: str | None = None,
    quant: str | None = None,
) -> Tuned:
    """A run, or a model folder, to talk to. See fitune.generate.

    Args:
        run_or_model: a run folder, a model folder or a hub id.
        model: where the base of a run lies now, if it was moved; its weights must be the same.
        device: auto, cpu, cuda, ...
        template: for a model folder; a run brings its own.
        precision: fp32, bf16, fp16 or auto. Default: the run's own; of a model folder fp32.
        quant: none, int8, nf4 or fp4. Default: as in the run; of a model folder none.
    """
    return _load(run_or_model, model=model, device=device, template=template, precision=precision, quant=quant)


def generate(
    tuned: Tuned | str | Path,
    prompt: str | Sequence[dict[str, str]],
    *,
    model: str | Path | None = None,
    system: str = "",
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    base: bool = False,
) -> str:
    """The model's answer.

    Args:
        tuned: what `load` gave, or a path for it.
        prompt: a question, or messages `[{"role": "user", "content": ...}, ...]`.
        model: where the base of a run lies now, if it was moved; for a path.
        system: a system message.
        max_new_tokens: longest answer, in tokens.
        temperature: 0 is greedy.
        top_p: draw from the smallest set of tokens with this much probability.
        seed: makes drawing repeatable.
        base: answer as the base model, without what was tuned.

    Example:
        >>> fitune.generate("runs/first", "What is the capital?")
    """
    tuned = tuned if isinstance(tuned, Tuned) else _load(tuned, model=model)
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    messages = [Message(turn["role"], turn["content"]) for turn in turns]  # type: ignore[arg-type]
    if system:
        messages = [Message("system", system), *messages]
    return answer(tuned, messages, Sampling(temperature, top_p, max_new_tokens, seed), base=base)
