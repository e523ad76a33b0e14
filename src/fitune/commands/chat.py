"""Talking to a run, in a terminal or through a pipe.

In: lines of text. Out: answers, streamed, with the template and the stop tokens that the run was trained with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fitune.core.records import Message
from fitune.engine.drawing import Sampling
from fitune.engine.generation import reply
from fitune.models.load import Tuned

HELP = "/reset forgets the conversation, /exit ends it (so does Ctrl-D)"


class Chat:
    """A conversation with its history.

    Example:
        >>> chat = Chat(fitune.load("runs/my-run"))
        >>> chat.say("你好")
    """

    def __init__(self, tuned: Tuned, sampling: Sampling | None = None, *, system: str = "", base: bool = False) -> None:
        self.tuned, self.sampling, self.system, self.base = tuned, sampling or Sampling(), system, base
        self.history: list[Message] = []

    def say(self, text: str, on_text: Callable[[str], None] | None = None) -> str:
        """The answer to the next turn; both are added to the history."""
        self.history.append(Message("user", text))
        system = [Message("system", self.system)] if self.system else []
        text, turn = reply(self.tuned, [*system, *self.history], self.sampling, on_text=on_text, base=self.base)
        self.history.append(turn)
        return text

    def reset(self) -> None:
        """Forget the conversation."""
        self.history.clear()


def talk(lines: Iterable[str], chat: Chat, compare: Chat | None, console: Console) -> None:
    """Answer line after line.

    Args:
        lines: what the user types, or what comes through a pipe.
        chat: the tuned model's conversation.
        compare: the base model's, shown beside it.
        console: where to.
    """
    for line in lines:
        text = line.strip()
        if not text:
            continue
        if text in ("/exit", "/quit"):
            return
        if text == "/help":
            console.print(HELP)
        elif text == "/reset":
            for one in (chat, compare):
                if one is not None:
                    one.reset()
            console.print("forgotten")
        elif compare is None:
            chat.say(
                text, on_text=lambda piece: console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
            )
            console.print()
        else:
            table = Table(show_lines=False)
            table.add_column("base", ratio=1, overflow="fold")
            table.add_column("tuned", ratio=1, overflow="fold")
            table.add_row(escape(compare.say(text)), escape(chat.say(text)))
            console.print(table)
