"""A thought and an answer, separated while the text comes in.

In: pieces of what a model writes. Out: of each piece what belongs to the thought and what to the answer. Tags are kept
back until they are whole; white space around thought and answer belongs to neither.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fitune.data.templates import thoughts
from fitune.data.templates.thoughts import Tags
from fitune.engine.speech import beginning
from fitune.models.load import Tuned


class Thinking:
    """Separates one answer's thought from the rest.

    Args:
        tuned: the model.
        prompt: ids of the prompt: some prompts open the thought themselves.
    """

    def __init__(self, tuned: Tuned, prompt: Sequence[int]) -> None:
        opened = thoughts.opened(str(tuned.tokenizer.decode(list(prompt[-32:]))))
        self.tags: Tags | None = opened[0] if opened is not None else None
        self.inside = opened is not None
        self._answer: Callable[[str], str] = tuned.template.answer_text
        self._text = ""  # all of the part that goes on now
        self._shown = 0  # characters of it that were handed out
        self._begun = opened is not None  # it is clear whether a thought comes first

    def add(self, text: str) -> tuple[str, str]:
        """(thought, answer): what a piece of text adds to each."""
        self._text += text
        thought = ""
        if not self._begun and not self._begin():
            return "", ""
        if self.inside:
            assert self.tags is not None
            before, close, after = self._text.partition(self.tags.close)
            if not close:
                return self._until(before, beginning(before, self.tags.close)), ""
            thought = self._until(before.rstrip(), 0)
            self.inside, self._text, self._shown = False, after, 0
            self._answer = lambda text: text.lstrip()
        return thought, self._until(self._answer(self._text), 0)

    def end(self) -> tuple[str, str]:
        """What was kept back, at the end."""
        rest, self._begun = self._text[self._shown :] if self.inside or not self._begun else "", True
        return (rest.rstrip(), "") if self.inside else ("", rest)

    def _begin(self) -> bool:
        """Look whether the text begins with a thought; False: more of it is needed."""
        start = self._text.lstrip()
        for kind in thoughts.KINDS:
            if start.startswith(kind.open):
                self.tags, self.inside, self._begun = kind, True, True
                self._text = start.removeprefix(kind.open)
                return True
        if any(kind.open.startswith(start) for kind in thoughts.KINDS):
            return False
        self._begun = True
        return True

    def _until(self, text: str, held: int) -> str:
        """What is new of a part; a thought's white space at both ends is kept back."""
        if self.inside:
            text = text[: len(text) - held]
            skipped = len(text) - len(text.lstrip())
            self._shown = max(self._shown, skipped)
            text = text.rstrip()
        new = text[self._shown :]
        self._shown = max(self._shown, len(text))
        return new
