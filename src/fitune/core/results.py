"""What commands measured: the records that views show and programs read. No torch here.

In: figures of a run, or of an evaluation. Out: Result, Evaluation, and what they are made of; `as_dict` for JSON.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

from fitune.core.clock import Phase
from fitune.core.parse import parse
from fitune.core.records import Rewards, StepRecord

Json = dict[str, object]  # a record as JSON has it


@dataclass(frozen=True)
class Answered:
    """A held-out prompt with the expected answer, and the answers before and after tuning. A row of answers.json."""

    prompt: str
    expected: str
    before: str
    after: str

    def as_dict(self) -> dict[str, str]:
        """For JSON."""
        return {name: str(value) for name, value in vars(self).items()}


@dataclass(frozen=True)
class Result:
    """What a run reached. Losses are per target token, in nats; of preferences per row."""

    run: str  # the run folder
    steps: int
    first_loss: float
    last_loss: float
    base_held_out_loss: float | None  # of the model without the method
    held_out_loss_before: float | None  # with it, before the first step: virtual tokens change the model at once
    held_out_loss_after: float | None
    trainable_parameters: int
    total_parameters: int
    real_tokens_per_second: float
    peak_memory_mib: float
    expected_memory_mib: float
    seconds: float
    held_out_rewards_before: Rewards | None = None  # of preferences, with the method, before the first step
    held_out_rewards_after: Rewards | None = None
    history: tuple[StepRecord, ...] = ()  # the record of each step; in the run folder steps.jsonl
    phases: tuple[Phase, ...] = ()  # seconds of the process that ended the run, from its start to the report

    @property
    def held_out_losses(self) -> dict[int, float]:
        """The evaluations during the run: step to held-out loss."""
        return {one.step: one.held_out_loss for one in self.history if one.held_out_loss is not None}

    def as_dict(self) -> Json:
        """For JSON, without the history."""
        found = {name: value for name, value in vars(self).items() if name != "history"}
        for name in ("held_out_rewards_before", "held_out_rewards_after"):
            rewards = found.pop(name)
            found |= {} if rewards is None else {name: asdict(rewards)}
        return {**found, "phases": [asdict(phase) for phase in self.phases]}

    @classmethod
    def from_dict(cls, values: Mapping[str, object], where: str) -> Result:
        """Back from result.json, in which a loss that is not finite is null.

        Raises:
            RunFolderError: a field is missing, or of another type.
        """
        losses = {name: math.nan for name in ("first_loss", "last_loss") if values.get(name, 0) is None}
        return parse(cls, {**values, **losses}, where)


@dataclass(frozen=True)
class Scores:
    """What one model reached on held-out rows.

    Args:
        loss: per target token, in nats.
        perplexity: exp(loss).
        exact_match, bleu4, rouge_l: of answers without the template's frame and their thoughts; 0 to 1, bleu4 to 100.
        thoughts: share of answers with a thought; None where none has one, nor should.
        thought_match: of answers that should have a thought, those with exactly this one.
        call_match: of answers that should call a tool, those with exactly this call; not in the figures above.
    """

    loss: float
    perplexity: float
    exact_match: float | None = None
    bleu4: float | None = None
    rouge_l: float | None = None
    thoughts: float | None = None
    thought_match: float | None = None
    call_match: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """What was measured on held-out rows; `base` where the model was tuned."""

    model: str
    rows: int
    asked: int  # rows whose prompts were answered
    too_long: int  # rows whose prompt leaves no room for an answer
    target_tokens: int
    scores: Scores
    base: Scores | None
    samples: list[Answered] = field(default_factory=list)
    left_out: int = 0  # rows that skip_bad left out; `rows` are the others

    def as_dict(self) -> Json:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class TaskScore:
    """A metric of a task of lm-eval, of the base model and of the tuned one, and the standard error of the latter."""

    task: str
    metric: str
    base: float | None
    tuned: float
    error: float | None


@dataclass(frozen=True)
class TaskScores:
    """What was measured on tasks of lm-eval; without a base where the model was not tuned."""

    model: str
    scores: list[TaskScore]

    def as_dict(self) -> Json:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Check:
    """level: ok, warn (works, with a loss), broken."""

    name: str
    level: Literal["ok", "warn", "broken"]
    text: str
    fix: str = ""

    def as_dict(self) -> Json:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class LayerError:
    """Of one quantized layer; errors are relative. outliers: columns of its input, None without a tokenizer."""

    name: str
    weights: int
    mean_error: float
    max_error: float
    outliers: int | None
    inputs: int


@dataclass(frozen=True)
class QuantizedModel:
    """What was written."""

    folder: str
    quant: str
    bytes_before: int
    bytes_after: int
    layers: list[LayerError]
    in_full: str = ""  # what is not in few bits beside the head, and why

    def as_dict(self) -> Json:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Overview:
    """One method. trainable: None where the model cannot carry it (`note` says why), or only PEFT knows."""

    name: str
    trains: str
    trainable: int | None
    share: float | None
    training_bytes: int | None
    merges: bool
    families: str
    default_lr: float
    why_lr: str
    note: str = ""

    def as_dict(self) -> Json:
        """For JSON."""
        return asdict(self)
