"""New tokens for a tokenizer: texts that become one id each.

In: a tokenizer, texts. Out: the same tokenizer with these tokens, and for each its id and the ids that its text had
before. What trains their rows in a model is models/methods/new_tokens.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fitune.core.errors import ConfigError
from fitune.data.tokenizer import encode, single_id, special
from fitune.data.tokenizer.interface import Tokenizer


@dataclass(frozen=True)
class NewToken:
    """A token, its id, and the ids that its text had before: their mean is where it starts."""

    text: str
    id: int
    pieces: tuple[int, ...]


def add_tokens(tokenizer: Tokenizer, texts: Sequence[str], answer_tokens: Sequence[str] = ()) -> list[NewToken]:
    """Give the tokenizer these tokens; those that it has already keep their ids.

    Args:
        tokenizer: of the model; it is changed.
        texts: the tokens.
        answer_tokens: special tokens that the vocabulary has already; only these may be among `texts` too.

    Raises:
        ConfigError: it cannot take new ones, or has one already as a special token.
    """
    _refuse_special(tokenizer, texts, answer_tokens)
    pieces = [tuple(encode(tokenizer, text, literal=False)) for text in texts]
    known = [single_id(tokenizer, text) for text in texts]
    new = [text for text, found in zip(texts, known, strict=True) if found is None]
    from tokenizers import AddedToken

    # not "special": they stand in the rows' own texts too, and are to be seen in answers
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in new])
    for text in texts:
        found = single_id(tokenizer, text)
        if text not in answer_tokens and (found is None or encode(tokenizer, text, literal=False) != [found]):
            raise ConfigError(
                f"new_tokens: this tokenizer cannot take {text!r}",
                received=type(tokenizer).__name__,
                expected="a tokenizer of transformers that parses added tokens",
                fix="leave new_tokens out",
            )
    return [NewToken(text, single_id(tokenizer, text) or 0, some) for text, some in zip(texts, pieces, strict=True)]


def _refuse_special(tokenizer: Tokenizer, texts: Sequence[str], answer_tokens: Sequence[str]) -> None:
    """Special tokens of the vocabulary are not new; to produce them takes another setting."""
    known = special.added(tokenizer)
    already = [text for text in texts if known.get(text) and text not in answer_tokens]
    if already:
        flags = " ".join(f'"{text}"' for text in already)
        raise ConfigError(
            f"new_tokens: {', '.join(map(repr, already))}: special tokens that the vocabulary has already",
            received=flags,
            expected="texts that are no special tokens yet",
            fix=f"--answer-tokens {flags} lets answers produce them; with --new-tokens beside it, it trains their rows",
        )
