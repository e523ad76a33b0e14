"""What a model's prompts look like: the resolved template with its roles, ids and stop tokens.

In: a folder with a tokenizer. Out: short conversations as training encodes them, token by token, and what chat sends
before an answer. What a template does not take (a system message, tools) is shown with its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from fitune.core.errors import FituneError
from fitune.core.records import Conversation, Message, Sample
from fitune.data import templates
from fitune.data import tokenizer as tokenizer_folders
from fitune.data.encode import Encoder
from fitune.engine.checkpoint import RunFolder
from fitune.models.locate import locate
from fitune.views.tokens import TokenView, coloured, token_views

QUESTION, ANSWER = "What is 2 + 2?", "4"
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "the sum of two numbers",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}},
    },
}


@dataclass(frozen=True)
class Example:
    """A conversation by its template: its samples token by token; or why the template does not take it."""

    about: str
    samples: list[list[TokenView]]
    refused: str = ""


@dataclass(frozen=True)
class TemplateView:
    """A model's template. stops: text and id of what ends an answer; the first is trained, each ends a chat's answer.
    begins: what stands before every row, or nothing."""

    model: str
    name: str
    stops: list[tuple[str, int]]
    begins: tuple[str, int] | None
    examples: list[Example]

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def template(model: str, name: str = "auto", *, question: str = QUESTION, answer: str = ANSWER) -> TemplateView:
    """The template that a run with this model would take.

    Args:
        model: a model folder (tokenizer files are enough), a run folder, or a hub id.
        name: as in `--template`.
        question, answer: what stands in the examples.

    Raises:
        FituneError: no tokenizer, an unknown template, or one that needs tokens that are not there.
    """
    folder, tokenizer, chosen = _of(model, name)
    encoder = Encoder(tokenizer, chosen)
    stops = [encoder.stop_id, *(one for one in encoder.stop_ids if one != encoder.stop_id)]
    asked, answered = Message("user", question), Message("assistant", answer)
    system = Message("system", "Answer briefly.")
    shown = _Shown(tokenizer, encoder)
    rows = {
        "a question and its answer": [asked, answered],
        "two turns": [asked, answered, asked, answered],
        "with a system message": [system, asked, answered],
    }
    examples = [shown.row(about, messages) for about, messages in rows.items()]
    examples.append(shown.row("with a tool", [asked, answered], (TOOL,)))
    examples.append(shown.asked("what chat sends before an answer", [asked]))
    return TemplateView(
        model=Path(folder).name,
        name=chosen.name,
        stops=[(str(tokenizer.convert_ids_to_tokens(number)), int(number)) for number in stops],
        begins=_begins(tokenizer, examples[0]),
        examples=examples,
    )


def _of(model: str, name: str) -> tuple[Path, Any, templates.Template]:
    """Folder, tokenizer and template of a model, or of a run, which brings its own."""
    run = RunFolder(model)
    if (run.path / "config.yaml").is_file():
        tokenizer: Any = tokenizer_folders.load(run.tokenizer)
        own = templates.from_dict(run.read("template"), tokenizer)
        return run.path, tokenizer, own if name == "auto" else templates.choose(name, tokenizer)
    folder = locate(model, only=["tokenizer*", "*.json", "*.model", "*.jinja", "vocab*", "merges*"])
    tokenizer = tokenizer_folders.load(folder)
    return folder, tokenizer, templates.choose(name, tokenizer)


def _begins(tokenizer: Any, example: Example) -> tuple[str, int] | None:
    """The token that stands before every row, whoever puts it there: the template or the tokenizer."""
    bos = tokenizer.bos_token_id
    first = example.samples[0][0].ids[0] if example.samples else None
    return (str(tokenizer.bos_token), int(bos)) if bos is not None and first == bos else None


@dataclass(frozen=True)
class _Shown:
    """Makes examples."""

    tokenizer: Any
    encoder: Encoder

    def row(self, about: str, messages: Sequence[Message], tools: tuple[dict[str, Any], ...] = ()) -> Example:
        """A row of training."""
        return self._tried(about, lambda: self.encoder.samples(Conversation(tuple(messages), tools=tools)))

    def asked(self, about: str, messages: Sequence[Message]) -> Example:
        """A prompt: nothing of it is trained."""

        def made() -> list[Sample]:
            ids = np.array(self.encoder.prompt(messages), np.int32)
            return [Sample(ids, np.zeros(len(ids), bool))]

        return self._tried(about, made)

    def _tried(self, about: str, make: Callable[[], list[Sample]]) -> Example:
        try:
            return Example(about, [token_views(self.tokenizer, sample) for sample in make()])
        except FituneError as error:
            return Example(about, [], str(error).splitlines()[0])


def show(seen: TemplateView, console: Console) -> None:
    """In the terminal: green is trained, ▶ stands before an answer, numbers are token ids."""
    stops = ", ".join(f"{text} ({number})" for text, number in seen.stops)
    begins = "nothing" if seen.begins is None else "{} ({})".format(*seen.begins)
    for name, text in (("template", seen.name), ("rows begin with", begins), ("answers end with", stops)):
        console.print(f"{name:<17} {text}", markup=False, highlight=False, soft_wrap=True)
    for one in seen.examples:
        console.print(f"\n{one.about}", style="bold", markup=False, highlight=False)
        if one.refused:
            console.print(f"refused: {one.refused}", markup=False, highlight=False)
        for tokens in one.samples:
            console.print(coloured(tokens, ids=True))
