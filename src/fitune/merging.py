"""A run to a plain model: what was tuned becomes part of the base's weights.

In: a run. Out: a model folder that transformers loads without fitune or PEFT. The logits are compared with the tuned
model's, before the weights are rounded to 16 bits and after, on the model that was written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from fitune import methods, preflight
from fitune.checkpoint import RunFolder
from fitune.config import RunConfig
from fitune.encode import Encoder
from fitune.errors import RunFolderError
from fitune.families import Family
from fitune.files import TEMPORARY, disk, sync
from fitune.loading import TEMPLATE, load
from fitune.methods import new_tokens
from fitune.model import causal_lm
from fitune.records import Finding, Message

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PROBE = ("Hello, world!", "你好，世界", "1 + 1 = 2")


@dataclass(frozen=True)
class Merged:
    """What was written. Errors are relative to the largest logit of the tuned model."""

    folder: str
    dtype: str
    merge_error: float  # in float32
    rounding_error: float  # of the folder as it was written

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def merge(run: str | Path, output: str | Path, *, dtype: str = "auto", force: bool = False) -> Merged:
    """Write a run's model as a plain one.

    Args:
        run: a finished run.
        output: a folder that is not there yet, or is empty.
        dtype: of its weights: auto (as the base's are stored), fp32, bf16 or fp16.
        force: write it though its logits have drifted from the tuned model's.

    Raises:
        RunFolderError: the run is not finished, its method cannot be merged, or the folder is not empty.
    """
    target = Path(output)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RunFolderError(f"{target}: is not empty; nothing of yours is overwritten", fix="choose another --output")
    folder = RunFolder(run)
    config = folder.read_config()
    if dtype not in ("auto", *DTYPES):
        raise RunFolderError("--dtype", received=dtype, expected=f"auto, {', '.join(DTYPES)}")
    tuned = load(run, device="cpu", precision="fp32")
    chosen = _stored_dtype(Path(config.model)) if dtype == "auto" else dtype
    probe = _probe(tuned.encoder)
    with torch.no_grad():
        before = tuned.model(input_ids=probe).logits[:, -probe.shape[1] :]
        plain = merged(tuned.model, tuned.family, config)
        error = _relative(plain(input_ids=probe).logits, before)

    def drift(folder: Path) -> float:
        written = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, trust_remote_code=False)
        with torch.no_grad():
            rounding = _relative(written.eval()(input_ids=probe).logits, before)
        if not force:
            preflight.raise_refused([merge_drift(error, rounding, chosen)])
        return rounding

    rounding = _write(plain.to(DTYPES[chosen]), tuned.tokenizer, folder.read("template"), target, drift)
    return Merged(str(target), chosen, error, rounding)


DRIFT = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.02}  # of the largest logit, as written


def merge_drift(error: float, rounding: float, dtype: str) -> Finding:
    """A merged model gives the tuned model's logits: in float32 nearly exactly, rounded to 16 bits nearly so."""
    text = f"logits are off by {error:.1e} through merging, by {rounding:.1e} as written in {dtype}"
    if error > DRIFT["fp32"] or rounding > DRIFT[dtype]:
        return Finding("merge-drift", "refuse", text, "--dtype fp32; --force writes it all the same")
    return Finding("merge-drift", "ok", text)


def merged(model: Any, family: Family, config: RunConfig) -> Any:
    """The plain model.

    Args:
        model: with its method on it; its base is changed.
        family: its family.
        config: the run's settings.

    Raises:
        RunFolderError: the method cannot be merged; the message says why.
    """
    method = methods.find(config.method)
    problem = method.merge_problem(causal_lm(model), family, config)
    if problem is None and isinstance(model, PeftModel) and not hasattr(model, "merge_and_unload"):
        problem = "PEFT cannot merge it"
    if problem is not None:
        raise RunFolderError(
            f"{method.name} cannot be merged: {problem}",
            fix="use it as it is: fitune chat RUN, or PEFT with the run's adapter folder",
        )
    if isinstance(model, PeftModel):
        model = model.merge_and_unload()
    new_tokens.write_in(model)
    if config.method == "bitfit" and config.bitfit.add:
        for flag in family.bias_flags:
            setattr(model.config, flag, True)
    return model


def _probe(encoder: Encoder) -> Tensor:
    """(1, T): a few words in two languages, framed as the run frames them."""
    ids = [i for text in PROBE for i in encoder.prompt([Message("user", text)])]
    return torch.tensor([ids[:256]])


def _relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def _stored_dtype(folder: Path) -> str:
    """How the base's weights are stored; what has no name here is written in float32."""
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stored = str(values.get("dtype") or values.get("torch_dtype") or "float32")
    names = {"bfloat16": "bf16", "float16": "fp16"}
    return names.get(stored, "fp32")


def _write(model: Any, tokenizer: Any, template: dict[str, Any], target: Path, check: Callable[[Path], float]) -> float:
    """The model's folder, whole and checked, or not at all; what the check measured."""
    temporary = target.with_name(f"{TEMPORARY}{target.name}")
    with disk(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            model.save_pretrained(str(temporary), safe_serialization=True)
            tokenizer.save_pretrained(str(temporary))
            (temporary / TEMPLATE).write_text(json.dumps(template, ensure_ascii=False), encoding="utf-8")
            found = check(temporary)
            for path in temporary.iterdir():
                sync(path)
            if target.exists():
                target.rmdir()
            temporary.replace(target)
            sync(target.parent)
            return found
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
