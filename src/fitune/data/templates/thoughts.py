"""Thoughts: the text that a model writes for itself before its answer, between tags of its family.

In: an answer as text. Out: its thought and the answer proper; and what must stand behind a prompt that has opened a
thought already (R1 kinds end theirs in `<think>` and a line break).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from fitune.data.templates.marks import unmarked


@dataclass(frozen=True)
class Tags:
    """What stands around a thought."""

    open: str
    close: str
    bare: bool = False  # no line breaks beside them
    gap: str = "\n\n"  # between the closing one and the answer, in most templates


@dataclass(frozen=True)
class Style:
    """How a family writes a thought: its tags, and what stands behind the opening one, before the closing one and
    between that and the answer."""

    tags: Tags
    before: str = "\n"
    after: str = "\n"
    gap: str = "\n\n"
    seen: bool = False  # in a rendering; else as most write it

    def written(self, thought: str, answer: str) -> str:
        """A thought before its answer."""
        return f"{self.tags.open}{self.before}{self.closed(thought, answer)}"

    def closed(self, thought: str, answer: str) -> str:
        """The same behind a prompt that ends in the opening tag."""
        return f"{thought}{self.after}{self.tags.close}{self.gap}{answer}"


# Qwen3, QwQ, DeepSeek-R1, GLM-4.5 and most others; Seed-OSS; Magistral; older ones; Command A; Gemma 4; MiniCPM3
KINDS = (
    Tags("<think>", "</think>"),
    Tags("<seed:think>", "</seed:think>"),
    Tags("[THINK]", "[/THINK]"),
    Tags("<thinking>", "</thinking>"),
    Tags("<|START_THINKING|>", "<|END_THINKING|>", bare=True),
    Tags("<|channel>thought", "<channel|>", gap=""),
    Tags("<|thought_start|>", "<|thought_end|>", gap="\n"),
)
_TAGS = re.compile("|".join(re.escape(tag) for kind in KINDS for tag in (kind.open, kind.close)))


def tags_in(text: str) -> Tags | None:
    """The kind whose tags a text holds; the closing one is enough, where the prompt holds the other."""
    return next((kind for kind in KINDS if kind.close in text), None)


def pieces(text: str) -> list[str]:
    """A text cut at the tags of thoughts: every second piece is a tag."""
    found: list[str] = []
    at = 0
    for tag in _TAGS.finditer(text):
        found += [text[at : tag.start()], tag[0]]
        at = tag.end()
    return [*found, text[at:]]


def split(text: str) -> tuple[str, str]:
    """(thought, answer) of what a model wrote; the opening tag may be missing, because the prompt had it."""
    kind = tags_in(text)
    if kind is None:
        return "", text
    before, _, after = text.partition(kind.close)
    return before.rpartition(kind.open)[2].strip(), after.strip()


def written_apart(content: str, *, opened: bool) -> tuple[str, str]:
    """(thought, answer) of an answer that somebody wrote.

    A closing tag ends a thought where the text begins with the opening one, where the prompt has opened the thought, or
    where it stands at the end or the beginning of a line; in the middle of one it is a text about tags.

    Args:
        content: of the answer.
        opened: has the prompt opened a thought.
    """
    kind = tags_in(content)
    if kind is None:
        return "", content
    before, _, after = content.partition(kind.close)
    alone = kind.open not in before and (before[-1:] in ("", "\n") or after[:1] in ("", "\n"))
    if not (opened or alone or before.lstrip().startswith(kind.open)):
        return "", content
    return split(content)[0], answer_of(content)


def usual(kind: Tags) -> Style:
    """How most templates with these tags write a thought."""
    return Style(kind, "", "", "") if kind.bare else Style(kind, gap=kind.gap)


def written(thought: str, answer: str, kind: Tags) -> str:
    """A thought before its answer, as the models of this family write it."""
    return usual(kind).written(thought, answer)


def opened(prompt: str) -> tuple[Tags, bool] | None:
    """The tags of the thought that a prompt ends in the middle of, and whether a line break follows the opening."""
    for kind in KINDS:
        _, found, after = prompt.rpartition(kind.open)
        if found and not after.strip():
            return kind, "\n" in after
    return None


def closed(prompt: str) -> bool:
    """Does a prompt end in a closed thought: the answer is to be without one?"""
    return any(prompt.rstrip().endswith(kind.close) for kind in KINDS)


def style_in(text: str, thought: str, answer: str) -> Style | None:
    """How a template wrote a thought, or an empty one, right before an answer."""
    for kind in KINDS:
        begin, end = re.escape(kind.open), re.escape(kind.close)
        if found := re.search(rf"{begin}(\s*){re.escape(thought)}(\s*){end}(\s*)", text):
            return Style(kind, found[1], found[2], found[3], seen=True)
        if found := re.search(rf"{begin}(\s*){end}(\s*){re.escape(answer)}", text):
            line = "\n" if "\n" in found[1] else ""
            return Style(kind, line, line, found[2], seen=True)
        if found := re.search(rf"{end}(\s*){re.escape(answer)}", text):  # a closing tag alone: DeepSeek-V3.1
            return Style(kind, "", "", found[1], seen=True)
    return None


def squeezed(text: str) -> str:
    """Without marks and blanks."""
    return "".join(unmarked(text).split())


def answer_of(content: str) -> str:
    """What stands behind the thought in a text, with the indentation of its first line."""
    kind = tags_in(content)
    if kind is None:
        return content
    after = content.partition(kind.close)[2]
    blanks = after[: len(after) - len(after.lstrip())]
    return after[blanks.rfind("\n") + 1 :] if "\n" in blanks else after.lstrip()


@dataclass(frozen=True)
class Block:
    """A thought as it stands in a text: with its opening tag or without, and what was thought."""

    kind: Tags
    opened: bool
    body: str


def peeled(text: str, thought: str) -> tuple[list[Block], str]:
    """The blocks that a text begins with, empty ones and those of this thought, and what stands behind them."""
    found: list[Block] = []
    while (tag := _TAGS.search(text)) is not None:
        kind = next(kind for kind in KINDS if tag[0] in (kind.open, kind.close))
        before, opens = text[: tag.start()], tag[0] == kind.open
        end = text.find(kind.close, tag.start())
        body = text[tag.end() : end] if opens else before
        if end < 0 or (opens and before.strip()) or squeezed(body) not in ("", squeezed(thought)):
            break
        found.append(Block(kind, opens, body))
        text = text[end + len(kind.close) :]
    return found, text


def behind(prompt: str, text: str, thought: str, answer: str, style: Style) -> str:
    """What stands behind a prompt: the answer behind its thought, which is there once, as its family writes it.

    Where the prompt has opened a thought and the row has none, it is closed at once: a model whose answer stood in the
    open thought would be read, by whoever serves it, as thinking and never answering.

    Args:
        prompt: may end in an opening tag, or in a closed thought.
        text: the template's rendering of the answer.
        thought: the row's, empty where it has none.
        answer: the row's, without its thought.
        style: how the family writes a thought.
    """
    blocks, rest = peeled(text, thought)
    full = [block for block in blocks if squeezed(block.body)]
    said = _said(rest, answer)
    if closed(prompt):
        return said if blocks else text
    if found := opened(prompt):
        return _in_open(found, text, thought, answer, style)
    if full and (len(blocks) == 1 or not full[-1].opened):  # a closing tag alone is text where nothing was opened
        return text
    if (not thought and len(blocks) < 2) or (not full and written_in(text, thought, answer)):
        return text
    return style.written(thought, said)


def _in_open(found: tuple[Tags, bool], text: str, thought: str, answer: str, style: Style) -> str:
    """What stands behind a prompt that has opened a thought."""
    kind, line = found
    if style.tags != kind:
        style = usual(kind)
    if not style.seen and not line:  # behind a bare "<think>" the block ends right after the text
        style = replace(style, after="")
    blocks, rest = peeled(text, thought)
    said = _said(rest, answer)
    full = [block for block in blocks if squeezed(block.body) and block.kind == kind]
    if full:  # the template wrote it, or the row did
        body = full[-1].body.lstrip("\n") if full[-1].opened else full[-1].body
        return f"{body}{kind.close}{rest}"
    if blocks and thought:
        return style.closed(thought, said) if style.seen else f"{thought}{style.after}{kind.close}{rest}"
    if blocks and not thought and style.seen:
        return style.closed("", said)
    if blocks:
        body = blocks[-1].body.removeprefix("\n") if blocks[-1].opened and line else blocks[-1].body
        return f"{body}{kind.close}{rest}"
    return text if written_in(text, thought, answer) else style.closed(thought, said)


def written_in(text: str, thought: str, answer: str) -> bool:
    """Does a rendering hold the thought, beside what the answer itself says?"""
    wanted = squeezed(thought)
    return bool(wanted) and squeezed(text).count(wanted) > squeezed(answer).count(wanted)


def _said(rest: str, answer: str) -> str:
    """The answer without the template's blanks before it, but with its own where the template has kept them."""
    own = answer[: len(answer) - len(answer.lstrip())]
    blanks = rest[: len(rest) - len(rest.lstrip())]
    return (own if blanks.endswith(own) else "") + rest.lstrip()
