"""ChatGLM's prompts by their published format, for the table of docs/templates.md: ids, as no text writes them.

In: messages as a server gets them. Out: ids, made with nothing of fitune: a sentencepiece vocabulary encodes the texts,
and the ids of commands stand between them.

    chatglm   question [gMASK] <sop> answer <eop>; with a history rounds from 0: [Round 0] \\n 问：... \\n 答：... \\n
    chatglm2  [gMASK] sop, rounds from 1 with two line breaks between the lines, answer </s>
    chatglm3  [gMASK] sop, then for each turn: the id of its role, a line with the name of the tool that is called
              (mostly empty), the text; line and text are encoded apart, and an answer ends at the next role's id or EOS

Versions 1 and 2 know questions and answers in turns and nothing else. A system text goes above the first round.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import sentencepiece

from fitune.data.tokenizer.chatglm import ChatGLM2Tokenizer, ChatGLMTokenizer
from support.served_rows import Turn

TEXT = ["A cherry. A lemon.", "Name a fruit: 问：答：", "[Round 0] What is the time in Rome?", "tool_call(city='Oslo')"]
FIRST = ("[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>")
THIRD = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
ABOVE_TOOLS = "Answer the following questions as best as you can. You have access to the following tools:"


@lru_cache
def make_tokenizer(name: str) -> Any:
    """fitune's tokenizer of a version, on a small vocabulary of its kind."""
    first = name == "chatglm"
    with tempfile.TemporaryDirectory() as folder:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXT * 8), model_prefix=f"{folder}/words", vocab_size=420, hard_vocab_limit=False,
            byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
            control_symbols=list(FIRST) if first else [], user_defined_symbols=["<n>"] if first else [],
            pad_id=3 if first else -1,
        )  # fmt: skip
        file = Path(folder) / "words.model"
        return ChatGLMTokenizer(file) if first else ChatGLM2Tokenizer(file, family=name)


@dataclass(frozen=True)
class Published:
    """A version's own format."""

    name: str
    model: Any
    tools: Sequence[Turn] = field(default=())

    def asked(self, history: Sequence[Turn]) -> list[int]:
        """The prompt of an answer."""
        if self.name == "chatglm3":
            return [*self._roles(history), self._id("<|assistant|>")]
        system, rounds = self._rounds(history)
        question = rounds.pop()[0] if rounds and rounds[-1][1] is None else ""  # nobody asks
        first, gap = (0, "\n") if self.name == "chatglm" else (1, "\n\n")
        text = "".join(f"[Round {n}]{gap}问：{q}{gap}答：{a or ''}{gap}" for n, (q, a) in enumerate(rounds, first))
        bare = self.name == "chatglm" and not rounds
        text += question if bare else f"[Round {len(rounds) + first}]{gap}问：{question}{gap}答："
        ids = self._encoded("".join(f"{one}{gap}" for one in system) + text)
        return [*ids, *self._start()] if self.name == "chatglm" else [*self._start(), *ids]

    def answered(self, messages: Sequence[Turn], stop: int | None) -> list[int]:
        """History and answer, up to the token that ends it."""
        end = [] if stop is None else [stop]
        if self.name == "chatglm3":
            return [*self._roles(messages), *end]
        return [*self.asked(messages[:-1]), *self._encoded(messages[-1]["content"] or ""), *end]

    def by_pieces(self, history: Sequence[Turn]) -> bool:
        """No: it is no text at all."""
        return False

    def _rounds(self, messages: Sequence[Turn]) -> tuple[list[str], list[tuple[str, str | None]]]:
        """System texts, and questions with their answers; None: no answer yet."""
        rounds: list[tuple[str, str | None]] = []
        for turn in messages:
            if turn["role"] == "user":
                rounds.append((turn["content"], None))
            elif turn["role"] == "assistant" and rounds and rounds[-1][1] is None:
                rounds[-1] = (rounds[-1][0], turn["content"])
            elif turn["role"] == "assistant":
                rounds.append(("", turn["content"]))
        return [turn["content"] for turn in messages if turn["role"] == "system"], rounds

    def _roles(self, messages: Sequence[Turn]) -> list[int]:
        """The turns of version 3."""
        turns = list(messages)
        if self.tools:
            if not turns or turns[0]["role"] != "system":
                turns.insert(0, {"role": "system", "content": ABOVE_TOOLS})
            listed = json.dumps([tool["function"] for tool in self.tools], indent=4, ensure_ascii=False)
            turns[0] = {**turns[0], "content": f"{turns[0]['content']}\n{listed}"}
        ids = self._start()
        for turn in turns:
            calls = turn.get("tool_calls", ())
            role = "observation" if turn["role"] == "tool" else turn["role"]
            if turn["content"] or not calls:
                ids += self._turn(role, "", turn["content"])
            for call in calls:
                name, given = call["function"]["name"], call["function"]["arguments"]
                values = json.loads(given) if isinstance(given, str) else given
                code = ", ".join(f"{key}='{value}'" for key, value in values.items())
                ids += self._turn("assistant", name, f"```python\ntool_call({code})\n```")
        return ids

    def _turn(self, role: str, line: str, text: str) -> list[int]:
        return [self._id(f"<|{role}|>"), *self._encoded(f"{line}\n"), *self._encoded(text)]

    def _start(self) -> list[int]:
        return [self._id("[gMASK]"), self._id("<sop>" if self.name == "chatglm" else "sop")]

    def _encoded(self, text: str) -> list[int]:
        """Version 1 has a piece of its own for a line break."""
        return list(self.model.encode(text.replace("\n", "<n>") if self.name == "chatglm" else text))

    def _id(self, command: str) -> int:
        """Version 1 has them among its pieces, 2 and 3 behind these, in this order."""
        if self.name == "chatglm":
            return int(self.model.piece_to_id(command))
        return int(self.model.get_piece_size()) + THIRD.index(command)
