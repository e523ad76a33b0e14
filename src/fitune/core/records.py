"""The records that flow from one stage to the next, one type per arrow. No torch here.

    raw rows -> Conversation -> Sample(ids, mask) -> Batch -> (loss sum, target count) -> StepRecord

Shapes: T = tokens of a flat batch, L = rows of it that carry a label, D = documents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Role = Literal["system", "user", "assistant", "tool"]
Layout = Literal["flat", "padded", "documents"]  # how the documents of a batch go through the model


@dataclass(frozen=True)
class Source:
    """The place of a row: the file, and the line that the row starts on (from 1)."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class ToolCall:
    """A function that the model asks to be called; `arguments` is a JSON object as text. id: as the row has it."""

    name: str
    arguments: str
    id: str = ""


SPAN = "[MASK]"  # a gap in a prompt that an answer of its own fills in; several answers are kept with it between them


@dataclass(frozen=True)
class Message:
    """One turn. `context` is alpaca's `input`: templates with a slot for it keep it apart from the content.

    tool_calls: what an assistant's turn calls. role "tool": what a call gave back; call_id and name: of which call, of
    which function, where the row says so. thought: what an assistant's turn
    thought before it answered, where the row keeps it in a field of its own. weight: how much of an answer the loss
    sees; 0: the answer is context only.
    """

    role: Role
    content: str
    context: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    thought: str = ""
    weight: float = 1.0
    call_id: str = ""
    name: str = ""


@dataclass(frozen=True)
class Conversation:
    """One row of data, whatever its format was. A system message may stand between turns, too.

    tools: function descriptions in OpenAI's frame, {type: "function", function: {name, description, parameters}}.
    rejected: of a row of preferences, what stands in the place of the messages from `fork` on where the other answer
    was given; the first `fork` messages are the prompt of both. desirable: of a labelled answer (KTO), is it a good
    one; `rejected` is then the answer to another prompt.
    """

    messages: tuple[Message, ...]
    source: Source | None = None
    format: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()
    rejected: tuple[Message, ...] = ()
    fork: int = 0
    desirable: bool | None = None

    def prompt(self) -> tuple[Message, ...]:
        """The messages before the last answer: what a model is asked when this row is a test."""
        last = max((i for i, m in enumerate(self.messages) if m.role == "assistant"), default=len(self.messages))
        return self.messages[:last]

    def question(self) -> Conversation:
        """The conversation up to where the last answer begins, with its tools."""
        return replace(self, messages=self.prompt())

    def other(self) -> Conversation:
        """The conversation with the rejected answer."""
        return replace(self, messages=(*self.messages[: self.fork], *self.rejected))

    def characters(self) -> int:
        """Length of all its texts together."""
        messages = (*self.messages, *self.rejected)
        return sum(len(message.content) + len(message.context) + len(message.thought) for message in messages)

    def answer(self) -> str:
        """The last answer."""
        return next((m.content for m in reversed(self.messages) if m.role == "assistant"), "")


@dataclass(frozen=True)
class Segment:
    """A piece of a rendered conversation, encoded apart from its neighbours.

    text: what is encoded. literal: part of the template, so special tokens in it are parsed; a user's text is not
    parsed, so `<|end|>` typed by a user stays text. token: the name of an entry of the vocabulary, whose id is appended
    instead of text. joined: after all encoded as one text with the segment before it (what ChatGLM 1 and 2 expect).
    trained: does the loss see it. turn: which message it belongs to (-1: the frame around them).
    """

    text: str = ""
    literal: bool = True
    trained: bool = False
    turn: int = -1
    role: str = ""
    token: str | None = None
    joined: bool = False


@dataclass(frozen=True)
class Sample:
    """A row as the model gets it. mask[i] says that ids[i] is trained, that is, predicted from what precedes it."""

    ids: NDArray[np.int32]
    mask: NDArray[np.bool_]
    source: Source | None = None
    cut_prompt: int = 0  # tokens of the prompt that were cut
    cut_answer: int = 0  # tokens of answers that were cut
    ends_whole: bool = True  # the last trained answer was not cut, so its stop token is there and trained
    prompt_length: int = 0  # ids before the first trained one: what a prefix-LM sees both ways
    needed: int = 0  # the shortest max_length that cuts nothing of its answers
    weights: NDArray[np.float32] | None = None  # of each id in the loss; None: 1 for all that is trained
    intact: int = 0  # the shortest max_length that cuts nothing but old exchanges that are not trained
    cut_text: int = 0  # tokens that were cut inside the prompt's texts: more than old exchanges
    shared: int = 0  # of a pair's samples: so many ids of the prompt are the same in both

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, where: slice) -> Sample:
        """A part of it, as a sample for checks."""
        weights = None if self.weights is None else self.weights[where]
        return replace(self, ids=self.ids[where], mask=self.mask[where].copy(), weights=weights)


@dataclass(frozen=True)
class Pair:
    """A row of preferences as the model gets it: two samples with one prompt.

    reference: log-probabilities of both answers by the reference model; None: nobody computed them yet. desirable: of a
    labelled answer (KTO), is it a good one; `rejected` is then an answer to another prompt, behind this one. common: so
    many first tokens of the chosen sample stand in a batch for both.
    """

    chosen: Sample
    rejected: Sample
    reference: tuple[float, float] | None = None
    desirable: bool | None = None
    common: int = 0

    @property
    def source(self) -> Source | None:
        """Where the row stands."""
        return self.chosen.source

    def __len__(self) -> int:
        return len(self.chosen) + len(self.rejected) - self.common


Units = Sequence[Sample] | Sequence[Pair]  # what batches are made of


@dataclass(frozen=True)
class Answers:
    """What a batch of pairs has beside its documents; A answers, of which pair n has 2n (chosen) and 2n + 1 (rejected).

    of: (L,), the answer that each label belongs to. reference: (A,), log-probabilities by the reference model, NaN
    where nobody computed them. desirable: (A,), of labelled answers (KTO): each row has one, and `mismatched` is the
    batch of what stands behind the same prompts though it answers others.
    """

    of: NDArray[np.int64]
    reference: NDArray[np.float32]
    desirable: NDArray[np.bool_] | None = None
    mismatched: Batch | None = None


@dataclass(frozen=True)
class Batch:
    """A micro-batch: documents one after the other, no padding.

    ids, positions: (T,). bounds: (D + 1,), document d is ids[bounds[d]:bounds[d+1]]. label_rows: (L,), the positions
    whose next token is trained; labels: (L,), those next tokens. rows: which samples these are. weights: (L,), of each
    label in the loss; None: 1 for all. answers: of a batch of pairs, whose rows have as many documents each. shared:
    (D,), so many first rows of the nearest document before it that shares none stand before each, too (0: it begins
    here); None: of none. The positions of such a document go on behind them.
    """

    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    bounds: NDArray[np.int32]
    label_rows: NDArray[np.int64]
    labels: NDArray[np.int64]
    rows: tuple[int, ...]
    weights: NDArray[np.float32] | None = None
    answers: Answers | None = None
    shared: NDArray[np.int32] | None = None

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(D,): of each document, with what it shares."""
        own = np.diff(self.bounds).astype(np.int64)
        return own if self.shared is None else own + self.shared

    @property
    def targets(self) -> int:
        """How many tokens this batch trains."""
        return len(self.labels)

    @property
    def weight(self) -> float:
        """What the loss is divided by: the sum of its labels' weights, without weights the number of labels; of a batch
        of pairs the number of rows."""
        if self.answers is not None:
            return len(self.rows)
        return len(self.labels) if self.weights is None else float(self.weights.sum(dtype=np.float64))


@dataclass(frozen=True)
class Rewards:
    """What a model makes of preferences: means over the pairs of a step, or of an evaluation.

    chosen, rejected: rewards of both answers, as the objective has them. margin: chosen less rejected. accuracy: share
    of the pairs whose chosen answer has the higher reward; of labelled answers those whose reward has the right sign.
    chosen_logp, rejected_logp: log-probabilities of the answers. kl: log-probability less that by the reference, over
    all answers: an estimate of the distance to it on answers of the data, so it may be below 0; of KTO, over answers to
    other prompts and never below 0. A figure that nothing has is None.
    """

    chosen: float | None
    rejected: float | None
    margin: float | None
    accuracy: float | None
    chosen_logp: float | None
    rejected_logp: float | None
    kl: float | None


@dataclass(frozen=True)
class StepRecord:
    """What one optimizer step did. One line of steps.jsonl."""

    step: int  # from 1
    epoch: float
    loss: float  # per target token of the step; where rows have weights, per unit of weight
    lr: float
    grad_norm: float
    tokens: int  # real tokens
    targets: int  # tokens that were trained
    seconds: float
    held_out_loss: float | None = None
    applied: bool = True  # False: loss or gradient was not finite, and no weight changed
    rewards: Rewards | None = None  # of preferences, in the step
    held_out_rewards: Rewards | None = None

    def as_dict(self) -> dict[str, object]:
        """For JSON; a number that is not finite is null there, and rewards stand there where a run has some."""
        own = {k: v for k, v in asdict(self).items() if k not in PREFERENCES or v is not None}
        return {k: _finite(v) for k, v in own.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> StepRecord:
        """Back from JSON."""
        known = {k: math.nan if v is None and k != "held_out_loss" else v for k, v in values.items()}
        for name in PREFERENCES:
            if isinstance(rewards := known.get(name), Mapping):
                known[name] = Rewards(**rewards)
        return cls(**known)  # type: ignore[arg-type]  # the fields' types are those of the file


PREFERENCES = ("rewards", "held_out_rewards")  # fields of a StepRecord that only runs on preferences have


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Finding:
    """What a check found. level: ok, fixed (the run was changed so that it passes), warn or refuse."""

    rule: str
    level: Literal["ok", "fixed", "warn", "refuse"]
    text: str
    fix: str | None = None


@dataclass(frozen=True)
class Kept:
    """One kind of tensors in memory. weights: how many they stand for. note: a cast, or why not quantized."""

    part: str
    dtype: str
    tensors: int
    weights: int
    bytes: int
    note: str = ""

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class LengthChoice:
    """What a max_length would do: shares of the rows that would be cut at all, that would lose answer tokens, and
    that would lose anything but old exchanges."""

    name: str
    max_length: int
    cut: float
    lose_answer: float
    lose_text: float = 0.0


@dataclass
class DataReport:
    """What happened to the rows between the files and the batches."""

    rows: int = 0
    kept: int = 0  # rows that are trained
    held_out: int = 0  # rows for evaluation, from these files or from their own
    cut_prompt: int = 0
    cut_answer: int = 0
    cut_text: int = 0  # rows whose prompts lost more than old exchanges
    dropped: int = 0  # nothing to train on was left, or too long for the policy `drop`
    skipped_bad: int = 0
    formats: dict[str, int] = field(default_factory=dict)
    bad_reasons: dict[str, int] = field(default_factory=dict)  # why rows were skipped
    bad_first: dict[str, str] = field(default_factory=dict)  # of each reason, where it was met first: file:line:field
    taken: dict[str, int] = field(default_factory=dict)  # how rows were read beside their conversation
    skipped: list[str] = field(default_factory=list)  # the first bad rows that skip_bad left out: file:line:field: what
    unused_columns: dict[str, int] = field(default_factory=dict)
    unfilled_slots: dict[str, int] = field(default_factory=dict)  # {{name}} that `fill` does not know: in how many rows
    files: dict[str, int] = field(default_factory=dict)  # usable rows in each file, before `take` and `weight`
    notes: list[str] = field(default_factory=list)  # what else a user should know about the sources
    tokens: int = 0
    trained_tokens: int = 0
    max_length: int = 0
    samples: int = 0
    repeated: int = 0  # tokens of conversations that come once more, because each of their answers is a sample
    pairs: int = 0  # rows of preferences, each of two samples
    shared: int = 0  # tokens of prompts that are the same in both
    lost_at_limit: int = 0  # rows that would lose answer tokens even at the longest that the model can hold
    lengths: dict[str, float] = field(default_factory=dict)  # of the uncut samples, in tokens
    length_choices: list[LengthChoice] = field(default_factory=list)

    def cost(self) -> str:
        """The cost of one sample per answer of a conversation; empty where a conversation is one sample."""
        return f"{self.repeated:,} tokens of prompts repeated ({self.more():.0%} more)" if self.repeated else ""

    def more(self) -> float:
        """The repeated tokens as a share of what one pass over each conversation would have."""
        return self.repeated / max(1, self.tokens - self.repeated)

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)
