"""What a run does with rows and memory, as data and as pictures: for notebooks, and for whoever wants to look.

    from fitune import show
    show.mask([{"instruction": "1 + 1?", "output": "2"}], model="models/llama")

Every function returns a record: its fields are the figures, and a notebook draws it (`_repr_html_`). What is shown is
what a run would take: the encoder's own labels, the positions that the model is given, attention as it is measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fitune import api
from fitune.core.errors import ConfigError
from fitune.core.plan import Plan
from fitune.core.quiet import quietly
from fitune.core.records import Batch, Sample, Source
from fitune.data.batches import flat
from fitune.data.conversations import to_conversation
from fitune.views import cells, plan_page
from fitune.views.plan import OUTSIDE, needed_parts
from fitune.views.tokens import TokenView, token_views

if TYPE_CHECKING:
    from fitune.models.load import Tuned

__all__ = ["AttentionMask", "Mask", "Memory", "Positions", "attention_mask", "mask", "memory", "positions"]
MOST_TOKENS = 96  # of a picture of attention: each is a forward pass, and a row of it


@dataclass(frozen=True)
class Mask:
    """Samples token by token: `tokens` of each with ids, text and whether it is trained; `labels` as other tools write
    them, the id or -100."""

    template: str
    tokens: list[list[TokenView]]

    @property
    def ids(self) -> list[list[int]]:
        """Of each sample its token ids."""
        return [[number for token in sample for number in token.ids] for sample in self.tokens]

    @property
    def labels(self) -> list[list[int]]:
        """Of each sample its labels: the id where it is trained, -100 elsewhere."""
        return [
            [number if token.trained else cells.IGNORED for token in sample for number in token.ids]
            for sample in self.tokens
        ]

    def __str__(self) -> str:
        lines = []
        for sample in self.tokens:
            lines += ["".join(f"[{t.text}]" if t.trained else t.text for t in sample)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        note = f"template {self.template}; below each token its id and its label; green is trained"
        return cells.cell(cells.caption(note), *(cells.token_strip(sample) for sample in self.tokens))


@dataclass(frozen=True)
class Positions:
    """Documents of one flat batch: `names` of their tokens, and their positions: a row, or two in ChatGLM-6B."""

    names: list[str]
    bounds: list[int]
    rows: list[list[int]]

    def _repr_html_(self) -> str:
        titles = ["position"] if len(self.rows) == 1 else ["place", "position in the block"]
        documents = [
            n for n, (a, b) in enumerate(zip(self.bounds, self.bounds[1:], strict=False)) for _ in range(b - a)
        ]
        return cells.cell(
            cells.table(self.names, [("document", documents), *zip(titles, self.rows, strict=True)]),
        )


@dataclass(frozen=True)
class AttentionMask:
    """Which token sees which in the first block: `seen[i][j]` is true where token i sees token j."""

    names: list[str]
    bounds: list[int]
    seen: NDArray[np.bool_]

    @property
    def apart(self) -> bool:
        """No token sees one of another document."""
        whose = np.repeat(np.arange(len(self.bounds) - 1), np.diff(self.bounds))
        return not bool(self.seen[whose[:, None] != whose[None, :]].any())

    @property
    def causal(self) -> bool:
        """No token sees a later one."""
        return not bool(np.triu(self.seen, 1).any())

    def __str__(self) -> str:
        return "\n".join("".join("█" if one else "·" for one in row) for row in self.seen)

    def _repr_html_(self) -> str:
        note = "a row for each token: filled where it sees the token of the column (measured, first block)"
        return cells.cell(cells.caption(note), cells.grid(self.seen, self.names, "which token sees which"))


@dataclass(frozen=True)
class Memory:
    """Plans by name, drawn as what each needs; tensors: without what lies outside of them (Python, libraries)."""

    plans: Mapping[str, Plan]
    tensors: bool = False

    @property
    def needed(self) -> dict[str, int]:
        """Bytes that each plan needs."""
        return {name: sum(parts.values()) for name, parts in self.parts.items()}

    @property
    def parts(self) -> dict[str, dict[str, int]]:
        """Of each plan, its bytes by what they are for."""
        found = {name: needed_parts(plan) for name, plan in self.plans.items()}
        if self.tensors:
            found = {name: {k: v for k, v in parts.items() if k != OUTSIDE} for name, parts in found.items()}
        return found

    def _repr_html_(self) -> str:
        drawn = plan_page.bars_of(self.parts, self.plans, 760, label="memory by what it is for")
        one = next(iter(self.plans.values()))
        return cells.cell(
            drawn, plan_page.over_time(one, 760, tensors=self.tensors) if len(self.plans) == 1 and one.timeline else ""
        )


def mask(data: Any, *, model: str | Path | Tuned, samples: int = 1, **settings: Any) -> Mask:
    """What is trained of some rows: the label mask that a run would use.

    Args:
        data: paths or rows, as for `fitune.train`.
        model: a model folder (tokenizer files are enough); or, with rows as data, a run folder or what `fitune.load`
            gave.
        samples: how many are shown, evenly over the data.
        settings: as for `fitune.inspect`: template, train_on, max_length, ...

    Raises:
        FituneError: data or a tokenizer that cannot be read.
    """
    found = _looked(data, model, samples, settings)
    return Mask(found.template, found.tokens)


@quietly
def positions(data: Any, *, model: str | Path | Tuned, samples: int = 2, **settings: Any) -> Positions:
    """The positions that the model is given for some rows in one flat batch.

    Args:
        data, samples, settings: as for `mask`.
        model: a model or run folder, or what `fitune.load` gave; positions are the model's own.
    """
    tuned, batch, names = _batch(data, model, samples, settings)
    from fitune.engine.seen import positions as of_model

    return Positions(names, batch.bounds.tolist(), of_model(tuned.model, batch).tolist())


@quietly
def attention_mask(
    data: Any, *, model: str | Path | Tuned, samples: int = 2, layout: Any = "flat", **settings: Any
) -> AttentionMask:
    """Which token sees which, measured: each token is changed in turn, and what the first block makes of the others
    is compared.

    Args:
        data, samples, settings: as for `mask`; together at most 96 tokens.
        model: a model or run folder, or what `fitune.load` gave.
        layout: flat, as fitune trains; padded or documents, as models that cannot do that.

    Raises:
        ConfigError: more tokens than can be drawn.
    """
    tuned, batch, names = _batch(data, model, samples, settings)
    if len(batch.ids) > MOST_TOKENS:
        raise ConfigError(
            "a picture of attention", received=f"{len(batch.ids)} tokens", expected=f"at most {MOST_TOKENS}",
            fix="shorter rows, fewer samples, or max_length",
        )  # fmt: skip
    from fitune.engine.seen import sees

    return AttentionMask(names, batch.bounds.tolist(), sees(tuned.model, batch, layout))


def memory(*plans: Plan, tensors: bool = False, **named: Plan) -> Memory:
    """What plans (`fitune.plan`) need, as a picture; one alone also over the course of a run.

    Args:
        plans: by their method, precision and quantizer.
        tensors: leave out what lies outside of tensors, which is large beside a tiny model.
        named: by the names that are given: `memory(full=..., lora=...)`.
    """
    found = {**{_about(plan): plan for plan in plans}, **named}
    if not found or not all(isinstance(plan, Plan) for plan in found.values()):
        raise ConfigError("show.memory: no plan", expected="what fitune.plan gave", fix="show.memory(fitune.plan(...))")
    return Memory(found, tensors)


def _about(plan: Plan) -> str:
    if not isinstance(plan, Plan):
        return ""
    return " ".join([plan.method, plan.precision, *([] if plan.quant == "none" else [plan.quant])])


@dataclass(frozen=True)
class _Looked:
    template: str
    tokens: list[list[TokenView]]


def _looked(data: Any, model: str | Path | Tuned, samples: int, settings: dict[str, Any]) -> _Looked:
    """Samples token by token, as a run would encode them."""
    if isinstance(model, (str, Path)) and (Path(model) / "config.yaml").is_file():  # a run brings its own template
        model = api.load(model, device="cpu")
    if isinstance(model, (str, Path)):
        seen = api.inspect(data, model=model, samples=samples, **settings)
        return _Looked(seen.template, [sample.tokens for sample in seen.samples])
    if settings:
        raise ConfigError(
            "settings beside a run or a loaded model, whose template decides", received=", ".join(settings),
            fix="give the model folder as model",
        )  # fmt: skip
    rows: Sequence[Any] = [data] if isinstance(data, Mapping) else data
    if isinstance(rows, (str, Path)) or any(isinstance(row, (str, Path)) for row in rows):
        raise ConfigError(
            "paths beside a run or a loaded model",
            expected="rows: a list of dicts",
            fix="give the model folder as model",
        )
    made = [
        sample
        for number, row in enumerate(rows, 1)
        for sample in model.encoder.samples(to_conversation(row, Source("row", number)))
    ]
    return _Looked(model.template.name, [token_views(model.tokenizer, sample) for sample in made[:samples]])


def _batch(
    data: Any, model: str | Path | Tuned, samples: int, settings: dict[str, Any]
) -> tuple[Tuned, Batch, list[str]]:
    looked = _looked(data, model, samples, settings)
    made = [_sample(tokens) for tokens in looked.tokens]
    tuned = api.load(model, device="cpu") if isinstance(model, (str, Path)) else model
    names = [
        cells.shown(t.text) if n == 0 else "" for tokens in looked.tokens for t in tokens for n in range(len(t.ids))
    ]
    return tuned, flat(made, range(len(made))), names


def _sample(tokens: Sequence[TokenView]) -> Sample:
    ids = np.array([number for token in tokens for number in token.ids], np.int32)
    return Sample(ids, np.array([token.trained for token in tokens for _ in token.ids]))
