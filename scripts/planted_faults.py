"""Faults planted in small real runs, and clean runs beside: `python scripts/planted_faults.py`.

Each fault is planted at a seam of fitune, as if a function of its own had been written so; no dependency is patched. A
run with it must be refused before its first step (or while it resumes), or be refused or warned of at its end, by
fitune's own checks; what found it, and when, is a row of results/planted_faults.json. Clean runs, methods x families x
data, must give no warning of these rules. Tiny models, tests/support/tiny.py; one fault and one
clean run take the bundled one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from fitune.commands import demo, reference, resuming
from fitune.commands import merge as merging
from fitune.commands.train import resume_config, train
from fitune.core.config import build
from fitune.core.errors import FituneError, Problems
from fitune.core.events import Watcher
from fitune.core.records import Finding
from fitune.data import batches, pipeline
from fitune.data.encode import Encoder
from fitune.engine import held_out, optim, step
from fitune.engine.checkpoint import RunFolder
from fitune.engine.step_runner import StepRunner
from fitune.models import adapters, load, parts, quant
from support import tiny

SETTINGS: dict[str, Any] = {
    "max_steps": 4, "batch_size": 2, "accumulation": 2, "save_every": 2, "eval_every": 4, "sample_prompts": 0,
    "lr": 1e-2, "cache": "none", "precision": "fp32", "max_grad_norm": 0.05,
}  # fmt: skip
# Right, and not about the run: other processes on the machine, its kernels; random models, which know no language and
# do worse than guessing (the bundled one does not); a tiny ChatGLM with a plain tokenizer; a family found by its names.
GUESSED = {"base-loss", "template-seen"}
ASIDE = {*GUESSED, "machine-load", "byte-fallback", "precision", "quant-kernels", "folder", "family"}
CRASH_AT = 3  # of a run that is resumed; its last checkpoint is of step 2


@dataclass(frozen=True)
class Seam:
    """Where faults are planted; everything is put back afterwards."""

    stack: ExitStack

    def put(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        """An attribute of one module or class, as if it had been written otherwise."""
        self.stack.enter_context(mock.patch.object(owner, name, make(getattr(owner, name))))

    def everywhere(self, function: Callable[..., Any], make: Callable[[Any], Any]) -> None:
        """A function of fitune, wherever it is known by its name."""
        made = make(function)
        for module in [m for n, m in sys.modules.items() if n.startswith("fitune") and isinstance(m, ModuleType)]:
            for name, value in list(vars(module).items()):
                if value is function:
                    self.stack.enter_context(mock.patch.object(module, name, made))


@dataclass(frozen=True)
class Fault:
    """A fault: how it is planted, the rules that may find it, and what run it is planted in.

    Args:
        name: of the row.
        plant: plants it.
        rules: any of these finds it.
        settings: of the run, beside the common ones.
        base: a kind of tests/support/tiny.py, or one of BASES.
        how: "train"; "resume" plants it when a killed run goes on; "merge" when a finished one is merged.
        rows: the run's data, a kind of ROWS; without, the common ones.
    """

    name: str
    plant: Callable[[Seam], None]
    rules: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    base: str = "llama"
    how: str = "train"
    rows: str | None = None


# ---- how data, batches and templates go wrong ----


def _samples(change: Callable[[Encoder, Any], Any]) -> Callable[[Seam], None]:
    """Each sample, as the encoder makes it, changed."""

    def finish(real: Any) -> Any:
        def made(self: Encoder, draft: Any, known: Any) -> Any:
            sample = real(self, draft, known)
            return sample if sample is None else change(self, sample)

        return made

    return lambda seam: seam.put(Encoder, "_finish", finish)


def _mask(sample: Any, places: Any, value: bool) -> Any:
    mask = sample.mask.copy()
    mask[places] = value
    return replace(sample, mask=mask)


def _truncated(encoder: Encoder, sample: Any) -> Any:
    """Half of the answer, and its stop."""
    half = sample.prompt_length + max(1, (len(sample) - sample.prompt_length) // 2)
    keep = np.r_[0 : min(half, len(sample) - 1), len(sample) - 1]
    return replace(sample, ids=sample.ids[keep], mask=sample.mask[keep])


def _padded(encoder: Encoder, sample: Any) -> Any:
    """To a multiple of 8."""
    more = -len(sample) % 8
    ids = np.concatenate([sample.ids, np.full(more, encoder.tokenizer.pad_token_id, np.int32)])
    return replace(sample, ids=ids, mask=np.concatenate([sample.mask, np.zeros(more, np.bool_)]))


def _doubled_bos(seam: Seam) -> None:
    """In training and in chat alike."""

    def pieces(real: Any) -> Any:
        def made(self: Encoder, groups: Any, known: Any) -> Any:
            first, *rest = real(self, groups, known)
            return [replace(first, ids=[self.bos_id, self.bos_id, *first.ids]), *rest]

        return made

    seam.put(Encoder, "_pieces", pieces)


def _batch(change: Callable[[Any], Any]) -> Callable[[Seam], None]:
    """Each flat batch, changed."""
    return lambda seam: seam.everywhere(batches.flat, lambda real: lambda samples, rows: change(real(samples, rows)))


def _unshifted(batch: Any) -> Any:
    return replace(batch, labels=batch.ids[batch.label_rows])


def _shifted_twice(batch: Any) -> Any:
    ids = np.append(batch.ids, batch.ids[-1])
    return replace(batch, labels=ids[batch.label_rows + 2])


def _on_training_rows(seam: Seam) -> None:
    def split(real: Any) -> Any:
        def made(desk: Any, written: Any, encoder: Any) -> Any:
            return replace(real(desk, written, encoder), train=np.arange(len(written.samples.rows)))

        return made

    seam.put(pipeline, "_split", split)


def _other_template(seam: Seam) -> None:
    def write(real: Any) -> Any:
        def made(self: RunFolder, name: str, value: Any) -> None:
            other = json.loads(json.dumps(value).replace("|>", "| >"))
            real(self, name, other if name == "template" else value)

        return made

    seam.put(RunFolder, "write", write)


def _rows_again(seam: Seam) -> None:
    """A resumed run begins its epoch anew."""
    seam.put(batches.Loader, "steps", lambda real: lambda self, start, end: real(self, 0, end - start))


def _a_row_left_out(seam: Seam) -> None:
    seam.put(batches.Loader, "order", lambda real: lambda self, epoch: real(self, epoch)[:-1])


# ---- how a model goes wrong ----


def _loaded(change: Callable[[Any], None]) -> Callable[[Seam], None]:
    """The base model, changed as soon as it is loaded."""

    def make(real: Any) -> Any:
        def made(*args: Any, **kwargs: Any) -> Any:
            found = real(*args, **kwargs)
            with torch.no_grad():
                change(found)
            return found

        return made

    return lambda seam: seam.everywhere(load.load_model, make)


def _leaks(found: Any) -> None:
    """Attention that takes a flat batch for one document."""
    forward = found.base_model.forward

    def leaking(*args: Any, cu_seq_lens_q: Any = None, documents: Any = None, **kwargs: Any) -> Any:
        if cu_seq_lens_q is not None:
            kwargs["cu_seq_lens_q"] = cu_seq_lens_q[[0, -1]]
        return forward(*args, **kwargs)

    found.base_model.forward = leaking


def _swapped(found: Any) -> None:
    """The weights of two blocks, each in the other's place."""
    one, two = found.model.layers[0], found.model.layers[1]
    kept = {name: value.clone() for name, value in one.state_dict().items()}
    one.load_state_dict(two.state_dict())
    two.load_state_dict(kept)


def _swapped_packed(found: Any) -> None:
    """Of two packed blocks the modules change places."""
    found.model.layers[0].mlp, found.model.layers[1].mlp = found.model.layers[1].mlp, found.model.layers[0].mlp


def _nan(found: Any) -> None:
    found.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: output * float("nan"))


def _untied(found: Any) -> None:
    """More rows for the embedding; the head, which is the same tensor, keeps its own."""
    more = torch.nn.Embedding(416, found.model.embed_tokens.weight.shape[1])
    more.weight[:400] = found.model.embed_tokens.weight
    more.weight.requires_grad_(False)
    found.model.embed_tokens = more


def _attached(change: Callable[[Any], None]) -> Callable[[Seam], None]:
    """The method, changed as soon as it is on the model."""

    def attach(real: Any) -> Any:
        def made(base: Any, config: Any) -> Any:
            found = real(base, config)
            with torch.no_grad():
                change(found)
            return found

        return made

    return lambda seam: seam.everywhere(adapters.attach, attach)


def _layers(found: Any) -> Iterator[Any]:
    return (module for module in found.modules() if isinstance(module, LoraLayer))


def _alpha_twice(found: Any) -> None:
    for layer in _layers(found):
        layer.scaling["default"] *= layer.scaling["default"]


def _added_twice(found: Any) -> None:
    """The right scale, used by a forward that adds the update twice."""
    for layer in _layers(found):
        real = layer.forward
        layer.forward = lambda x, real=real, layer=layer: 2 * real(x) - layer.base_layer(x)


def _b_not_zero(found: Any) -> None:
    for layer in _layers(found):
        layer.lora_B["default"].weight.normal_(std=0.1)


def _norm_trained(found: Any) -> None:
    found.get_base_model().model.norm.weight.requires_grad_(True)


def _base_changes(at: int) -> Callable[[Seam], None]:
    """Packed bytes of the base change in a step."""

    def careful(real: Any) -> Any:
        count = 0

        def made(runner: StepRunner, *args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == at:
                next(layer for _, layer in quant.layers(runner.model)).weight.data.view(torch.uint8)[0] ^= 1
            return real(runner, *args, **kwargs)

        return made

    return lambda seam: seam.put(StepRunner, "step", careful)


# ---- how steps and files go wrong ----


def _gradients(mean_of_means: bool = False, drop: bool = False, clip: bool = False) -> Callable[[Seam], None]:
    """The first half of a step, wrong in one way."""

    def make(real: Any) -> Any:
        def made(found: Any, micro: Sequence[Any], layout: Any, scale: float = 1.0, *_: Any, **__: Any) -> Any:
            some = micro[:-1] if drop and len(micro) > 1 else micro
            weight, total = sum(batch.weight for batch in some), torch.zeros((), dtype=torch.float64)
            for batch in some:
                loss = step.loss_sum(found, batch, layout)
                (loss * (scale / (batch.weight * len(some) if mean_of_means else weight))).backward()
                if clip:
                    torch.nn.utils.clip_grad_norm_(parts.trainable(found).values(), 0.05)
                total = total + loss.detach().double()
            counts = (sum(len(b.ids) for b in some), sum(b.targets for b in some))
            return step.Made(total, weight, *counts)

        return made

    return lambda seam: seam.everywhere(step.make_gradients, make)


def _skips(seam: Seam) -> None:
    """Every second step is dropped as one whose gradients overflow, and logged as if it had been applied."""

    def apply(real: Any) -> Any:
        count = 0

        def made(found: Any, done: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count % 2:
                return real(found, done, optimizer, *args, **kwargs)
            optimizer.zero_grad(set_to_none=True)
            return step.StepResult(done.loss, 1.0, done.tokens, done.targets, True)

        return made

    seam.everywhere(step.apply_gradients, apply)


def _keeps_gradients(seam: Seam) -> None:
    """Gradients of a step stay for the next one."""
    seam.put(torch.optim.AdamW, "zero_grad", lambda real: lambda self, set_to_none=True: None)


def _evaluates_in_training_mode(seam: Seam) -> None:
    def make(real: Any) -> Any:
        def made(found: Any, some: Any, layout: Any = "flat") -> float:
            with torch.no_grad():
                pairs = [(float(step.loss_sum(found.train(), batch, layout)), batch.weight) for batch in some]
            return sum(loss for loss, _ in pairs) / float(sum(weight for _, weight in pairs))

        return made

    seam.everywhere(held_out.held_out_loss, make)


def _saved(change: Callable[[Path], None]) -> Callable[[Seam], None]:
    """What was saved, changed on its way."""

    def make(real: Any) -> Any:
        def made(found: Any, folder: Path, late: Any = None) -> None:
            real(found, folder, late)
            change(folder)

        return made

    return lambda seam: seam.put(adapters, "save", make)


def _zeros(folder: Path) -> None:
    """What is saved is what the method began with."""
    file = folder / adapters.WEIGHTS
    save_file({n: t * ("lora_B" not in n) for n, t in load_file(file).items()}, file, metadata={"format": "pt"})


def _merged_twice(seam: Seam) -> None:
    def make(real: Any) -> Any:
        def made(found: Any, family: Any, config: Any) -> Any:
            for layer in _layers(found):
                layer.base_layer.weight.data += layer.get_delta_weight("default")
            return real(found, family, config)

        return made

    seam.put(merging, "merged", make)


# ---- how preferences go wrong ----


def _paired(change: Callable[[Any], Any]) -> Callable[[Seam], None]:
    """Each flat batch in which a prompt stands once for two answers, changed."""
    return _batch(lambda batch: batch if batch.shared is None else replace(batch, **change(batch)))


def _answer_sees_the_other(batch: Any) -> dict[str, Any]:
    """The rejected one has the first token of the chosen one behind its prompt, too."""
    return {"shared": batch.shared + (batch.shared > 0)}


def _answer_goes_on_behind_the_other(batch: Any) -> dict[str, Any]:
    """Positions of the rejected one go on from the chosen one, not from their prompt."""
    moved = np.repeat(np.where(batch.shared > 0, 1, 0), np.diff(batch.bounds))
    return {"positions": batch.positions + moved}


def _another_reference(seam: Seam) -> None:
    seam.put(reference, "log_probabilities", lambda real: lambda *given: real(*given) + 0.1)


def _nothing(*args: Any, **kwargs: Any) -> bool:
    return True


DROPOUT = {"lora": {"rank": 4, "dropout": 0.3}}
NF4 = {"quant": {"name": "nf4"}}
DPO, ORPO, KTO = ({"objective": name, "lr": 1e-3} for name in ("dpo", "orpo", "kto"))
FAULTS = [
    Fault("masked EOS", _samples(lambda e, s: _mask(s, -1, False)), ("eos-supervised",)),
    Fault("EOS masked as padding, by its id", _samples(lambda e, s: _mask(s, s.ids == e.tokenizer.pad_token_id, False)),
          ("eos-supervised",), base="pad-is-eos"),
    Fault("rows padded by id", _samples(_padded), ("padding-side",)),
    Fault("label not shifted", _batch(_unshifted), ("batch-labels", "reference-loss")),
    Fault("label shifted twice", _batch(_shifted_twice), ("batch-labels", "reference-loss")),
    Fault("label on the prompt's last token", _samples(lambda e, s: _mask(s, s.prompt_length - 1, True)),
          ("label-border",)),
    Fault("doubled BOS", _doubled_bos, ("double-bos",), base="bos"),
    Fault("truncated answers", _samples(_truncated), ("answers-whole",)),
    Fault("leaking attention", _loaded(_leaks), ("packing-leak",)),
    Fault("positions do not restart", _batch(lambda b: replace(b, positions=np.arange(len(b.ids)))),
          ("batch-labels", "packing-leak")),
    Fault("wrong template at chat", _other_template, ("chat-parity",)),
    Fault("tokenizer of another model", lambda seam: None, ("id-range",), base="small-vocabulary"),
    Fault("swapped tokenizer ids", lambda seam: None, ("base-loss",), base="swapped-ids"),
    Fault("evaluation on training rows", _on_training_rows, ("held-out-apart",)),
    Fault("a row left out of the epoch", _a_row_left_out, ("row-order",)),
    Fault("mean of micro-batch means", _gradients(mean_of_means=True), ("accumulation-equality",)),
    Fault("gradient of one micro-batch dropped", _gradients(drop=True), ("accumulation-equality",)),
    Fault("gradients clipped per micro-batch", _gradients(clip=True), ("step-equality",)),
    Fault("gradients of the last step kept", _keeps_gradients, ("step-equality",)),
    Fault("a frozen weight trained", _attached(_norm_trained), ("trainable-set",)),
    Fault("NaN layer", _loaded(_nan), ("packing-leak", "nan-hidden")),
    Fault("weights loaded into the wrong layer", _loaded(_swapped), ("base-loaded",)),
    Fault("packed weights in the wrong layer", _loaded(_swapped_packed), ("base-loaded",), settings=NF4),
    Fault("tied head resized apart", _loaded(_untied), ("embeddings",), base="qwen2"),
    Fault("LoRA B not zero at the start", _attached(_b_not_zero), ("same-at-start",)),
    Fault("adapter scaled twice by alpha", _attached(_alpha_twice), ("adapter-scale",)),
    Fault("adapter added twice", _attached(_added_twice), ("adapter-scale",)),
    Fault("dropout on in evaluation", _evaluates_in_training_mode, ("eval-dropout",), settings=DROPOUT),
    Fault("learning rate of zero", lambda seam: seam.everywhere(optim.learning_rate, lambda real: lambda *args: 0.0),
          ("frozen-intact",)),
    Fault("quantized base changed early", _base_changes(1), ("frozen-intact",), settings=NF4),
    Fault("quantized base changed late", _base_changes(4), ("frozen-intact",), settings=NF4),
    Fault("overflow skipped in silence", _skips, ("steps-applied",), settings={"precision": "fp16"}),
    Fault("adapter not saved", lambda seam: seam.put(adapters, "save", lambda real: lambda m, f, late=None: f.mkdir()),
          ("saved-complete",)),
    Fault("adapter saved as it began", _saved(_zeros), ("saved-complete",)),
    Fault("new token rows not saved", _saved(lambda folder: (folder / adapters.NEW_ROWS).unlink()),
          ("saved-complete",), settings={"new_tokens": ["等于"]}),
    Fault("merged twice", _merged_twice, ("merge-drift",), how="merge"),
    Fault("optimizer states lost at resume", lambda seam: seam.put(optim, "load_state", lambda real: _nothing),
          ("resume-exact",), how="resume"),
    Fault("random numbers not restored at resume",
          lambda seam: seam.put(resuming, "restore_rng", lambda real: _nothing), ("resume-exact",),
          settings=DROPOUT, how="resume"),
    Fault("sampler order wrong at resume", _rows_again, ("row-order",), how="resume"),
    Fault("weights not restored at resume", lambda seam: seam.put(resuming, "put", lambda real: _nothing),
          ("resume-exact",), how="resume"),
    Fault("an answer sees the other one of its pair", _paired(_answer_sees_the_other), ("shared-prompt",),
          settings=DPO, rows="pairs"),
    Fault("positions of an answer go on from the other one", _paired(_answer_goes_on_behind_the_other),
          ("shared-prompt",), settings=DPO, rows="pairs"),
    Fault("reference of another model", _another_reference, ("preference-start",), settings=DPO, rows="pairs"),
    Fault("chosen and rejected swapped", lambda seam: None, ("swapped-answers",), base="bundled",
          settings={**DPO, "batch_size": 8}, rows="swapped"),
    Fault("one answer twice", lambda seam: None, ("pairs-differ",), settings=DPO, rows="twice"),
    Fault("answers cut to the same", lambda seam: None, ("pairs-differ",), settings={**DPO, "max_length": 64},
          rows="prefix"),
    Fault("chosen answers are the longer ones", lambda seam: None, ("length-bias",), settings=DPO, rows="longer"),
    Fault("labelled answers of one kind", lambda seam: None, ("both-labels",), settings=KTO, rows="good"),
    Fault("ORPO on a base model that never saw the template", lambda seam: None, ("template-seen",), settings=ORPO,
          rows="pairs", base="never-ends"),
]  # fmt: skip

# ---- bases ----


def _with_tokenizer(folder: Path, change: Callable[[Any], None], kind: str = "llama") -> Path:
    tiny.save(kind, folder)
    words = tiny.make_tokenizer()
    change(words)
    words.save_pretrained(str(folder))
    return folder


def _pad_is_eos(folder: Path) -> Path:
    return _with_tokenizer(folder, lambda words: setattr(words, "pad_token", words.eos_token))


def _bos(folder: Path) -> Path:
    def change(words: Any) -> None:
        words.bos_token = "<|system|>"  # a token of the vocabulary, no secret
        begin = [("<|system|>", words.bos_token_id)]
        words.backend_tokenizer.post_processor = TemplateProcessing(single="<|system|> $A", special_tokens=begin)

    return _with_tokenizer(folder, change)


def _small_vocabulary(folder: Path) -> Path:
    tiny.make_model("llama", vocabulary=300).save_pretrained(str(folder))
    tiny.make_tokenizer().save_pretrained(str(folder))
    return folder


def _swapped_ids(folder: Path) -> Path:
    """The bundled model, with a tokenizer whose pieces have each other's ids."""
    shutil.copytree(demo.bundled() / "model", folder)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    special = {token["id"] for token in tokenizer["added_tokens"]}
    plain = sorted((i, piece) for piece, i in tokenizer["model"]["vocab"].items() if i not in special)
    ids = np.random.default_rng(0).permutation([i for i, _ in plain]).tolist()
    tokenizer["model"]["vocab"].update({piece: i for (_, piece), i in zip(plain, ids, strict=True)})
    file.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    return folder


def _never_ends(folder: Path) -> Path:
    """The bundled model, to which the token that ends an answer is the least likely of all."""
    shutil.copytree(demo.bundled() / "model", folder)
    file = folder / "model.safetensors"
    weights = load_file(file)
    ends = json.loads((folder / "config.json").read_text(encoding="utf-8"))["eos_token_id"]
    embedded = weights["model.embed_tokens.weight"]
    embedded[ends] = -embedded[ends]
    save_file(weights, file, metadata={"format": "pt"})
    return folder


BASES: dict[str, Callable[[Path], Path]] = {
    "pad-is-eos": _pad_is_eos,
    "bos": _bos,
    "small-vocabulary": _small_vocabulary,
    "swapped-ids": _swapped_ids,
    "bundled": lambda folder: demo.bundled() / "model",
    "never-ends": _never_ends,
}
REAL = ("swapped-ids", "bundled", "never-ends")  # on the bundled data, which the bundled model knows


SIDES = ("chosen", "rejected")


def _pairs(kind: str) -> list[dict[str, Any]]:
    """Rows of preferences: right answers of the bundled data before those of other rows, or one of ROWS."""
    text = (demo.bundled() / "data" / "train.jsonl").read_text(encoding="utf-8")
    read = [[turn["content"] for turn in json.loads(line)["messages"][:2]] for line in text.splitlines()[:64]]
    others = [*(answer for _, answer in read[7:]), *(answer for _, answer in read[:7])]
    both = [(q, right, wrong) for (q, right), wrong in zip(read, others, strict=True) if right != wrong]
    rows = ({"prompt": q, "chosen": right, "rejected": wrong} for q, right, wrong in both)
    return [ROWS[kind](n, row) for n, row in enumerate(rows)]


ROWS: dict[str, Callable[[int, dict[str, Any]], dict[str, Any]]] = {
    "pairs": lambda n, row: row,
    "swapped": lambda n, row: row | {"chosen": row["rejected"], "rejected": row["chosen"]},
    "twice": lambda n, row: row | ({"rejected": row["chosen"]} if n % 2 else {}),
    "prefix": lambda n, row: row | ({side: "and so on " * 60 + row[side] for side in SIDES} if n % 2 else {}),
    "longer": lambda n, row: row | {"chosen": f"{row['chosen']}, and that is sure"},
    "good": lambda n, row: {"prompt": row["prompt"], "completion": row["chosen"], "label": True},
}


class Place:
    """A folder with the bases and the data, made once."""

    def __init__(self, root: Path) -> None:
        self.root, self.count = root, 0

    def base(self, name: str) -> Path:
        """The model folder of that name."""
        folder = self.root / "models" / name
        if not folder.exists():
            folder.parent.mkdir(exist_ok=True)
            return BASES[name](folder) if name in BASES else tiny.save(name, folder)
        return folder

    def data(self, base: str, kind: str | None = None) -> list[str]:
        """Its data."""
        if kind is not None:
            file = self.root / f"{kind}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in _pairs(kind)), encoding="utf-8")
            return [str(file)]
        if base in REAL:
            return [str(demo.bundled() / "data" / "train.jsonl")]
        file = self.root / "rows.jsonl"
        return [str(file if file.exists() else tiny.write_rows(file, 24))]

    def settings(self, base: str, more: Mapping[str, Any], rows: str | None = None) -> dict[str, Any]:
        """Of a run in a folder of its own."""
        self.count += 1
        data, output = self.data(base, rows), str(self.root / f"run-{self.count}")
        run = {"model": str(self.base(base)), "data": data, "output": output}
        return {**run, **SETTINGS, **({"take": [64]} if base in REAL and rows is None else {}), **more}


# ---- what was found ----


class Heard(Watcher):
    """Collects findings, and the step that each came behind."""

    def __init__(self, crash_at: int | None = None) -> None:
        self.found: list[tuple[int, Finding]] = []
        self.last, self.crash_at = 0, crash_at

    def findings(self, findings: Sequence[Finding]) -> None:
        """See Watcher."""
        self.found += [(self.last, finding) for finding in findings]

    def step(self, record: Any) -> None:
        """See Watcher."""
        self.last = record.step
        if record.step == self.crash_at:
            raise Crash


class Crash(Exception):
    """Ends a run from inside."""


@dataclass(frozen=True)
class Outcome:
    """What a run's checks said beside ok: (rule, level, text, when)."""

    findings: tuple[tuple[str, str, str, str], ...]
    error: str = ""


def outcome(place: Place, fault: Fault) -> Outcome:
    """Run it, and collect what was refused or warned of."""
    heard, errors = Heard(), []
    with ExitStack() as stack:
        seam = Seam(stack)
        values = place.settings(fault.base, fault.settings, fault.rows)
        if fault.how == "resume":
            with _ends(Crash):
                train(build(values), watch=Heard(CRASH_AT))
        if fault.how == "merge":
            train(build(values))
        fault.plant(seam)
        try:
            if fault.how == "resume":
                torch.manual_seed(999)
                train(resume_config(values["output"], {}), resume=True, watch=heard)
            elif fault.how == "merge":
                merging.merge(values["output"], f"{values['output']}-merged")
            else:
                train(build(values), watch=heard)
        except FituneError as refused:
            errors = refused.problems if isinstance(refused, Problems) else [refused]
    findings = [(f.rule, f.level, f.text, _when(behind, fault)) for behind, f in heard.found if f.level != "ok"]
    for error in errors:
        rule, _, text = str(error.what).partition(": ")
        if not any(one[0] == rule and one[1] == "refuse" for one in findings):
            findings.append((rule, "refuse", text, _when(heard.last, fault)))
    return Outcome(tuple(findings))


def _when(behind: int, fault: Fault) -> str:
    if fault.how == "merge":
        return "when it is merged"
    if behind == 0:
        return "when it is resumed" if fault.how == "resume" else "before step 1"
    return "at the end" if behind >= SETTINGS["max_steps"] else f"behind step {behind}"


@contextmanager
def _ends(kind: type[Exception]) -> Iterator[None]:
    try:
        yield
    except kind:
        return
    raise AssertionError(f"the run was to end with {kind.__name__}")


def planted(place: Place, fault: Fault) -> dict[str, Any]:
    """The fault's row."""
    found = outcome(place, fault)
    hits = [one for one in found.findings if one[0] in fault.rules]
    others = sorted({rule for rule, *_ in found.findings if rule not in fault.rules} - ASIDE)
    row: dict[str, Any] = {"fault": fault.name, "found": bool(hits)}
    if hits:
        row |= dict(zip(("rule", "level", "says", "when"), hits[0], strict=True))
    return row | ({"others": others} if others else {})


# ---- clean runs ----

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"rank": 4, "dropout": 0.1}},
    "lora-rslora": {"method": "lora", "lora": {"rank": 4, "rslora": True, "targets": "all-linear", "b_rate": 16}},
    "dora": {"method": "lora", "lora": {"rank": 4, "dora": True}},
    "pissa": {"method": "lora", "lora": {"rank": 4, "init": "pissa"}},
    "full": {"method": "full", "lr": 1e-3},
    "freeze": {"method": "freeze"},
    "tail": {"method": "tail", "tail": {"blocks": 2}},
    "prompt": {"method": "prompt", "prompt": {"tokens": 5}},
    "p-tuning": {"method": "p-tuning", "p_tuning": {"tokens": 5}},
    "prefix": {"method": "prefix", "prefix": {"tokens": 5}},
    "adapter": {"method": "adapter", "bottleneck": {"width": 8}},
    "ia3": {"method": "ia3"},
    "nf4": {"method": "lora", "lora": {"rank": 4}, **NF4},
    "int8": {"method": "lora", "lora": {"rank": 4}, "quant": {"name": "int8"}},
    "bf16": {"method": "lora", "lora": {"rank": 4}, "precision": "bf16"},
    "fp16": {"method": "lora", "lora": {"rank": 4}, "precision": "fp16"},
    "new-tokens": {"method": "lora", "lora": {"rank": 4}, "new_tokens": ["等于"]},
    "sgd": {"method": "lora", "lora": {"rank": 4}, "optimizer": "sgd", "lr": 0.1},
    "8bit": {"method": "lora", "lora": {"rank": 4}, "optimizer": "adamw-8bit"},
    "dpo": DPO,
    "kto": KTO,
    "orpo": ORPO,
    "in-backward": {"method": "full", "optimizer_in_backward": True, "accumulation": 1, "max_grad_norm": 0, "lr": 1e-3},
}
CLEAN: list[tuple[str, str]] = [
    *((name, "llama") for name in METHODS),
    *((name, "gpt2") for name in ("lora", "full", "prefix", "nf4", "new-tokens")),
    *((name, "qwen2") for name in ("lora", "full", "new-tokens")),
    *((name, "glm") for name in ("lora", "adapter")),
    *((name, "bloom") for name in ("lora", "freeze")),
    *((name, "chatglm") for name in ("lora", "p-tuning")),
    *(("lora", kind) for kind in ("gemma2", "phi3", "opt", "qwen3_moe")),
    ("lora", "bos"), ("lora", "pad-is-eos"), ("lora", "bundled"), ("dpo", "bundled"), ("orpo", "bundled"),
]  # fmt: skip


def clean(place: Place, method: str, base: str, **more: Any) -> dict[str, Any]:
    """The row of a clean run: what its checks warned of or refused, all rules but those aside."""
    aside = ASIDE - (GUESSED if base in REAL else set())
    rows = "pairs" if "objective" in METHODS[method] else None
    found = outcome(place, Fault("", lambda seam: None, (), {**METHODS[method], **more}, base, rows=rows))
    alarms = [one for one in found.findings if one[1] != "fixed" and one[0] not in aside]
    return {"method": method, "base": base, "alarms": [f"{rule}: {text}" for rule, _, text, _ in alarms]}


def _worked(task: tuple[str, str, int]) -> dict[str, Any]:
    """One row, in one of several processes; each has a folder of its own."""
    root, what, number = task
    folder = Path(root) / str(os.getpid())
    folder.mkdir(exist_ok=True)
    place = Place(folder / f"{what}-{number}")
    place.root.mkdir()
    return _shown(planted(place, FAULTS[number]) if what == "fault" else clean(place, *CLEAN[number]))


def main(output: Path, only: str | None, workers: int) -> int:
    """All faults and all clean runs; 1 where one was missed, or a clean one warned of."""
    before = json.loads(output.read_text(encoding="utf-8")) if only is not None and output.exists() else {}
    known = {row["fault"]: row for row in before.get("faults", [])}
    passed = {(row["method"], row["base"]): row for row in before.get("clean", [])}
    faults = [n for n, one in enumerate(FAULTS) if only is None or only in one.name or one.name not in known]
    cleans = [n for n, one in enumerate(CLEAN) if one not in passed]
    with tempfile.TemporaryDirectory() as root, ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for row in pool.map(_worked, [(root, "fault", n) for n in faults]):
            known[row["fault"]] = row
        for row in pool.map(_worked, [(root, "clean", n) for n in cleans]):
            passed[row["method"], row["base"]] = row
    return _recorded(output, [known[one.name] for one in FAULTS], [passed[one] for one in CLEAN])


def _recorded(output: Path, rows: list[dict[str, Any]], cleans: list[dict[str, Any]]) -> int:
    missed, alarms = [r["fault"] for r in rows if not r["found"]], [r for r in cleans if r["alarms"]]
    print(f"{len(rows) - len(missed)} of {len(rows)} faults found, {len(alarms)} false alarms in {len(cleans)} runs")
    record = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": "python scripts/planted_faults.py",
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in ("torch", "transformers", "peft")},
        "found": len(rows) - len(missed),
        "planted": len(rows),
        "clean_runs": len(cleans),
        "false_alarms": len(alarms),
        "faults": rows,
        "clean": cleans,
    }
    output.write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return 1 if missed or alarms else 0


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    print(json.dumps(row, ensure_ascii=False)[:300], flush=True)
    return row


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("results/planted_faults.json"))
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument(
        "--only", help="faults with this in their name, and what is new; the record keeps its other rows"
    )
    given = parser.parse_args()
    sys.exit(main(given.output, given.only, given.workers))
