"""Groups of settings, each with its defaults: the methods', the quantizer's, a source's of data.

In: values of one group. Out: a frozen record; unknown keys are refused. `config.py` puts the groups together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import PurePath
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator

from fitune.core.errors import ConfigError, did_you_mean
from fitune.core.files import expand

# the most that a number may be: far above what anybody trains with, and below what never ends
MOST_COUNT, MOST_BATCH, MOST_WIDTH = 10**9, 10**6, 10**5
OneOrMore = str | Annotated[list[str], Field(min_length=1)]


class Options(BaseModel):
    """A group of settings: unknown keys are refused, and values cannot be changed once checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class LoraOptions(Options):
    """LoRA (Hu et al. 2021, arXiv:2106.09685). Trainable parameters per target: rank x (inputs + outputs)."""

    rank: int = Field(default=8, ge=1, le=MOST_WIDTH)
    """Rank of the update matrices. Trainable bytes (weights, gradients, Adam states) grow with it."""
    alpha: float = Field(default=16.0, gt=0, le=1e9)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the input of the update."""
    targets: OneOrMore = "auto"
    """Linear layers that get an update: auto (the family's attention projections), all-linear, or names."""
    experts: bool = False
    """Fused experts get an update too: rank x (inputs + outputs) for each expert, as PEFT makes it for parameters. They
    must be plain (not in few bits), and PEFT adds the update to all experts of a block before each product."""
    ranks: dict[str, Annotated[int, Field(ge=1, le=MOST_WIDTH)]] = {}
    """Other ranks for some targets: the end of a name, or a regular expression, to a rank."""
    dora: bool = False
    """DoRA (Liu et al. 2024, arXiv:2402.09353): trains the magnitudes too, one more number per output."""
    rslora: bool = False
    """rsLoRA (Kalajdzievski 2023, arXiv:2312.03732): scaled by alpha / sqrt(rank), so that high ranks learn."""
    init: Literal["default", "pissa"] = "default"
    """default: B = 0, nothing changes at the start. pissa: the weights' largest singular vectors (arXiv:2404.02948)."""
    b_rate: float = Field(default=1.0, gt=0, le=1e6)
    """LoRA+ (Hayou et al. 2024, arXiv:2402.12354): factor on the learning rate of the matrices B; 16 is usual."""
    save: list[str] = []
    """Modules that are trained whole beside LoRA: embeddings, head, or names. They cost 16 bytes a parameter."""


class FreezeOptions(Options):
    """Training only some of the base's own parameters. The backward pass stops at the first of them."""

    blocks: int = Field(default=2, ge=0, le=10_000)
    """How many of the last transformer blocks to train."""
    tensors: int | None = Field(default=None, ge=1, le=MOST_COUNT)
    """Instead of blocks: how many of the last parameter tensors to train."""
    patterns: list[str] = []
    """Instead of blocks: train parameters whose names contain a match of one of these regular expressions."""
    head: bool = False
    """Train the output head too."""
    norm: bool = False
    """Train the final norm too."""


class TailOptions(Options):
    """New layers at the end, zero at the start, so that training begins at the base model exactly."""

    kind: Literal["block", "mlp"] = "block"
    """block: copies of transformer blocks whose outputs begin at zero (LLaMA Pro, Wu et al. 2024, arXiv:2401.02415).
    mlp: a small residual MLP behind the final norm."""
    blocks: int = Field(default=2, ge=1, le=10_000)
    """Number of new blocks."""
    interleaved: bool = False
    """Spread the new blocks over the depth, instead of all behind the last one."""
    width: int | None = Field(default=None, ge=1, le=MOST_WIDTH)
    """Inner width of the MLP. Default: a quarter of the model's."""
    head: bool = False
    """Train the output head too."""


class BitfitOptions(Options):
    """BitFit (Ben Zaken et al. 2022, arXiv:2106.10199): the bias terms alone."""

    add: bool = False
    """Add biases to the projections of a model that has none; they are zero at the start."""


class PromptOptions(Options):
    """Prompt tuning (Lester et al. 2021, arXiv:2104.08691): trained vectors before the input; tokens x width."""

    tokens: int = Field(default=20, ge=1, le=MOST_WIDTH)
    """Number of virtual tokens. Each makes every row one token longer."""
    init: Literal["vocab", "random", "text"] = "vocab"
    """How virtual tokens start: as tokens of the vocabulary, drawn by the seed, at random, or as those of `text`."""
    text: str = ""
    """Text that the virtual tokens start as, with init=text; repeated or cut to their number."""


class PTuningOptions(Options):
    """P-tuning (Liu et al. 2021, arXiv:2103.10385): virtual tokens through a trained encoder."""

    tokens: int = Field(default=20, ge=1, le=MOST_WIDTH)
    """Number of virtual tokens."""
    encoder: Literal["mlp", "lstm"] = "mlp"
    """Network that makes the virtual tokens."""
    width: int | None = Field(default=None, ge=1, le=MOST_WIDTH)
    """Inner width of the encoder. Default: the model's."""


class PrefixOptions(Options):
    """Prefix tuning (Li & Liang 2021, arXiv:2101.00190; P-Tuning v2, arXiv:2110.07602): keys and values per layer."""

    tokens: int = Field(default=20, ge=1, le=MOST_WIDTH)
    """Number of prefix tokens. Trainable parameters: tokens x layers x 2 x width of the keys."""
    projection: bool = False
    """Make the prefixes by a trained MLP: training is steadier, with many times more parameters."""
    width: int | None = Field(default=None, ge=1, le=MOST_WIDTH)
    """Inner width of that MLP, with projection. Default: the model's."""


class BottleneckOptions(Options):
    """Bottleneck adapters (Houlsby et al. 2019, arXiv:1902.00751). Each: 2 x width x model width + both biases."""

    kind: Literal["houlsby", "pfeiffer", "parallel"] = "houlsby"
    """houlsby: after attention and MLP; pfeiffer: after the MLP (arXiv:2005.00247); parallel: beside the MLP
    (arXiv:2110.04366)."""
    width: int = Field(default=64, ge=1, le=MOST_WIDTH)
    """Inner width."""
    activation: Literal["relu", "gelu", "silu"] = "gelu"
    """Activation function between the adapter's two layers."""


class Ia3Options(Options):
    """IA3 (Liu et al. 2022, arXiv:2205.05638): trained factors on keys, values and the MLP's inner activations."""

    targets: OneOrMore = "auto"
    """Linear layers that are scaled: auto (keys, values and the MLP's output layer), or names."""


TrackerName = Literal["tensorboard", "trackio", "wandb", "swanlab", "mlflow"]  # as their packages are named
Objective = Literal["sft", "dpo", "ipo", "kto", "orpo", "simpo"]
Wanted = Literal["answers", "pairs", "labels"]
# what each objective needs of a row: its answers, two answers to one prompt, or answers that are marked as good or bad
ROWS: dict[str, Wanted] = {
    "sft": "answers", "dpo": "pairs", "ipo": "pairs", "kto": "labels", "orpo": "pairs", "simpo": "pairs",
}  # fmt: skip
# on the method's own learning rate: log-probabilities of whole answers move fast, and published runs take a twentieth
# of a tuning's rate or less; ORPO tunes on the chosen answers too (Hong et al. 2024: 8e-6 for all weights)
LR_FACTORS: dict[str, float] = {"sft": 1.0, "dpo": 0.05, "ipo": 0.05, "kto": 0.05, "orpo": 0.4, "simpo": 0.05}
Beta = Annotated[float, Field(gt=0, le=1e6)]


class DpoOptions(Options):
    """DPO (Rafailov et al. 2023, arXiv:2305.18290): the chosen answer is to gain more on the reference than the
    rejected one."""

    beta: Beta = 0.1
    """How close the model stays to the reference: rewards are beta x the log-ratio to it."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of the pairs that are taken to be the wrong way round (Mitchell 2023, conservative DPO)."""


class IpoOptions(Options):
    """IPO (Azar et al. 2023, arXiv:2310.12036): the margin of log-ratios, per token, is to be 1 / (2 beta)."""

    beta: Beta = 0.1
    """How close the model stays to the reference: the paper's tau."""


class KtoOptions(Options):
    """KTO (Ethayarajh et al. 2024, arXiv:2402.01306): single answers, each marked as good or bad."""

    beta: Beta = 0.1
    """How close the model stays to the reference: rewards are beta x the log-ratio to it."""
    desirable_weight: float = Field(default=1.0, ge=0, le=1e6)
    """Weight of the good answers in the loss."""
    undesirable_weight: float = Field(default=1.0, ge=0, le=1e6)
    """Weight of the bad answers in the loss."""


class OrpoOptions(Options):
    """ORPO (Hong et al. 2024, arXiv:2403.07691): the loss of the chosen answer and a term of the odds ratio; no
    reference."""

    beta: Beta = 0.1
    """Weight of the odds ratio beside the loss of the chosen answer: the paper's lambda."""


class SimpoOptions(Options):
    """SimPO (Meng et al. 2024, arXiv:2405.14734): rewards are beta x the log-probability per token; no reference."""

    beta: Beta = 2.0
    """Scale of the rewards."""
    gamma: float = Field(default=1.0, ge=0, le=1e6)
    """Margin by which the chosen answer's reward is to be higher."""


class QuantOptions(Options):
    """Frozen weights of linear layers in few bits; embedding, norms and output head stay as they are."""

    name: Literal["none", "int8", "nf4"] = "none"
    """Format of the frozen weights of linear layers. int8: LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339), 1 byte
    a weight. nf4: QLoRA's 4 bits (Dettmers et al. 2023, arXiv:2305.14314), 0.516 bytes."""
    kind: Literal["nf4", "fp4"] = "nf4"
    """The 16 values that 4 bits stand for: those of NormalFloat, or those of a float of 4 bits."""
    double: bool = True
    """Quantize the scales of the blocks of 64 weights too: 0.516 bytes a weight in place of 0.5625."""
    storage: Literal["uint8", "fp32", "bf16", "fp16"] = "uint8"
    """Dtype in which packed 4-bit weights are stored; the number of bytes is the same."""
    threshold: float = Field(default=6.0, ge=0, le=1e9)
    """Outlier threshold of LLM.int8(), written into quantized models for transformers, which leaves input columns with
    a larger value unquantized. fitune quantizes no inputs, so it changes nothing in a run."""
    skip: list[str] = []
    """Linear layers that stay as they are: whole names, or parts of names between dots (model.layers.1.mlp, down_proj).
    The output head always does."""


def quant_group(value: object) -> object:
    """`nf4` stands for {name: nf4}, `fp4` for its other kind."""
    group = {"name": value} if isinstance(value, str) else value
    if isinstance(group, Mapping) and group.get("name") == "fp4":
        return {**group, "name": "nf4", "kind": "fp4"}
    return group


def quant_options(name: str) -> QuantOptions:
    """The settings that a quantizer's name stands for.

    Raises:
        ConfigError: there is none of that name.
    """
    known = ("none", "int8", "nf4", "fp4")
    if name not in known:
        raise ConfigError(f"quant {name!r}", expected=", ".join(known), fix=did_you_mean(name, known))
    return QuantOptions.model_validate(quant_group(name))


def path_text(value: object) -> object:
    """A path as text, `~` in it as the home folder; anything else as it is."""
    text = str(value) if isinstance(value, PurePath) else value
    if isinstance(text, str) and text.startswith("~"):
        with suppress(RuntimeError):  # ~somebody who is not there
            return str(expand(text))
    return text


class DataSource(Options):
    """One source of rows, where its path alone does not say enough."""

    path: str
    """A file, a folder of files, or the id of a data set on the hub."""
    take: int | None = Field(default=None, ge=1, le=MOST_COUNT)
    """So many rows of it, drawn with the seed. Default: all."""
    weight: float | None = Field(default=None, gt=0, le=1e6)
    """How often its rows are trained in a pass: 2 is twice each, 0.5 is half of them, drawn by the seed. Default: 1."""
    format: str | None = None
    """Its format, where it differs from that of the others."""
    map: dict[str, str] = {}
    """What its columns mean, beside what `map` says for all."""

    @field_validator("path", mode="before")
    @classmethod
    def _path(cls, value: object) -> object:
        return path_text(value)


AnySource = Annotated[
    Annotated[str, Tag("path")] | Annotated[DataSource, Tag("source")],
    Discriminator(lambda value: "source" if isinstance(value, (Mapping, DataSource)) else "path"),
]


def listed(value: object) -> object:
    """One number, or one text, stands for a list of one."""
    return [value] if isinstance(value, (int, float, str)) else value


def check_drawing(temperature: object, top_p: object, max_new_tokens: object) -> None:
    """Raises ConfigError for settings by which no answer can be drawn: a negative temperature draws the least probable
    tokens."""
    heat, share = (value if isinstance(value, (int, float)) else math.nan for value in (temperature, top_p))
    if not (0 <= heat < math.inf and 0 < share <= 1 and isinstance(max_new_tokens, int) and max_new_tokens >= 1):
        raise ConfigError(
            "answers: a setting is out of range",
            received=f"temperature {temperature}, top-p {top_p}, max new tokens {max_new_tokens}",
            expected="temperature >= 0, 0 < top-p <= 1, a whole number of max new tokens >= 1",
        )
