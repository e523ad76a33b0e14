"""The tables of docs/templates.md: every kind of template in every situation, as `served.judged` finds it.

In: nothing. Out: lines of Markdown. `python scripts/templates_table.py --write` puts them into both pages; a test fails
where a page says otherwise.
"""

# ruff: noqa: E501  (a table of texts)

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache

from support.served import Cell, judged
from support.served_kinds import KINDS
from support.served_rows import THEMES, row_of

SIGNS = {"same": "✓", "each": "✓ each", "behind": "✓ behind", "moved": "✓ moved", "pieces": "✓ pieces"}
TITLES = {
    "": {"turns": "Turns", "tools": "Tools", "thoughts": "Thoughts", "template": "template", "refused": "Refusals"},
    ".zh-CN": {"turns": "轮次", "tools": "工具", "thoughts": "思考", "template": "模板", "refused": "拒绝的消息"},
}

IN_CHINESE = {
    "one turn": "一轮", "several turns": "多轮", "a system text": "系统文本", "a system text in the middle": "中间的系统文本",
    "two questions in a row": "连续两个问题", "two answers in a row": "连续两个回答", "an answer first": "以回答开头",
    "an answer of weight 0": "权重为 0 的回答",
    "tools, no call": "有工具，无调用", "a call and its result": "调用与结果", "arguments as text": "参数为文本",
    "text and a call": "文本加调用", "parallel calls": "并行调用", "a call after a call": "连续调用",
    "calls in the history": "历史中的调用", "a thought before a call": "调用前的思考",
    "in every answer": "每个回答都有", "in the last answer alone": "只在最后一个回答", "in the first answer alone": "只在第一个回答",
    "in tags, in the text": "写在文本的标签里", "empty tags, in the text": "文本里的空标签",
    "`</think>` in a question": "问题中的 `</think>`",
    "`</think>` in an answer with a thought": "有思考的回答中的 `</think>`", "`</think>` in an answer": "回答中的 `</think>`",
}  # fmt: skip


@dataclass
class Refusals:
    """Messages of refusals, numbered in the order of the tables."""

    numbers: dict[str, int] = field(default_factory=dict)

    def number(self, message: str) -> int:
        """The number of a message: what it says, without the place of the row and what is done about it."""
        first, *more = (line.strip() for line in message.splitlines())
        what = first.partition(": ")[2] if ": " in first else first
        what = re.sub(r"^template '[\w-]+'", "template NAME", what)
        received = next((line for line in more if line.startswith("received: ")), "").removeprefix("received: ")
        quoted = f": {received.partition(': ')[2]}" if "refuses a conversation" in what else ""
        return self.numbers.setdefault(what + quoted, len(self.numbers) + 1)


def sign(cell: Cell, refusals: Refusals) -> str:
    """A cell as it stands in the page."""
    if cell.how == "refused":
        return f"✗ {refusals.number(cell.why)}"
    return SIGNS.get(cell.how, f"{cell.how}: {cell.why}")


@cache
def cells_of(theme: str, situation: str) -> Mapping[str, Cell]:
    """The cells of a situation, by kind."""
    return {name: judged(name, row_of(theme, situation)) for name in KINDS}


def cells() -> Mapping[tuple[str, str, str], Cell]:
    """Every cell: by theme, situation, kind."""
    return {
        (theme, situation, name): cell
        for theme, situations in THEMES.items()
        for situation in situations
        for name, cell in cells_of(theme, situation).items()
    }


def lines(found: Mapping[tuple[str, str, str], Cell], language: str) -> Iterator[str]:
    """The tables, and the messages of refusals."""
    title, refusals = TITLES[language], Refusals()
    for theme, situations in THEMES.items():
        yield f"### {title[theme]}"
        yield ""
        heads = [IN_CHINESE[one] if language else one for one in situations]
        yield f"| {title['template']} | " + " | ".join(heads) + " |"
        yield "|---|" + "---|" * len(situations)
        for name in KINDS:
            yield f"| {name} | " + " | ".join(sign(found[theme, one, name], refusals) for one in situations) + " |"
        yield ""
    yield f"### {title['refused']}"
    yield ""
    for message, number in refusals.numbers.items():
        yield f"{number}. {message}"
