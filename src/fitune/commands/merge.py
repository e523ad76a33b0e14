"""fitune merge: a run to a plain model, with what was tuned added to the base model's weights.

In: a run. Out: a model folder that transformers loads without fitune or PEFT. The logits are compared with those of the
tuned model, before the weights are rounded to 16 bits and after, on the model that was written. A base model that was
quantized is first dequantized, with the values that it was tuned on. Merging into the original weights, or quantizing
the merged ones again, gives another model: the difference is measured.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from fitune.checks import datachecks
from fitune.checks.findings import raise_refused
from fitune.core.config import RunConfig
from fitune.core.errors import FituneError, RunFolderError
from fitune.core.files import check_new, disk, expand, whole_folder
from fitune.core.options import QuantOptions
from fitune.core.records import Finding, Message
from fitune.core.scratch import Scratch
from fitune.data.batches import in_order
from fitune.data.encode import Encoder
from fitune.engine import integrity
from fitune.engine.checkpoint import RunFolder
from fitune.engine.loading import base_of, finished, load
from fitune.engine.step import label_hidden
from fitune.models import attached, methods, weights, whole
from fitune.models import quant as quants
from fitune.models.configs import quantized_as, read_config, without_weights
from fitune.models.families import Family, towers
from fitune.models.handover import Handover, hand_over, write_answer_tokens
from fitune.models.head import output_head
from fitune.models.interfaces import CausalLM, causal_lm
from fitune.models.load import Tuned, load_model
from fitune.models.methods import new_tokens
from fitune.models.precision import DTYPES, NAMES
from fitune.views import model_card

PROBE = ("Hello, world!", "你好，世界", "1 + 1 = 2")


@dataclass(frozen=True)
class Merged:
    """What was written. Errors are relative to the largest logit of the tuned model."""

    folder: str
    dtype: str
    merge_error: float  # in float32
    rounding_error: float  # of the folder as it was written
    drift: Drift | None = None  # where the run was trained on other weights
    handed: Handover | None = None  # the chat template and the stop tokens
    in_full: str = ""  # of a model that is quantized again: what is not in few bits beside the head, and why

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Drift:
    """The difference between a merged model and the tuned one, over target tokens of held-out rows."""

    kl: float  # KL divergence from the merged model's distributions to the tuned one's, nats per token
    agreement: float  # share of tokens where both have the same most likely token
    loss_before: float
    loss_after: float
    tokens: int

    def text(self) -> str:
        """For a message, in one line."""
        return (
            f"over {self.tokens:,} held-out tokens: KL {self.kl:.2e} nats, top-1 agreement {self.agreement:.1%}, "
            f"loss {self.loss_before:.4f} before and {self.loss_after:.4f} after"
        )


def merge(
    run: str | Path,
    output: str | Path,
    *,
    dtype: str = "auto",
    force: bool = False,
    onto: str | None = None,
    requantize: bool = False,
    model: str | Path | None = None,
) -> Merged:
    """Write a run's model as a plain one. A quantized base model is first dequantized, to the values of its tuning.

    Args:
        run: a finished run.
        output: a new or empty folder.
        dtype: of the weights: auto (as those of the base model are stored), fp32, bf16 or fp16.
        force: write the model even if its logits differ from the tuned model's.
        onto: for a run on a quantized base model: `original`, or a folder, whose weights replace those that the run
            was tuned on. The difference is measured; needs `force`.
        requantize: quantize the merged model again, as the run's base model was. The difference is measured; needs
            `force`.
        model: where the run's base model is now, if it was moved.

    Raises:
        RunFolderError: the run is not finished, its method cannot be merged, or the folder is not empty.
    """
    target = expand(output)
    check_new(target, whole=True)
    folder = RunFolder(run)
    reads = (*integrity.BEGIN, *integrity.END)
    config = finished(folder, reads, missing=[name for name in integrity.END if name != "adapter"])
    config = config.model_copy(update={"model": base_of(folder, config, model)})
    if dtype not in ("auto", *DTYPES):
        raise RunFolderError("--dtype", received=dtype, expected=f"auto, {', '.join(DTYPES)}")
    request = _Request(folder, config, target, onto, requantize, force)
    request.check()
    tuned = load(run, model=model, device="cpu", precision="fp32")
    return _merge(request, tuned, NAMES[weights.stored_dtype(Path(config.model))] if dtype == "auto" else dtype)


@dataclass(frozen=True)
class _Request:
    """What is merged into what; see `merge`."""

    run: RunFolder
    config: RunConfig
    target: Path
    onto: str | None
    requantize: bool
    force: bool

    def check(self) -> None:
        """Raises RunFolderError where the base model is not quantized, or settings do not go together."""
        config, onto = self.config, self.onto
        quantized = config.quant.name != "none" or quantized_as(read_config(Path(config.model))).name != "none"
        if (onto is not None or self.requantize) and not quantized:
            raise RunFolderError("--onto and --requantize are for runs on a quantized base model", fix="leave them out")
        if self.requantize and towers.of(Path(config.model)) is not None:
            raise RunFolderError(
                "--requantize: this run tuned the language model of a model that also takes images",
                fix="merge without it, and let transformers quantize the whole model when it is loaded",
            )
        if onto is not None and self.requantize:
            raise RunFolderError("--onto and --requantize do not go together", fix="leave one of them out")
        if self.requantize and config.quant.name == "none":
            raise RunFolderError(
                "--requantize: this run's base model was quantized before, by settings that the run does not know",
                fix="merge it, then: fitune quantize FOLDER --quant nf4",
            )
        if onto == "original" and config.quant.name == "none":
            raise RunFolderError(
                "--onto original: this run's base model is a quantized folder", fix="--onto FOLDER, the original"
            )

    @property
    def other_weights(self) -> bool:
        """The merged model has other weights than the run was trained on."""
        return self.onto is not None or self.requantize

    @property
    def base_files(self) -> Path:
        """The folder with the files of the base model that the merged one has too."""
        return Path(self.config.model if self.onto in (None, "original") else str(self.onto))


def _merge(request: _Request, tuned: Tuned, dtype: str) -> Merged:
    """Merge, compare and write. dtype: fp32, bf16 or fp16."""
    with torch.no_grad():
        before = tuned.model(input_ids=(probe := _probe(tuned.encoder))).logits[:, -probe.shape[1] :]
        plain = merged(_plain(request, tuned), tuned.family, request.config)
        error = _relative(plain(input_ids=probe).logits, before)
    drift = _drift(request, tuned, _as_written(request, plain)) if request.other_weights else None
    if drift is not None and not request.force:
        raise RunFolderError(
            f"the run was tuned on other weights: {drift.text()}",
            fix="leave out --onto and --requantize, which merges exactly; --force writes it anyway",
        )
    plain = plain.to(DTYPES[dtype])
    with whole_folder(request.target) as place:
        _write(request, plain, place)
        handed = hand_over(place, tuned.tokenizer, tuned.template)
        write_answer_tokens(place, tuned.encoder)
        model_card.write(place, request.target.name, request.run, request.config, handed)
        with torch.no_grad():
            rounding = _relative(load_model(place, precision="fp32")(input_ids=probe).logits, before)
        if not request.force:
            raise_refused([merge_drift(error, rounding, dtype)])
    in_full = quants.left_plain(_shape(request), request.config.quant) if request.requantize else ""
    return Merged(str(request.target), dtype, error, rounding, drift, handed, in_full)


def _plain(request: _Request, tuned: Tuned) -> PreTrainedModel:
    """The model to merge: the tuned one, or where its base model is quantized the same on plain weights."""
    config, run = request.config, request.run
    if request.onto is None and not any(True for _ in quants.packed(tuned.model)):
        return tuned.model
    if request.onto is None:
        return load(run.path, model=config.model, device="cpu", precision="fp32", plain=True).model
    return load_model(request.base_files, precision="fp32", adapter=run.adapter)


def _savable(request: _Request) -> QuantOptions:
    return quants.without_experts(_shape(request), request.config.quant)


def _shape(request: _Request) -> CausalLM:
    shape: CausalLM = without_weights(read_config(request.base_files))
    return shape


def _as_written(request: _Request, plain: PreTrainedModel) -> PreTrainedModel:
    """The merged model as it will be: itself, or quantized again, by way of a folder beside the target."""
    if not request.requantize:
        return plain
    target = request.target
    target.parent.mkdir(parents=True, exist_ok=True)
    with disk(target.parent), Scratch(target) as place:
        plain.save_pretrained(str(place), safe_serialization=True)
        return load_model(place, precision="fp32", quant=_savable(request))


def _write(request: _Request, model: PreTrainedModel, folder: Path) -> None:
    """The weights and the config of the merged model."""
    if request.requantize:
        with Scratch(folder / "plain") as place:
            model.save_pretrained(str(place), safe_serialization=True)
            quantized = load_model(place, precision="fp32", quant=_savable(request))
            quantized.save_pretrained(str(folder), safe_serialization=True)
    elif attached.of(model).tower is not None:
        whole.save(model, request.base_files, folder)
    else:
        model.save_pretrained(str(folder), safe_serialization=True)


MOST_ROWS = 50  # held-out rows that a difference is measured on


@torch.no_grad()
def _drift(request: _Request, tuned: Tuned, other: nn.Module) -> Drift:
    """The difference of both models over the run's own held-out rows.

    Raises:
        RunFolderError: the run has none, or its data is missing.
    """
    config, folder = request.config, request.run
    limit = int(config.max_length)
    try:
        rows = datachecks.read(config, folder.tokenizer, tuned.tokenizer, limit=limit, vocabulary=1 << 30).held_out
    except FituneError as error:
        raise RunFolderError(
            "the run's data cannot be read, so the difference cannot be measured", received=error.what
        ) from None
    if not len(rows):
        raise RunFolderError("this run holds no rows out, so the difference cannot be measured")
    batches = list(in_order([rows[n] for n in range(min(len(rows), MOST_ROWS))], 1))
    kl, agree, losses, tokens = 0.0, 0, [0.0, 0.0], 0
    for batch in batches:
        labels = torch.from_numpy(batch.labels)
        scores = [
            torch.log_softmax(output_head(model)(label_hidden(model.eval(), batch, "documents")).float(), dim=-1)
            for model in (tuned.model, other)
        ]
        kl += float((scores[0].exp() * (scores[0] - scores[1])).sum())
        agree += int((scores[0].argmax(-1) == scores[1].argmax(-1)).sum())
        losses = [a - float(b.gather(1, labels[:, None]).sum()) for a, b in zip(losses, scores, strict=True)]
        tokens += len(labels)
    return Drift(kl / tokens, agree / tokens, losses[0] / tokens, losses[1] / tokens, tokens)


DRIFT = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.02}  # allowed in the written model, relative to the largest logit


def merge_drift(error: float, rounding: float, dtype: str) -> Finding:
    """A merged model gives the tuned model's logits: nearly exactly in float32, with a small error in 16 bits."""
    text = f"logits are off by {error:.1e} through merging, by {rounding:.1e} as written in {dtype}"
    if error > DRIFT["fp32"] or rounding > DRIFT[dtype]:
        return Finding("merge-drift", "refuse", text, "--dtype fp32; --force writes it anyway")
    return Finding("merge-drift", "ok", text)


def merged(model: nn.Module, family: Family, config: RunConfig) -> PreTrainedModel:
    """The plain model.

    Args:
        model: with its method attached; its base model is changed.
        family: of the model.
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
    new_tokens.write_in(causal_lm(model))
    if config.method == "bitfit" and config.bitfit.add:
        for flag in family.bias_flags:
            setattr(model.config, flag, True)
    return model


def _probe(encoder: Encoder) -> Tensor:
    """(1, T): short texts in two languages, in the run's template."""
    try:
        ids = [i for text in PROBE for i in encoder.prompt([Message("user", text)])]
    except FituneError:  # a template that needs tools: the texts alone
        ids = [i for text in PROBE for i in encoder.tokenizer(text, add_special_tokens=False)["input_ids"]]
    return torch.tensor([ids[:256]])


def _relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())
