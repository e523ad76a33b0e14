"""Which added tokens of a vocabulary a text may become, and which only a template may write.

In: a tokenizer, the names that a template's frame holds, the tokens that answers may name. Out: a text in parts, each
encoded apart, with ids between them. Special tokens in a text stay text (`tokenizer.encode` sees to that), but for two
kinds that its own rule has no place for:

    answer tokens     special tokens of the vocabulary that answers are to produce, by the user's own list; only in
                      answers, for what a user types must never become a control token
    disguised ones    tokens that mark turns though the vocabulary does not call them special: DeepSeek's <｜User｜>.
                      Every tokenizer makes one id of them, so a text is encoded in two parts where it holds one
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fitune.core.errors import Collector, ConfigError
from fitune.data.tokenizer import single_id
from fitune.data.tokenizer.interface import Tokenizer

# what marks a part of an answer: a template may write it into its prompt, yet answers have it in their own text
PART_OF_ANSWER = re.compile("think|thought|reason|tool", re.IGNORECASE)
# vocabularies also have runs of spaces and line breaks as added tokens: these are text wherever they stand
MARK = re.compile(r"[<\[{(].+[>\]})]")
MOST_NAMED = 12  # tokens that an error lists


def added(tokenizer: Tokenizer) -> dict[str, bool]:
    """Every added token by name, and whether it is special: whether decoding can leave it out."""
    found = {str(token): bool(token.special) for token in tokenizer.added_tokens_decoder.values()}
    return {name: special for name, special in found.items() if name}


def ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The special tokens by name, with their ids."""
    found = {name: single_id(tokenizer, name) for name, is_special in added(tokenizer).items() if is_special}
    return {name: one for name, one in found.items() if one is not None}


def control(tokenizer: Tokenizer, stops: Iterable[int], frame: str) -> set[str]:
    """Names of the tokens that begin or end texts, pad them, or mark whose turn it is.

    Args:
        tokenizer: whose tokens.
        stops: ids of the tokens that end an answer.
        frame: what a template writes around the texts of a conversation.
    """
    own = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    ends = {*map(str, filter(None, own)), *(str(tokenizer.convert_ids_to_tokens(i)) for i in stops)}
    marks = {name for name in added(tokenizer) if MARK.fullmatch(name) and not PART_OF_ANSWER.search(name)}
    return ends | {name for name in marks if name in frame}


@dataclass(frozen=True)
class Marks:
    """How the added tokens in a text are taken.

    Args:
        answers: tokens that answers may produce, with their ids.
        disguised: tokens of the template's frame that are not special, so that texts would become them.
    """

    answers: Mapping[str, int]
    disguised: Sequence[str] = ()

    def split(self, text: str, *, answer: bool) -> list[str | int]:
        """The text in parts that are encoded apart, and ids between them."""
        names = [*self.disguised, *(self.answers if answer else ())]
        if not any(name in text for name in names):
            return [text]
        longest_first = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
        parts: list[str | int] = []
        before = ""
        for n, part in enumerate(re.split(f"({longest_first})", text)):
            if n % 2 == 0:
                before += part
            elif part in self.disguised:  # cut behind its first character: the tokenizer does not see the name then
                parts.append(before + part[0])
                before = part[1:]
            else:
                parts += [before, self.answers[part]]
                before = ""
        return [part for part in (*parts, before) if part != ""]


def parsed(names: Mapping[str, int], text: str) -> list[str | int]:
    """A template's own text in parts, with ids of special tokens between them: for one that is encoded together with a
    user's text, in which special tokens stay text."""
    if not any(name in text for name in names):
        return [text]
    longest_first = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    parts = re.split(f"({longest_first})", text)
    return [names[part] if n % 2 else part for n, part in enumerate(parts) if part]


def marks(tokenizer: Tokenizer, answer_tokens: Sequence[str], control_tokens: Iterable[str]) -> Marks:
    """What a run's texts may become.

    Args:
        tokenizer: of the model.
        answer_tokens: what answers are to produce.
        control_tokens: what no text may become.

    Raises:
        ConfigError, Problems: answer tokens that are none of the vocabulary, or that must not stand in answers.
    """
    known, never = added(tokenizer), set(control_tokens)
    problems = Collector()
    for name in answer_tokens:
        error = _wrong(tokenizer, name, known, never)
        problems.problems += [error] if error else []
    problems.raise_any()
    disguised = sorted(name for name in never if known.get(name) is False)
    return Marks({name: single_id(tokenizer, name) or 0 for name in answer_tokens}, disguised)


def _wrong(tokenizer: Tokenizer, name: str, known: Mapping[str, bool], never: set[str]) -> ConfigError | None:
    """Why this cannot be an answer token."""
    others = [other for other, special in known.items() if special and other not in never]
    expected = ", ".join(others[:MOST_NAMED]) + (", ..." if len(others) > MOST_NAMED else "")
    expected = f"a special token that no turn is marked with: {expected}" if others else "this vocabulary has none"
    if name in never:
        return ConfigError(
            f"answer_tokens: {name!r} begins, ends or marks a turn: an answer that holds it would end in its middle",
            received=name,
            expected=expected,
            fix="leave it out: in the data it stays text",
        )
    if single_id(tokenizer, name) is None:
        return ConfigError(
            f"answer_tokens: {name!r} is no token of this vocabulary",
            received=name,
            expected=expected,
            fix=f'--new-tokens "{name}" adds it and trains its row',
        )
    if name not in known:
        return ConfigError(
            f"answer_tokens: {name!r} is an ordinary piece of this vocabulary, which texts become anyway",
            received=name,
            expected=expected,
            fix="leave it out",
        )
    return None


def readable(tokenizer: Tokenizer, ids: Sequence[int], keep: Iterable[int] = ()) -> str:
    """Text of ids without their special tokens, but for those that answers may name.

    Args:
        tokenizer: of the model.
        ids: what a model wrote.
        keep: ids of the answer tokens.
    """
    kept = set(keep)
    if not kept.intersection(ids):
        return str(tokenizer.decode(ids, skip_special_tokens=True))
    gone = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} - kept
    return str(tokenizer.decode([i for i in ids if i not in gone], skip_special_tokens=False))
