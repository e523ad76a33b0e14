"""Situations of the table in docs/templates.md: rows as users write them, and what a server is sent for the same.

In: nothing. Out: JSON rows in OpenAI's words, by the name of their situation. Arguments of calls stand as an object in
some and as text in others; ids of calls have the nine letters and digits that Mistral's templates want.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

Turn = dict[str, Any]
Row = dict[str, Any]

TOOL: Turn = {
    "type": "function",
    "function": {
        "name": "clock",
        "description": "The time.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "where"}}},
    },
}


def _turn(role: str, content: str | None, **more: Any) -> Turn:
    return {"role": role, "content": content, **more}


def _call(number: int, city: str, *, as_text: bool = False) -> Turn:
    given: Any = {"city": city}
    given = json.dumps(given) if as_text else given
    return {"id": f"call{number:05d}", "type": "function", "function": {"name": "clock", "arguments": given}}


def _result(number: int, text: str = "10:05") -> Turn:
    return _turn("tool", text, tool_call_id=f"call{number:05d}", name="clock")


SYSTEM, FRUIT, CHERRY = (
    _turn("system", "Be brief."),
    _turn("user", "Name a fruit."),
    _turn("assistant", "A cherry."),
)
MORE, LEMON = _turn("user", "And a yellow one?"), _turn("assistant", "A lemon.")
LAST, PLUM = _turn("user", "And a blue one?"), _turn("assistant", "A plum.")
ASKED, ROME, TIME = (
    _turn("user", "What is the time in Rome?"),
    _turn("assistant", "", tool_calls=[_call(1, "Rome")]),
    _turn("assistant", "It is five past ten."),
)
TEXT = _turn("assistant", None, tool_calls=[_call(1, "Rome", as_text=True)])
OSLO = _turn("assistant", "", tool_calls=[_call(2, "Oslo")])
BOTH = _turn("assistant", "", tool_calls=[_call(1, "Rome"), _call(2, "Oslo")])
MUSED = {"reasoning_content": "Fruits are sweet."}
TAGS = "<think>\nFruits are sweet.\n</think>\n\n"

# by theme: a table each
THEMES: Mapping[str, Mapping[str, list[Turn]]] = {
    "turns": {
        "one turn": [FRUIT, CHERRY],
        "several turns": [FRUIT, CHERRY, MORE, LEMON, LAST, PLUM],
        "a system text": [SYSTEM, FRUIT, CHERRY, MORE, LEMON],
        "a system text in the middle": [FRUIT, CHERRY, SYSTEM, MORE, LEMON],
        "two questions in a row": [_turn("user", "Well."), FRUIT, CHERRY],
        "two answers in a row": [FRUIT, CHERRY, LEMON],
        "an answer first": [_turn("assistant", "Hello."), FRUIT, CHERRY],
        "an answer of weight 0": [FRUIT, {**CHERRY, "weight": 0}, MORE, {**LEMON, "loss": True}],
    },
    "tools": {
        "tools, no call": [FRUIT, CHERRY],
        "a call and its result": [ASKED, ROME, _result(1), TIME],
        "arguments as text": [ASKED, TEXT, _result(1), TIME],
        "text and a call": [ASKED, {**ROME, "content": "Let me see."}, _result(1), TIME],
        "parallel calls": [ASKED, BOTH, _result(1), _result(2, "10:06"), TIME],
        "a call after a call": [ASKED, ROME, _result(1), OSLO, _result(2, "10:06"), TIME],
        "calls in the history": [SYSTEM, ASKED, ROME, _result(1), TIME, MORE, LEMON],
        "a thought before a call": [ASKED, {**ROME, **MUSED}, _result(1), {**TIME, **MUSED}],
    },
    "thoughts": {
        "in every answer": [FRUIT, {**CHERRY, **MUSED}, MORE, {**LEMON, **MUSED}],
        "in the last answer alone": [FRUIT, CHERRY, MORE, {**LEMON, **MUSED}],
        "in the first answer alone": [FRUIT, {**CHERRY, **MUSED}, MORE, LEMON],
        "in tags, in the text": [FRUIT, CHERRY, MORE, {**LEMON, "content": f"{TAGS}A lemon."}],
        "empty tags, in the text": [FRUIT, {**CHERRY, "content": "<think>\n\n</think>\n\nA cherry."}],
        "`</think>` in a question": [_turn("user", "What is </think> for?"), CHERRY],
        "`</think>` in an answer with a thought": [FRUIT, {**CHERRY, **MUSED, "content": "The tag </think> ends it."}],
        "`</think>` in an answer": [FRUIT, {**CHERRY, "content": "The tag </think> ends it."}],
    },
}


def row_of(theme: str, situation: str) -> Row:
    """The row of a situation, with its tools where it is about them."""
    row: Row = {"messages": THEMES[theme][situation]}
    return {**row, "tools": [TOOL]} if theme == "tools" else row


def sent(turn: Turn, *, arguments_as_text: bool) -> Turn:
    """A turn as a server gets it, and hands it to the template: without flags of training, arguments parsed.

    Args:
        turn: of a row.
        arguments_as_text: the template wants them so, and servers of its model leave them so.
    """
    out = {key: value for key, value in turn.items() if key not in ("weight", "loss")}
    out["content"] = out["content"] or ""
    if "reasoning_content" in out:  # a server hands it over by every name that templates know
        out |= {"reasoning": out["reasoning_content"], "thinking": out["reasoning_content"]}
    calls = []
    for call in out.get("tool_calls", ()):
        given = call["function"]["arguments"]
        values = json.loads(given) if isinstance(given, str) else given
        calls.append({**call, "function": {**call["function"], "arguments": values}})
        if arguments_as_text:
            calls[-1]["function"]["arguments"] = given if isinstance(given, str) else json.dumps(given)
    return {**out, "tool_calls": calls} if calls else out
