"""The settings of a run: every default stands here, and nowhere else.

In: a YAML file, `--set key=value`, flags or keywords. Out: one validated RunConfig. The command line's flags are made
from these fields, so a flag, a YAML key and a Python keyword have the same name, and the same text in `--help`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from fitune.core import blocks, names, untrusted
from fitune.core.errors import Collector, ConfigError, did_you_mean, shorten
from fitune.core.files import expand, names_near
from fitune.core.options import (
    MOST_BATCH,
    MOST_COUNT,
    ROWS,
    AnySource,
    BitfitOptions,
    BottleneckOptions,
    DataSource,
    DpoOptions,
    FreezeOptions,
    Ia3Options,
    IpoOptions,
    KtoOptions,
    LoraOptions,
    Objective,
    Options,
    OrpoOptions,
    PrefixOptions,
    PromptOptions,
    PTuningOptions,
    QuantOptions,
    SimpoOptions,
    TailOptions,
    TrackerName,
    Wanted,
    listed,
    path_text,
    quant_group,
)
from fitune.core.units import checked_size

LengthPolicy = Literal["split", "cut", "drop", "refuse"]
TrainOn = Literal["all", "last", "tool-calls"]


def _off(value: object) -> object:
    """What YAML 1.1 makes of off."""
    return "off" if value is False else value


def _block_numbers(value: str) -> str:
    if not re.fullmatch(blocks.RANGES, value.strip()):
        raise ValueError("numbers of blocks, the first and the last of each stretch: 0-11 or 0-3,8-11")
    return value.strip()


BlockNumbers = Annotated[str, AfterValidator(_block_numbers)]


class DataConfig(Options):
    """What decides which tokens are trained; `inspect` needs no more."""

    model: str
    """Model folder, or a hub id."""
    data: list[AnySource] = Field(min_length=1)
    """Training data: files (JSON, JSONL, CSV, TSV, Parquet), folders of them, ids of data sets on the hub. In YAML also
    {path, take, weight, format, map}."""
    eval_data: list[AnySource] = []
    """Held-out data, as for data. Without it a share of the training rows is held out."""
    objective: Objective = "sft"
    """What is optimized: sft (the answers), or preferences: dpo, ipo, orpo, simpo (pairs of a chosen and a rejected
    answer), kto (answers marked as good or bad)."""
    format: str = "auto"
    """Format of the rows: auto (found by looking at each row), or a name."""
    map: dict[str, str] = {}
    """What columns of other names mean: content=prompt summary=completion."""
    fill: dict[str, str] = {}
    """Texts for the slots {{name}} in the data: name=Ada."""
    take: Annotated[list[Annotated[int, Field(ge=1, le=MOST_COUNT)]], BeforeValidator(listed)] = []
    """Rows to use of each source of data, drawn with the seed; one number, or one for each source."""
    weight: Annotated[list[Annotated[float, Field(gt=0, le=1e6)]], BeforeValidator(listed)] = []
    """How often the rows of each source are trained in a pass; one number, or one for each."""
    skip_bad: bool = False
    """Leave out rows that cannot be used, and list them, instead of refusing the run."""
    template: str = "auto"
    """Prompt template: auto (the tokenizer's own, else alpaca), or a name."""
    system_role: Literal["auto", "keep", "first-user"] = "auto"
    """What becomes of a system text in the tokenizer's own template: keep, first-user (it goes into the first user's
    turn), or auto (first-user, with a notice, where the template has no place for it: Gemma 2)."""
    template_options: dict[str, Any] = {}
    """Variables that the tokenizer's own template reads: enable_thinking=false. The run keeps them."""
    new_tokens: list[str] = []
    """Tokens that the vocabulary gets, each one id: their rows are trained beside any method, and saved."""
    answer_tokens: list[str] = []
    """Special tokens of the vocabulary that answers are to produce: each is one id in answers, in all other text it
    stays text."""
    max_length: Annotated[int, Field(ge=2, le=MOST_COUNT)] | Literal["auto"] = "auto"
    """Longest row in tokens. Longer rows are cut; memory for activations grows with it."""
    length_policy: LengthPolicy = "split"
    """What to do with rows longer than max_length: split (documents of plain text become several samples; conversations
    are cut), cut (the prompt first, then the answer), drop, or refuse the run."""
    train_on: TrainOn = "all"
    """Which answers of a conversation are trained: all, the last one, or those that call a tool."""
    max_lost: float = Field(default=0.05, ge=0, le=1)
    """Share of rows that may lose answer tokens to cutting before the run is refused."""
    seed: int = Field(default=42, ge=0, lt=2**32)
    """Seed of the order of the rows, the initial weights and dropout."""
    cache: str = "auto"
    """Folder where prepared data and traced plans are kept for the next run: auto (the system's place for caches, or
    $FITUNE_CACHE), a folder, or none."""

    cache_size: Annotated[str, BeforeValidator(checked_size)] = "20GB"
    """Largest size of the cache (20GB, 500MB): beyond it the entries unused for longest are removed, and named."""

    @field_validator("model", "template", "cache", mode="before")
    @classmethod
    def _path(cls, value: object) -> object:
        return path_text(value)

    @field_validator("data", "eval_data", mode="before")
    @classmethod
    def _paths(cls, value: object) -> object:
        several = [value] if isinstance(value, (str, PurePath, Mapping)) else value
        return [path_text(one) for one in several] if isinstance(several, (list, tuple)) else several

    @field_validator("new_tokens", "answer_tokens")
    @classmethod
    def _each_once(cls, value: list[str]) -> list[str]:
        if len(set(value)) != len(value) or not all(token.strip() for token in value):
            raise ValueError("texts, each once, none of them blank")
        return value

    @field_validator("take", "weight")
    @classmethod
    def _one_or_each(cls, value: list[float], info: ValidationInfo) -> list[float]:
        sources = len(info.data.get("data", ()))
        if sources and len(value) not in (0, 1, sources):
            each = f", or one for each of the {sources} sources in data" if sources > 1 else ""
            raise ValueError(f"one number{each}")
        return value

    @property
    def wanted(self) -> Wanted:
        """What the objective needs of a row."""
        return ROWS[self.objective]

    def sources(self) -> list[DataSource]:
        """The training data with all that is said of it; what stands in a source wins over what is said for all."""
        takes, weights = (_for_each(values, len(self.data)) for values in (self.take, self.weight))
        return [
            source.model_copy(update={"take": source.take or take, "weight": source.weight or weight or 1.0})
            for source, take, weight in zip(map(self._source, self.data), takes, weights, strict=True)
        ]

    def eval_sources(self) -> list[DataSource]:
        """The held-out data; `take` and `weight` are for training data."""
        return [self._source(given) for given in self.eval_data]

    def _source(self, given: str | DataSource) -> DataSource:
        source = DataSource(path=given) if isinstance(given, str) else given
        return source.model_copy(update={"format": source.format or self.format, "map": {**self.map, **source.map}})


class RunConfig(DataConfig):
    """Everything that decides a run. The same config, seed and machine give the same run, bit for bit."""

    output: str | None = None
    """Run folder. Must be new or empty. Default: runs/<model>-<method>-<number>."""
    val_share: float = Field(default=0.05, ge=0, lt=1)
    """Share of the rows that is held out where no eval_data is given (at most val_rows)."""
    val_rows: int = Field(default=200, ge=1, le=MOST_COUNT)
    """Most rows that are held out from the training data."""
    method: str = "lora"
    """How to tune: full, freeze, tail, bitfit, prompt, p-tuning, prefix, adapter, lora, ia3, or peft:TYPE for any other
    method of PEFT. `fitune methods` prints what each trains."""
    adapter: str | None = None
    """Go on from what was tuned before: a run folder, or its adapter folder. It must be of the same method."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Dtype of the computation and of the frozen weights: 16 bits take half the bytes. auto: what this machine computes
    fast without losing range, measured once on a CPU; the choice and its reason are printed."""
    storage_dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Dtype of the frozen weights, where it is to differ from that of the computation: bf16 beside --precision fp32
    halves the weights on a machine without fast bf16."""
    trainable_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Dtype of what is trained, of its gradients and of the optimizer's states. 16 bits lose small updates; float16
    also needs an epsilon that is not small beside the learning rate."""
    quant: Annotated[QuantOptions, BeforeValidator(quant_group)] = QuantOptions()
    """Quantized frozen weights: none, int8 or nf4 (QLoRA)."""
    checkpointing: bool | Annotated[int, Field(ge=1, le=10_000)] | Literal["auto"] | BlockNumbers = False
    """Keep no activations inside blocks, compute them again in the backward pass: less memory, a third more work. A
    number n: in every nth block only; 0-11: in these blocks; auto: in as few as the plan needs to fit."""
    offload: bool | BlockNumbers = False
    """Keep activations of blocks in main memory beside a GPU until the backward pass needs them: 0-11 of these blocks,
    of recomputed ones their inputs. checkpointing auto sets it where recomputation is not enough, or slower."""
    frozen_cache: Annotated[Literal["auto", "off", "memory", "disk"], BeforeValidator(_off)] = "auto"
    """Where hidden states of the lowest blocks, if all of them are frozen (freeze, tail), are kept for later epochs,
    which begin there: memory, disk (the cache's), off. auto: memory where there is room to spare, else disk. It takes
    the bytes of a hidden state for each token of the data."""
    lora: LoraOptions = LoraOptions()
    """Settings of the method lora."""
    freeze: FreezeOptions = FreezeOptions()
    """Settings of the method freeze."""
    tail: TailOptions = TailOptions()
    """Settings of the method tail."""
    bitfit: BitfitOptions = BitfitOptions()
    """Settings of the method bitfit."""
    prompt: PromptOptions = PromptOptions()
    """Settings of the method prompt."""
    p_tuning: PTuningOptions = PTuningOptions()
    """Settings of the method p-tuning."""
    prefix: PrefixOptions = PrefixOptions()
    """Settings of the method prefix."""
    bottleneck: BottleneckOptions = BottleneckOptions()
    """Settings of the method adapter."""
    ia3: Ia3Options = Ia3Options()
    """Settings of the method ia3."""
    peft: dict[str, Any] = {}
    """Settings of PEFT's own config, for the method peft:TYPE."""
    dpo: DpoOptions = DpoOptions()
    """Settings of the objective dpo."""
    ipo: IpoOptions = IpoOptions()
    """Settings of the objective ipo."""
    kto: KtoOptions = KtoOptions()
    """Settings of the objective kto."""
    orpo: OrpoOptions = OrpoOptions()
    """Settings of the objective orpo."""
    simpo: SimpoOptions = SimpoOptions()
    """Settings of the objective simpo."""
    batch_size: int = Field(default=8, ge=1, le=MOST_BATCH)
    """Rows per micro-batch; a pair is one. Memory for activations grows with it."""
    batch_tokens: int | None = Field(default=None, ge=1, le=MOST_COUNT)
    """Tokens per micro-batch, in place of batch_size: memory stays even where rows differ in length."""
    loss_rows: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Label rows whose logits are computed at once; each takes 6 bytes a token of the vocabulary, 8 in fp32. auto:
    32 MiB of logits on a CPU; on a GPU at least 512 rows, a quarter of the largest micro-batch where there is room.
    On a CPU a frozen output head takes as many logits, and at most 8 MiB of them, for more rows and a part of the
    vocabulary."""
    layout: Literal["auto", "flat", "padded", "documents"] = "auto"
    """How documents go through the model. auto: flat, unless a probe on the model shows that documents leak."""
    accumulation: int = Field(default=1, ge=1, le=MOST_BATCH)
    """Micro-batches per optimizer step. Costs no memory."""
    epochs: float = Field(default=3.0, gt=0, le=10_000)
    """Passes over the data."""
    max_steps: int | None = Field(default=None, ge=1, le=MOST_COUNT)
    """Stop after this number of optimizer steps, whatever epochs says."""
    lr: float | None = Field(default=None, gt=0, le=1e6)
    """Peak learning rate. Default: the method's own, for preferences less."""
    warmup: float = Field(default=0.05, ge=0, le=1)
    """Share of the steps over which the learning rate rises."""
    weight_decay: float = Field(default=0.0, ge=0, le=1e6)
    """Decoupled weight decay of matrices."""
    max_grad_norm: float = Field(default=1.0, ge=0, le=1e12)
    """Gradients are scaled down to this norm; 0: they are not."""
    optimizer: str = "adamw"
    """adamw, adamw-foreach, adamw-8bit, paged-adamw-8bit, adafactor, lion, lion-8bit or sgd. States take 8 bytes a
    trained parameter with adamw, 2 in 8 bits, 4 with lion and sgd, 1 with lion-8bit, next to none with adafactor."""
    epsilon: float = Field(default=1e-8, gt=0, le=1.0)
    """Epsilon of adamw in all its forms: what is added to the root of the second moment."""
    optimizer_in_backward: bool = False
    """For the method full: update each parameter as soon as its gradient is there, and drop the gradient. 4 bytes a
    parameter less."""
    eval_every: int | None = Field(default=None, ge=1, le=MOST_COUNT)
    """Steps between held-out evaluations. Default: five times a run."""
    save_every: int | None = Field(default=None, ge=1, le=MOST_COUNT)
    """Steps between checkpoints. Default: as eval_every."""
    patience: int | None = Field(default=None, ge=1, le=MOST_COUNT)
    """Stop early, after so many evaluations in a row without a better held-out loss; the result is then the best."""
    final: Literal["last", "best"] = "last"
    """What the result is: the weights after the last step, or those with the best held-out loss."""
    keep_last: int = Field(default=2, ge=1, le=MOST_COUNT)
    """How many of the newest checkpoints are kept, besides the best one."""
    sample_prompts: int = Field(default=3, ge=0, le=MOST_BATCH)
    """Held-out prompts that are answered before and after, for the report."""
    sample_tokens: int = Field(default=64, ge=1, le=MOST_BATCH)
    """Longest of these answers, in tokens."""
    track: Annotated[list[TrackerName], BeforeValidator(listed)] = []
    """Trackers that the run is shown in, several at once: tensorboard, trackio, wandb, swanlab, mlflow. What they write
    on this machine lies in the run folder; the run never waits for them."""
    track_project: str = "fitune"
    """The project that trackers file the run under."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, ..."""
    parallel: Literal["auto", "replicate", "shard"] = "auto"
    """What each of several processes holds: the whole model (replicate), or its part of every block's weights,
    gradients and states (shard). auto: the whole, where that fits."""
    collective_timeout: float = Field(default=10, gt=0, le=60 * 24)
    """Minutes that a process of several waits for the others, in each exchange; one that is later is named."""
    force: bool = False
    """Run even where the plan does not fit, or where epsilon is too small for weights trained in float16."""

    @field_validator("output", "adapter", mode="before")
    @classmethod
    def _own_path(cls, value: object) -> object:
        return path_text(value)


def _for_each(values: list[Any], count: int) -> list[Any]:
    """One value for each of `count` sources: none, the same, or their own."""
    return values if len(values) == count else (values or [None]) * count


def _locate(path: tuple[str | int, ...]) -> tuple[str, type[BaseModel]]:
    """The setting as the user wrote it, and the group it stands in (pydantic adds union branches to the path)."""
    parts: list[str] = []
    group: type[BaseModel] = RunConfig
    for part in path:
        info = group.model_fields.get(str(part))
        if isinstance(part, int) and parts:
            parts[-1] += f"[{part}]"
            continue
        if part == "source" and parts and parts[-1].endswith("]"):
            group = DataSource
            continue
        if info is None:
            if not parts:
                parts.append(str(part))
            break
        parts.append(str(part))
        if isinstance(info.default, Options):
            group = type(info.default)
    return ".".join(parts), group


def build(values: Mapping[str, object]) -> RunConfig:
    """Check the values and fill in the defaults.

    Raises:
        ConfigError, Problems: all that is wrong, at once.
    """
    try:
        return RunConfig.model_validate(names.ours(values))
    except ValidationError as error:
        found: dict[str, ConfigError] = {}
        for item in error.errors():
            name, group = _locate(item["loc"])
            if item["type"] == "extra_forbidden":
                name = f"{name}.{item['loc'][-1]}" if len(item["loc"]) > 1 else name
                found[name] = names.problem(name, item["input"]) or ConfigError(
                    f"unknown setting {name!r}", fix=did_you_mean(str(item["loc"][-1]), group.model_fields)
                )
            elif item["type"] == "missing":
                found[name] = ConfigError(
                    f"{name} is missing", fix=f"give --{name.replace('_', '-')}" if len(item["loc"]) == 1 else None
                )
            elif name in found:  # another branch of the same union
                found[name].expected = f"{found[name].expected}, or: {_wish(item['msg'])}"
            else:
                found[name] = ConfigError(
                    f"{name}: wrong value", received=shorten(item["input"]), expected=_wish(item["msg"])
                )
        problems = Collector()
        problems.problems.extend(found.values())
        problems.raise_any()
        raise AssertionError("unreachable: pydantic raised without errors") from error


def settings_only(values: Mapping[str, object], *, model: str = "-") -> RunConfig:
    """The checked settings of a run whose data, and perhaps whose model, nobody looks at.

    Args:
        values: settings; a model or data among them do not count.
        model: a model, where that counts.

    Raises:
        ConfigError, Problems: see `build`.
    """
    return build({**values, "model": model, "data": ["-"]})


def _wish(message: str) -> str:
    """pydantic's `Input should be ...` as what was expected."""
    return message.removeprefix("Input should be ").removeprefix("Value error, ").partition(", unable to ")[0]


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a YAML file.

    Raises:
        ConfigError: the file is missing, is no YAML, or holds no mapping.
    """
    try:
        values = untrusted.read_yaml(expand(path), ConfigError)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file", fix=names_near(path)) from None
    return names.ours(values or {})


def parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """`["lora.rank=16", "seed=1"]` as nested settings; values are read as YAML.

    Raises:
        ConfigError: an assignment without `=`, or without a name.
    """
    values: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not name.strip():
            raise ConfigError("--set", received=repr(assignment), expected="key=value, for example lora.rank=16")
        nested = value_of(text)
        for part in reversed(name.strip().split(".")):
            nested = {part: nested}
        values = merge(values, names.ours(nested))
    return values


def value_of(text: str) -> Any:
    """A value as YAML has it; what is no YAML is text."""
    try:
        value = untrusted.parse_yaml(text)
    except yaml.YAMLError:
        return text
    # YAML 1.1 reads 1e-4 as text; every user of this field means a number
    if isinstance(value, str):
        with suppress(ValueError):
            return float(value)
    return value


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over` on top, group by group."""
    out = dict(base)
    for key, value in over.items():
        if key == "quant" and isinstance(out.get(key), (str, Mapping)):
            out[key], value = quant_group(out[key]), quant_group(value)
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = merge(out[key], value) if both else value
    return out
