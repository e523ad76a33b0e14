"""The conversations that a chat template is tried on: each named, with what it needs of the template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fitune.core.records import Conversation, Message, ToolCall

LEAST = 10  # conversations that must be the same


def talk(*texts: str, system: str | None = None) -> Conversation:
    """A conversation of texts, by the user and the assistant in turns."""
    turns = [Message("assistant" if n % 2 else "user", text) for n, text in enumerate(texts)]
    return Conversation((*([Message("system", system)] if system is not None else []), *turns))


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city (城市).",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
# ids as Mistral's templates want them: nine letters and digits
_CALL = Message("assistant", "", tool_calls=(ToolCall("weather", '{"city": "巴黎", "days": 2}', "call00001"),))
_RESULT = Message("tool", '{"sky": "clear"}', call_id="call00001", name="weather")
_MUSED = Message("assistant", "It is 2.", thought="One and one.")
_ASKED = Message("user", "How is the weather in Paris?")
_CONTEXT = Message("user", "Translate into French.", context="Good morning, everyone.")

# Of what a template is tried on: name, what of KINDS is in it, the conversation. Those that end in an answer are
# compared whole, the others as prompts.
CONVERSATIONS: Sequence[tuple[str, frozenset[str], Conversation]] = (
    ("a question", frozenset(), talk("What is the capital of France?")),
    ("a word", frozenset(), talk("Hello")),
    ("a demand", frozenset(), talk("Write a short poem about the sea.")),
    ("Chinese", frozenset(), talk("今天天气怎么样？")),
    ("Chinese and English", frozenset(), talk("把 'good morning' 翻译成中文")),
    ("text that looks like control tokens", frozenset(), talk("Use <|foo|>, [BAR], {{ x }} and <b>bold</b> here")),
    ("a line break at the end", frozenset(), talk("A line of text\n")),
    ("code", frozenset(), talk("def f(x):\n    return x * 2\n\nprint(f(21))")),
    ("blanks, digits and pictures", frozenset(), talk("  12,345.67 EUR  and 3 more 🙂🎉")),
    ("quotation marks", frozenset(), talk("She said: 'It\\'s \"fine\"'...")),
    ("a list", frozenset(), talk("Sort:\n- b\n- a (1)\n- c;")),
    ("a question with its answer", frozenset({"turns"}), talk("1 + 1 = ?", "It is 2.")),
    ("an empty question", frozenset({"empty"}), talk("")),
    ("a context", frozenset({"context"}), Conversation((_CONTEXT,))),
    ("three turns", frozenset({"turns"}), talk("Hi there!", "Hello. How can I help you?", "Tell me a joke, please.")),
    ("five turns", frozenset({"turns"}), talk("1 + 1 = ?", "2", "And 2 + 2?", "It is 4.", "Thanks (really)!")),
    ("Chinese turns", frozenset({"turns"}), talk("你好", "你好！有什么可以帮你？", "请写一首诗。", "好的。")),
    ("a system text", frozenset({"system"}), talk("Who are you?", system="You are a terse assistant.")),
    ("a Chinese system text", frozenset({"system"}), talk("介绍一下你自己", system="你是一个有用的助手。")),
    ("a system text between turns", frozenset({"later"}), Conversation(
        (*talk("Hi", "Hello!").messages, Message("system", "Be brief."), Message("user", "Bye"))
    )),
    ("a system text and turns", frozenset({"system", "turns"}), talk("Hi", "Hello!", "Bye", system="Be brief.")),
    ("tools", frozenset({"tools"}), Conversation((_ASKED,), tools=(TOOL,))),
    ("a tool's result", frozenset({"tools", "turns"}), Conversation(
        (_ASKED, _CALL, _RESULT), tools=(TOOL,)
    )),
    ("text beside a call", frozenset({"tools", "turns"}), Conversation(
        (_ASKED, replace(_CALL, content="Let me see."), _RESULT), tools=(TOOL,)
    )),
    ("an answer with a thought", frozenset({"thoughts"}), Conversation((Message("user", "1 + 1 = ?"), _MUSED))),
    ("thoughts in the history", frozenset({"thoughts", "turns"}), Conversation(
        (Message("user", "1 + 1 = ?"), _MUSED, Message("user", "And 2 + 2?"))
    )),
)  # fmt: skip
# What people rarely write at the border to the template's own text, where it may become one token with that
EDGES = {
    "a line break at the beginning of a message": talk("\nA line of text"),
    "a blank at the beginning of a message": talk(" A line of text"),
    "a blank at the end of a message": talk("A line of text "),
    "empty lines at the end of a message": talk("A line of text\n\n"),
}
