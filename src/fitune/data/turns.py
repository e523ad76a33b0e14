"""Turns of a conversation: who speaks, what is said, thought and called, and how much the loss sees of it.

In: a list of turns in OpenAI's words (role, content), in ShareGPT's (from, value), in those of ms-swift, LLaMA-Factory,
axolotl, ChatGLM3 and firefly, or as pairs. Out: Messages. The tables below are the whole lists of names.
"""

from __future__ import annotations

import json
import math
import re
from contextlib import suppress
from dataclasses import replace
from typing import Any

from fitune.core.errors import shorten
from fitune.core.records import Message, Role
from fitune.data.calls import call_of, calls_of, name_of
from fitune.data.fields import FieldError, Turn, listed, missing, parsed

ROLES: dict[str, Role] = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool", "tool_response": "tool",
    "tool_result": "tool", "ipython": "tool",
    "系统": "system", "用户": "user", "助手": "assistant", "ai": "assistant", "prompter": "user",
}  # fmt: skip
CALLS = ("function_call", "tool_call", "tool_calls")  # roles whose text is a call as JSON
ROLE_KEYS, TEXT_KEYS = ("role", "from", "speaker"), ("content", "value", "text")
TURN = "[{role, content}, ...]"
TURN_IDS = {"name", "id", "tool_call_id"}  # tie results to calls
PAIRS = (  # a question and its answer in one object, or two texts in a list
    ("human", "assistant"), ("user", "assistant"), ("human", "bot"), ("human", "gpt"), ("question", "answer"),
    ("query", "response"), ("prompt", "response"), ("prompt", "completion"), ("instruction", "output"),
    ("input", "output"), ("q", "a"), ("输入", "输出"), ("问题", "回答"), ("问题", "答案"), ("问", "答"),
)  # fmt: skip
THOUGHTS = (  # keys; as a role, a turn before the answer
    "reasoning_content", "thinking", "reasoning", "thought", "cot", "CoT", "complex_cot", "Complex_CoT",
    "chain_of_thought", "reasoning_details",
)  # fmt: skip
# What of a turn is trained: OpenAI and Mistral say weight, ms-swift loss and loss_scale, LLaMA-Factory loss_weight,
# axolotl train and training. MASKS say the contrary.
FLAGS = ("train", "training", "trainable", "train_on_turn", "do_train", "calculate_loss", "compute_loss", "learn",
         "supervise", "supervised")  # fmt: skip
WEIGHTS = ("weight", "loss", "loss_weight", "loss_scale", "loss_mask", *FLAGS)
MASKS = ("mask", "masked")
SPANS = ("train_detail", "training_detail")  # axolotl's flags for parts of a turn
TURN_KEYS = {*ROLE_KEYS, *TEXT_KEYS, "tool_calls", "function_call", *THOUGHTS, *WEIGHTS, *MASKS}
CALLED_KEYS = {"parameters", "observation"}  # ChatGLM3's turn of a tool: what it was called with, what it gave back
MEDIA = ("image", "audio", "video", "file")  # how the types of parts that are no text begin
MEDIA_KEY = re.compile(  # names of keys and columns that hold pictures, sound or films, or say where they lie
    r"(input_?)?(image|img|picture|photo|audio|video)s?"
    r"(_?(path|file|file_?name|url|uri|bytes|base64|b64|data|array|values|features|tensor)s?)?|pixel_values(_\w+)?",
    re.IGNORECASE,
)
CHANNELS = ("analysis", "commentary", "final")  # of gpt-oss: a thought, a call, an answer
LEAVE_OUT = "leave such rows out with --skip-bad"
ONE_SYSTEM = f"join them in one, at the beginning, or {LEAVE_OUT}"


def ending_in_answer(messages: list[Message], where: str) -> list[Message]:
    """The messages, the last of which is an answer."""
    if messages[-1].role != "assistant":
        fix = f"end it with an answer, or {LEAVE_OUT}"
        raise FieldError(where, "no answer at the end", received=messages[-1].role, expected="assistant", fix=fix)
    return messages


def turns_of(value: object, where: str) -> list[Message]:
    """The messages of a list of turns; calls that follow each other are one answer."""
    turns = listed(value, where, TURN)
    if not turns:
        raise FieldError(where, "no list of turns", received=shorten(value), expected=TURN)
    if all(isinstance(turn, str) for turn in turns):  # question, answer, question, answer
        return [Message("assistant" if n % 2 else "user", text) for n, text in enumerate(turns)]
    messages: list[Message] = []
    thought = ""
    for n, turn in enumerate(turns):
        place = f"{where}[{n}]"
        if isinstance(turn, dict) and _is_thought(turn):
            thought = _lines(thought, _thought_alone(turn, turns[n + 1 :], place))
            continue
        for message in _turn(turn, place):
            message, thought = replace(message, thought=_lines(thought, message.thought)), ""
            if messages and _goes_on(messages[-1], message, turn):
                messages[-1] = _joined(messages[-1], message, place)
            else:
                messages.append(message)
    return messages


def _lines(*texts: str) -> str:
    return "\n".join(filter(None, texts))


def _channel(turn: Turn) -> str:
    """Where gpt-oss says it: one of CHANNELS, or ""."""
    channel = turn.get("channel")
    return channel if channel in CHANNELS and ROLES.get(_role(turn)[1]) in ("assistant", "tool") else ""


def _recipient(turn: Turn) -> str:
    """Which tool an answer of gpt-oss speaks to."""
    if not _channel(turn) or ROLES[_role(turn)[1]] != "assistant":
        return ""
    return name_of(turn, "recipient").removeprefix("functions.")


def _is_thought(turn: Turn) -> bool:
    if _channel(turn) == "analysis" and ROLES[_role(turn)[1]] == "assistant":
        return not _recipient(turn)
    return _role(turn)[1] in THOUGHTS


def _thought_alone(turn: Turn, after: list[Any], where: str) -> str:
    """A thought in a turn of its own: it belongs to the answer that follows."""
    role = _role(after[0])[1] if after and isinstance(after[0], dict) else ""
    if ROLES.get(role) != "assistant" and role not in CALLS:
        raise FieldError(
            where, "a thought without an answer after it", received=role or "the end", expected="assistant"
        )
    if _weight(turn, where) != 1:
        raise FieldError(
            where, "a thought with a weight of its own", received="not 1", expected="the weight at its answer"
        )
    key = next((key for key in (*TEXT_KEYS, "thinking") if turn.get(key)), "content")
    text, thought = _content(turn.get(key), f"{where}.{key}", required=True)
    return text or thought


def _text_key(turn: Turn) -> str:
    return next((key for key in TEXT_KEYS if turn.get(key) is not None), "value" if "value" in turn else "content")


def _goes_on(before: Message, message: Message, turn: object) -> bool:
    """A call in a turn of its own belongs to the answer before it."""
    alone = message.role == "assistant" and message.tool_calls and not message.content
    return bool(alone and before.role == "assistant" and isinstance(turn, dict) and _is_call(turn))


def _is_call(turn: Turn) -> bool:
    return _role(turn)[1] in CALLS or bool(turn.keys() & CALLED_KEYS) or bool(_recipient(turn))


def _joined(before: Message, message: Message, where: str) -> Message:
    if before.weight != message.weight and message.weight != 1:
        raise FieldError(
            where,
            "the calls of one answer have different weights",
            received=f"{before.weight:g} and {message.weight:g}",
            expected="one weight for the whole answer",
        )
    thought = _lines(before.thought, message.thought)
    return replace(before, tool_calls=(*before.tool_calls, *message.tool_calls), thought=thought)


def speaker(turn: Turn) -> str:
    """Whose turn it is; "" where nothing says so."""
    return ROLES.get(_role(turn)[1], "")


def _role(turn: Turn) -> tuple[str, str]:
    """The key that names the speaker, and the name in one spelling; "" where there is none."""
    key = next((key for key in ROLE_KEYS if turn.get(key) is not None), "from" if "from" in turn else "role")
    name = turn.get(key)
    return key, name.strip().lower().replace("-", "_").replace(" ", "_") if isinstance(name, str) else ""


def _turn(turn: object, where: str) -> list[Message]:
    """The messages of one turn: one, or a question with its answer, or a call with its result."""
    if isinstance(turn, list) and len(turn) == 2 and all(isinstance(part, str) for part in turn):
        if turn[0].strip().lower() in ROLES:  # [role, text], which is no question with its answer
            return _turn({"role": turn[0], "content": turn[1]}, where)
        return [Message("user", turn[0]), _said(turn[1], f"{where}[1]")]
    if not isinstance(turn, dict):
        raise FieldError(where, "not a turn", received=shorten(turn), expected="{role, content}")
    _no_media_beside(turn, where)
    role_key, role = _role(turn)
    if not role and (pair := pair_of(turn)):
        return _pair(turn, pair, where)
    key = _text_key(turn)
    if role in CALLS or _recipient(turn):
        said = turn.get(key) if role in CALLS else {"name": _recipient(turn), "arguments": turn.get(key)}
        calls = calls_of(parsed(said, f"{where}.{key}", '{"name": ..., "arguments": {...}}'), f"{where}.{key}")
        return [
            Message("assistant", "", tool_calls=calls, thought=thought_of(turn, where), weight=_weight(turn, where))
        ]
    if role not in ROLES:
        expected = ", ".join([*ROLES, *CALLS, *THOUGHTS])
        raise FieldError(f"{where}.{role_key}", "unknown role", received=shorten(turn.get(role_key)), expected=expected)
    if ROLES[role] == "tool":
        return _tool(turn, key, where)
    if _channel(turn) == "commentary":
        raise FieldError(
            f"{where}.channel", "commentary to nobody", received="commentary", expected="a recipient", fix=LEAVE_OUT
        )
    turn, results = _parts_of_calls(turn, key, ROLES[role], where)
    return results if results and not turn[key] else [*results, _message(turn, key, ROLES[role], where)]


def _no_media_beside(turn: Turn, where: str) -> None:
    """Refuse pictures, sound and films that stand in keys of their own."""
    for key, value in turn.items():
        if isinstance(key, str) and MEDIA_KEY.fullmatch(key) and value not in ("", [], {}) and not missing(value):
            raise no_media(f"{where}.{key}", value)


def _parts_of_calls(turn: Turn, key: str, role: Role, where: str) -> tuple[Turn, list[Message]]:
    """Anthropic's parts: calls in an answer go beside its text, results in a user's turn are turns before it."""
    parts = turn.get(key)
    if not isinstance(parts, list):
        return turn, []
    kinds = [part.get("type") if isinstance(part, dict) else None for part in parts]
    if role == "assistant" and "tool_use" in kinds:
        if turn.get("tool_calls") or turn.get("function_call"):
            raise FieldError(f"{where}.{key}", "calls in two places", received="tool_use", expected="one list of them")
        calls = [part for part, kind in zip(parts, kinds, strict=True) if kind == "tool_use"]
        rest = [part for part, kind in zip(parts, kinds, strict=True) if kind != "tool_use"]
        return {**turn, key: rest, "tool_calls": calls}, []
    if role == "user" and "tool_result" in kinds:
        count = kinds.count("tool_result")
        if "tool_result" in kinds[count:]:
            raise FieldError(
                f"{where}.{key}", "text before a tool's result", received=shorten(parts), expected="the results first"
            )
        results = []
        for n, part in enumerate(parts[:count]):
            content = part.get("content")
            text = "" if content is None else _content(content, f"{where}.{key}[{n}].content", required=True)[0]
            results.append(Message("tool", text, call_id=name_of(part, "tool_use_id")))
        return {**turn, key: parts[count:]}, results
    return turn, []


def _message(turn: Turn, key: str, role: Role, where: str) -> Message:
    """A turn of the system, the user or the assistant."""
    calls = turn.get("tool_calls") or turn.get("function_call")  # the second is OpenAI's older name
    calls = calls_of(parsed(calls, f"{where}.tool_calls", "a list of calls"), f"{where}.tool_calls") if calls else ()
    if role != "assistant" and calls:
        raise FieldError(f"{where}.tool_calls", "only an answer can call", received=role, expected="assistant")
    content, thought = _content(turn.get(key), f"{where}.{key}", required=not calls)
    if role != "assistant":
        return Message(role, content)
    if not calls:
        _said(content, f"{where}.{key}")
    thought = _lines(thought_of(turn, where), thought)
    return Message(role, content, tool_calls=calls, thought=thought, weight=_weight(turn, where))


def _said(text: str, where: str) -> Message:
    """An answer of text alone."""
    if not text.strip():
        raise FieldError(where, "the answer is empty", received=shorten(text), expected="some text to train on")
    return Message("assistant", text)


def pair_of(values: Turn) -> tuple[str, str] | None:
    """The keys of a question and its answer, where an object has both."""
    return next((pair for pair in PAIRS if pair[0] in values and pair[1] in values), None)


def unused_keys(turn: Turn) -> set[str]:
    """The keys of a turn that nothing is made of."""
    known = TURN_KEYS | TURN_IDS | (CALLED_KEYS if _is_call(turn) else set())
    known = known | ({"channel", "recipient"} if _channel(turn) else set())
    known = known | ({"tools"} if ROLES.get(_role(turn)[1]) == "system" else set())
    if not _role(turn)[1] and (pair := pair_of(turn)):
        known = known | set(pair)
    return turn.keys() - known


def _pair(turn: Turn, keys: tuple[str, str], where: str) -> list[Message]:
    asked, said = (turn[key] for key in keys)
    for key, text in zip(keys, (asked, said), strict=True):
        if not isinstance(text, str):
            raise FieldError(f"{where}.{key}", "not a text", received=shorten(text), expected="a string")
    answer = _said(said, f"{where}.{keys[1]}")
    return [Message("user", asked), replace(answer, thought=thought_of(turn, where), weight=_weight(turn, where))]


def _tool(turn: Turn, key: str, where: str) -> list[Message]:
    """What a tool gave back; in ChatGLM3's words with what it was called with."""
    if not turn.keys() & CALLED_KEYS:
        value = turn.get(key)
        if isinstance(value, dict):  # results are often objects, and go to the model as JSON
            value = json.dumps(value, ensure_ascii=False, default=str)
        text = _content(value, f"{where}.{key}", required=True)[0]
        return [Message("tool", text, call_id=name_of(turn, "tool_call_id"), name=name_of(turn, "name"))]
    call = call_of({"name": turn.get("name"), "arguments": turn.get("parameters")}, where)
    result = turn.get("observation")
    if not isinstance(result, str):
        result = json.dumps(result, ensure_ascii=False, default=str)
    weight = _weight(turn, where)
    return [Message("assistant", "", tool_calls=(call,), weight=weight), Message("tool", result, name=call.name)]


# ---- what a turn holds ----


def _content(value: object, where: str, *, required: bool) -> tuple[str, str]:
    """A turn's text and thought: a string, or OpenAI's list of parts. An answer that calls may have none."""
    if value is None and not required:
        return "", ""
    if isinstance(value, list):
        parts = [_part(part, f"{where}[{n}]") for n, part in enumerate(value)]
        return "".join(text for text, _ in parts), "\n".join(thought for _, thought in parts if thought)
    if not isinstance(value, str):
        raise FieldError(where, "not a text", received=shorten(value), expected="a string")
    return value, ""


def _part(part: object, where: str) -> tuple[str, str]:
    """Text and thought of a part."""
    kind = str(part.get("type", "text")) if isinstance(part, dict) else ""
    if any(name in kind for name in MEDIA):
        raise no_media(where, kind)
    if isinstance(part, dict) and kind in ("text", "input_text", "output_text"):
        text = next((part[key] for key in ("text", "value", "content") if isinstance(part.get(key), str)), None)
        if text is not None:
            return text, ""
    if isinstance(part, dict) and kind in THOUGHTS:
        keys = (kind, "text", "value", "content")
        text = next((part[key] for key in keys if isinstance(part.get(key), str)), None)
        if text is not None:
            return "", text
    raise FieldError(where, "not a part with text", received=shorten(part), expected='{"type": "text", "text": ...}')


def no_media(where: str, what: object) -> FieldError:
    """The error of a row with pictures, sound or films."""
    return FieldError(
        where,
        "pictures, sound and films cannot be trained",
        received=shorten(what),
        expected="a row of text alone",
        fix=LEAVE_OUT,
    )


def thought_of(turn: Turn, where: str = "") -> str:
    """What was thought before an answer, from a field of its own."""
    texts = []
    for key in THOUGHTS:
        value = turn.get(key)
        place = f"{where}.{key}" if where else key
        if isinstance(value, list):
            value = _lines(*_content(_plain_parts(value), place, required=True))
        if value is None or (isinstance(value, float) and math.isnan(value)):
            continue
        if not isinstance(value, str):
            raise FieldError(place, "a thought that is not a text", received=shorten(value), expected="a string")
        if value.strip() and value not in texts:  # some write it under two names
            texts.append(value)
    return "\n".join(texts)


def _plain_parts(parts: list[Any]) -> list[Any]:
    """OpenRouter's parts of a thought, {type: reasoning.text, text} or {type: reasoning.summary, summary}, as text."""
    found = []
    for part in parts:
        kind = part.get("type", "reasoning.") if isinstance(part, dict) else ""
        text = (
            next((part[key] for key in ("text", "summary") if isinstance(part.get(key), str)), None) if kind else part
        )
        plain = isinstance(text, str) and (not kind or str(kind).startswith("reasoning."))
        found.append({"type": "text", "text": text} if plain else part)
    return found


def _weight(turn: Turn, where: str) -> float:
    """How much of an answer the loss sees: the product of its flags."""
    for key in SPANS:
        if turn.get(key) is not None:
            raise FieldError(
                f"{where}.{key}",
                "parts of a turn have flags of their own, which are not known here",
                received=shorten(turn[key]),
                expected="one weight for the whole turn",
                fix=LEAVE_OUT,
            )
    return math.prod(weight_of(turn.get(key), key, f"{where}.{key}") for key in (*WEIGHTS, *MASKS))


def weight_of(value: object, name: str, where: str) -> float:
    """A flag as a weight of the loss: true is 1, false is 0, a number is itself; nothing is 1."""
    if value is None:
        return 1.0
    if isinstance(value, bool):
        return float(value is not (name in MASKS))
    if isinstance(value, str) and name not in MASKS:  # a number as text, as in cells of CSV
        with suppress(ValueError):
            value = float(value)
    number = value if isinstance(value, (int, float)) and math.isfinite(value) and value >= 0 else None
    if number is None or name in MASKS:  # a mask of 1 may mean either
        expected = "true or false" if name in MASKS else "true, false, or a number from 0 (context only) on"
        raise FieldError(where, "no weight of the loss", received=shorten(value), expected=expected)
    return float(number)
