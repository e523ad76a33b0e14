"""A tokenizer as a GGUF has it: tokens, their kinds, merges or scores, and how text is cut.

In: a tokenizer, the number of rows of the model's embedding. Out: a Vocabulary. llama.cpp has tokenizers of its own:

    gpt2            byte-level BPE, with one of its kinds of cuts (pretokenizers.py)
    llama           sentencepiece's BPE: pairs by the score of what they become, ▁ for a space
    gpt2/sarvam-moe BPE on plain text with bytes for unknown characters, also ▁ for a space; its only kind that follows
                    merges and falls back on bytes

What none of them can stand for is refused by name; texts that come out otherwise all the same are `exceptions`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gguf import Keys, TokenType
from transformers.convert_slow_tokenizer import bytes_to_unicode

from fitune.core.errors import ModelError
from fitune.data.tokenizer import adds_bos
from fitune.data.tokenizer.chatglm import ChatGLM2Tokenizer
from fitune.models.handover.gguf import pretokenizers

SPACE = "▁"
BYTE = re.compile(r"<0x([0-9A-F]{2})>")
NEVER = -1e9  # the score of what no pair becomes
NOT_NFC = (
    "text that is not in Unicode's NFC: transformers composes its characters first, llama.cpp takes them as they are"
)
MARKS = "words with combining marks (of Hindi, Thai, ...): llama.cpp cuts them apart, transformers does not"
INDENTED = "text that begins with a space: llama.cpp puts one more in front, as sentencepiece does, transformers none"
BARS = f"text with {SPACE} (U+2581) in it: llama.cpp takes it for a space"


@dataclass(frozen=True)
class Vocabulary:
    """What is written.

    Args:
        model: llama.cpp's tokenizer: gpt2 or llama.
        pre: its kind of cuts.
        tokens: by id, one for each row of the embedding.
        types: what each is.
        scores: for llama.
        merges: for gpt2.
        prefix: is a space put in front of a text that begins, or stands behind a control token?
        exceptions: texts that llama.cpp encodes otherwise, whatever is written.
        inner: are texts the same only behind a control token, as they stand in a conversation?
        literal: does no text yield a control token, whatever stands in it?
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    prefix: bool = False
    exceptions: list[str] = field(default_factory=list)
    inner: bool = False
    literal: bool = False

    def metadata(self) -> dict[str, Any]:
        """Keys and values."""
        found: dict[str, Any] = {
            Keys.Tokenizer.MODEL: self.model,
            Keys.Tokenizer.PRE: self.pre,
            Keys.Tokenizer.LIST: self.tokens,
            Keys.Tokenizer.TOKEN_TYPE: self.types,
        }
        if self.scores is not None:
            found[Keys.Tokenizer.SCORES] = self.scores
        if self.merges is not None:
            found[Keys.Tokenizer.MERGES] = self.merges
        return found | {Keys.Tokenizer.ADD_PREFIX: self.prefix}


def of(tokenizer: Any, rows: int) -> Vocabulary:
    """The vocabulary of a tokenizer.

    Args:
        tokenizer: of the model.
        rows: of its embedding.

    Raises:
        ModelError: llama.cpp has no tokenizer that makes the same ids.
    """
    if isinstance(tokenizer, ChatGLM2Tokenizer):
        return _published(tokenizer, rows)
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise _refused("it has no tokenizer.json", type(tokenizer).__name__)
    values = json.loads(tokenizer.backend_tokenizer.to_str())
    model = values["model"]
    if model["type"] != "BPE":
        raise _refused(f"its model is {model['type']}", f"{model['type']} in tokenizer.json")
    types = [str(part["type"]) for part in _parts(values.get("pre_tokenizer"), "pretokenizers")]
    if "ByteLevel" in types:
        made = _byte_level(values, rows)
    elif not model.get("byte_fallback"):
        raise _refused("it has neither bytes nor bytes for unknown characters", f"pre_tokenizer {types}")
    elif _metaspace(values) is not None:
        made = _sentencepiece(values, rows)
    else:
        made = _plain(values, tokenizer, rows)
    twice = len(made.tokens) - len(set(made.tokens))
    if twice:
        raise _refused("two of its tokens are the same text there", f"{twice} tokens")
    return made


def _refused(why: str, received: str) -> ModelError:
    return ModelError(
        f"llama.cpp has no tokenizer that makes the ids of this one: {why}",
        received=received,
        expected="byte-level BPE, or BPE with bytes for unknown characters",
        fix="serve the merged folder with transformers or vLLM: fitune merge RUN --output FOLDER",
    )


def _parts(part: Mapping[str, Any] | None, name: str) -> list[Mapping[str, Any]]:
    """The steps of a pre_tokenizer or a normalizer."""
    if part is None:
        return []
    return [one for inner in part[name] for one in _parts(inner, name)] if part["type"] == "Sequence" else [part]


def _pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Merges, in either of the forms in which they are written."""
    return [tuple(one) if isinstance(one, list) else tuple(one.split(" ", 1)) for one in model["merges"]]  # type: ignore[misc]  # pairs both ways


def _listed(values: Mapping[str, Any], rows: int, spaces: bool) -> tuple[list[str], list[int]]:
    """Tokens and their kinds by id; rows of the embedding that no token has are unused.

    Raises:
        ModelError: the tokenizer has more tokens than the embedding has rows.
    """
    tokens, types = [f"[PAD{n}]" for n in range(rows)], [int(TokenType.UNUSED)] * rows
    model = values["model"]
    most = max([*model["vocab"].values(), *(one["id"] for one in values["added_tokens"])])
    if most >= rows:
        raise ModelError(
            "the tokenizer has more tokens than the model's embedding has rows",
            received=f"id {most:,}, {rows:,} rows",
            fix="take the tokenizer and the weights of one model",
        )
    falls_back = bool(model.get("byte_fallback"))
    for text, n in model["vocab"].items():
        tokens[n] = text.replace(" ", SPACE) if spaces else text
        types[n] = int(TokenType.BYTE if falls_back and BYTE.fullmatch(text) else TokenType.NORMAL)
    for one in values["added_tokens"]:
        tokens[one["id"]] = one["content"]
        types[one["id"]] = int(TokenType.CONTROL if one["special"] else TokenType.USER_DEFINED)
    if falls_back and model.get("unk_token") in model["vocab"]:
        types[model["vocab"][model["unk_token"]]] = int(TokenType.UNKNOWN)
    return tokens, types


def _byte_level(values: Mapping[str, Any], rows: int) -> Vocabulary:
    normalizers = [str(part["type"]) for part in _parts(values.get("normalizer"), "normalizers")]
    if other := [kind for kind in normalizers if kind != "NFC"]:
        raise _refused("it changes text before it cuts it", f"normalizer {', '.join(other)}")
    tokens, types = _listed(values, rows, spaces=False)
    pre = pretokenizers.kind(values)
    return Vocabulary(
        model="gpt2",
        pre=pre,
        tokens=tokens,
        types=types,
        merges=[" ".join(pair) for pair in _pairs(values["model"])],
        exceptions=[NOT_NFC] * bool(normalizers) + [MARKS] * (pre in pretokenizers.WITHOUT_MARKS),
    )


def _metaspace(values: Mapping[str, Any]) -> str | None:
    """Where sentencepiece's ▁ is put in front of a text: always, first, never; None: it stands for no space at all.

    Raises:
        ModelError: steps that change a text in another way.
    """
    found: str | None = None
    for part in _parts(values.get("normalizer"), "normalizers"):
        if part["type"] == "Prepend" and part["prepend"] == SPACE:
            found = "always"
        elif part["type"] == "Replace" and part["content"] == SPACE and part["pattern"] == {"String": " "}:
            found = found or "never"
        else:
            raise _refused("it changes text before it cuts it", f"normalizer {part['type']}")
    for part in _parts(values.get("pre_tokenizer"), "pretokenizers"):
        if part["type"] == "Metaspace" and not part.get("split", True):
            found = str(part["prepend_scheme"])
        elif found is not None and not _idle(part):
            raise _refused("it cuts text where sentencepiece does not", f"pre_tokenizer {part['type']}")
    return found


def _idle(part: Mapping[str, Any]) -> bool:
    """A cut at spaces, after all of these have become ▁: Gemma's."""
    return bool(part["type"] == "Split" and part["pattern"] == {"String": " "})


def _sentencepiece(values: Mapping[str, Any], rows: int) -> Vocabulary:
    tokens, types = _listed(values, rows, spaces=False)
    _check_bytes(tokens)
    ids, scores = values["model"]["vocab"], [NEVER] * rows
    for rank, (left, right) in reversed(list(enumerate(_pairs(values["model"])))):
        scores[ids[left + right]] = float(-rank)
    where = _metaspace(values)
    return Vocabulary(
        model="llama",
        pre="default",
        tokens=tokens,
        types=types,
        scores=scores,
        prefix=where == "always",
        exceptions=[INDENTED] * (where == "always" and not _prepends(values)),
        inner=where == "first",
    )


def _prepends(values: Mapping[str, Any]) -> bool:
    """Is ▁ put in front of every text? Metaspace leaves out those that begin with a space."""
    return any(part["type"] == "Prepend" for part in _parts(values.get("normalizer"), "normalizers"))


def _published(tokenizer: Any, rows: int) -> Vocabulary:
    """ChatGLM2's and 3's, from its sentencepiece file, and the control tokens behind that."""
    model = tokenizer.model
    tokens, types = [f"[PAD{n}]" for n in range(rows)], [int(TokenType.UNUSED)] * rows
    scores = [NEVER] * rows
    for n in range(model.get_piece_size()):
        tokens[n], scores[n] = model.id_to_piece(n), model.get_score(n)
        types[n] = _kind(model, n)
    for name, n in tokenizer.commands.items():
        tokens[n], types[n] = name, int(TokenType.CONTROL)
    return Vocabulary("llama", "default", tokens, types, scores=scores, prefix=True, literal=True)


def _kind(model: Any, n: int) -> int:
    """What a piece of a sentencepiece file is."""
    for kind, is_it in (
        (TokenType.UNKNOWN, model.is_unknown), (TokenType.CONTROL, model.is_control),
        (TokenType.UNUSED, model.is_unused), (TokenType.BYTE, model.is_byte),
    ):  # fmt: skip
        if is_it(n):
            return int(kind)
    return int(TokenType.NORMAL)


def _check_bytes(tokens: Iterable[str]) -> None:
    missing = 256 - sum(1 for token in tokens if BYTE.fullmatch(token))
    if missing:
        raise _refused("bytes are missing among its tokens", f"{missing} of 256")


def _plain(values: Mapping[str, Any], tokenizer: Any, rows: int) -> Vocabulary:
    """BPE on plain text. llama.cpp cuts at line breaks alone, so no token may reach over a cut of the tokenizer's."""
    if values.get("normalizer") is not None:
        raise _refused("it changes text before it cuts it", f"normalizer {values['normalizer']['type']}")
    cut = tokenizer.backend_tokenizer.pre_tokenizer
    pairs = _pairs(values["model"])
    over = [left + right for left, right in pairs if _reaches_over(left + right, cut)]
    if over:
        raise _refused("llama.cpp would join what it cuts apart", f"tokens such as {over[:3]}")
    if any(SPACE in text for text in values["model"]["vocab"]):
        raise _refused(f"both a space and {SPACE} are in its tokens", SPACE)
    tokens, types = _listed(values, rows, spaces=True)
    _check_bytes(tokens)
    merges = [f"{left.replace(' ', SPACE)} {right.replace(' ', SPACE)}" for left, right in pairs]
    return Vocabulary("gpt2", "sarvam-moe", tokens, types, merges=merges, exceptions=[BARS])


def _reaches_over(text: str, cut: Any) -> bool:
    pieces = [text] if cut is None else [piece for piece, _ in cut.pre_tokenize_str(text)]
    return len(pieces) != 1 or ("\n" in text and text.strip("\n") != "")


def pieces(tokenizer: Any) -> dict[int, bytes]:
    """What each token stands for in an answer, as the tokenizer itself has it.

    Args:
        tokenizer: of transformers, with a tokenizer.json.
    """
    if isinstance(tokenizer, ChatGLM2Tokenizer):
        made = _published(tokenizer, tokenizer.vocab_size)
        texts = [
            text.replace(SPACE, " ") if made.types[n] == TokenType.NORMAL else text
            for n, text in enumerate(made.tokens)
        ]
        return {
            n: bytes([int(hit[1], 16)]) if (hit := BYTE.fullmatch(text)) else text.encode()
            for n, text in enumerate(texts)
        }
    values = json.loads(tokenizer.backend_tokenizer.to_str())
    bytes_of = {character: byte for byte, character in bytes_to_unicode().items()}
    parts = _parts(values.get("pre_tokenizer"), "pretokenizers")
    levels = any(part["type"] == "ByteLevel" for part in parts)
    spaces = not levels and _metaspace(values) is not None
    found = {}
    for text, n in values["model"]["vocab"].items():
        if levels:
            found[n] = bytes(bytes_of[character] for character in text) if set(text) <= set(bytes_of) else text.encode()
        elif match := BYTE.fullmatch(text):
            found[n] = bytes([int(match[1], 16)])
        else:
            found[n] = (text.replace(SPACE, " ") if spaces else text).encode()
    return found | {one["id"]: one["content"].encode() for one in values["added_tokens"]}


def special(tokenizer: Any, stops: Sequence[int], *, begins: bool) -> dict[str, Any]:
    """Ids of the tokens that begin, end and pad.

    Args:
        tokenizer: of the model.
        stops: the ids that end an answer, the trained one first: a file has places for three.
        begins: is BOS put in front of a text?
    """
    bos = tokenizer.bos_token_id
    found: dict[str, Any] = {Keys.Tokenizer.BOS_ID: stops[0] if bos is None else bos}
    places = (Keys.Tokenizer.EOS_ID, Keys.Tokenizer.EOT_ID, Keys.Tokenizer.EOM_ID)
    found |= dict(zip(places, stops, strict=False))
    for key, value in (
        (Keys.Tokenizer.UNK_ID, tokenizer.unk_token_id),
        (Keys.Tokenizer.PAD_ID, tokenizer.pad_token_id),
    ):
        found |= {key: value} if value is not None else {}
    return found | {Keys.Tokenizer.ADD_BOS: begins, Keys.Tokenizer.ADD_EOS: False}


def begins(tokenizer: Any, prompt: Sequence[int]) -> bool:
    """Is BOS put in front of a text: where the tokenizer does it, and the run's prompts have it."""
    return bool(adds_bos(tokenizer)) and list(prompt[:1]) == [tokenizer.bos_token_id]
