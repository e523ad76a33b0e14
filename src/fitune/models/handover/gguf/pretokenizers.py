"""How text is cut before byte-level BPE: llama.cpp's kinds of pre-tokenizers, by what they do in a tokenizer.json.

In: the `pre_tokenizer` of a tokenizer.json. Out: llama.cpp's name for the same cuts. It has a fixed list of kinds, with
each kind's cuts written in C++, so a vocabulary that is cut otherwise cannot be written. Each row of KINDS is compared
with the tokenizers library, string by string (tests/models/test_gguf_vocabulary.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fitune.core.errors import ModelError

GPT2 = "gpt2"  # ByteLevel's own cuts
DIGITS = "digits"  # each digit apart
_SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD, _REST = r"[^\r\n\p{L}\p{N}]?\p{L}+", r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASES = r"[^\r\n\p{L}\p{N}]?"
_PATHS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"

QWEN2 = rf"{_SHORT}|{_WORD}|\p{{N}}|{_SIGNS}|{_REST}"
LLAMA3 = rf"{_SHORT}|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}|{_REST}"
QWEN35 = rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_REST}"
GPT4O = rf"{_CASES}{_UPPER}*{_LOWER}+{_SHORT}?|{_CASES}{_UPPER}+{_LOWER}*{_SHORT}?|\p{{N}}{{1,3}}|{_PATHS}|{_REST}"
TEKKEN = rf"{_CASES}{_UPPER}*{_LOWER}+|{_CASES}{_UPPER}+{_LOWER}*|\p{{N}}|{_PATHS}|{_REST}"
BLOOM = " ?[^(\\s|[.,!?…。，、।۔،])]+"
_ASIAN = "[一-龥぀-ゟ゠-ヿ]+"
_DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    rf"{_REST}"
).replace('\\"', '"')

# cuts, one after the other: llama.cpp's name where merges are followed always, and where a whole word that is in the
# vocabulary is taken as it is (`ignore_merges`); None: it has no such kind
KINDS: Mapping[tuple[str, ...], tuple[str | None, str | None]] = {
    (GPT2,): ("gpt-2", None),
    (DIGITS, GPT2): ("smollm", None),
    (QWEN2,): ("qwen2", None),
    (QWEN35,): ("qwen35", None),
    (LLAMA3,): ("dbrx", "llama-bpe"),
    (GPT4O,): ("gpt-4o", None),
    (TEKKEN,): (None, "tekken"),
    (r"\p{N}{1,3}", _ASIAN, _DEEPSEEK): ("deepseek-v3", None),
    (BLOOM,): ("bloom", None),
}

# kinds whose cuts are not quite the same in llama.cpp: it has letters for what are letters and the marks on them
WITHOUT_MARKS = {"gpt-4o", "tekken"}


def kind(tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's kind.

    Args:
        tokenizer: a tokenizer.json of byte-level BPE.

    Raises:
        ModelError: it has none that cuts as this one does.
    """
    cuts = tuple(_cuts(tokenizer.get("pre_tokenizer")))
    whole_words = bool(tokenizer["model"].get("ignore_merges"))
    found = KINDS.get(cuts, (None, None))[whole_words]
    if found is None:
        raise ModelError(
            "llama.cpp has no pre-tokenizer that cuts text as this vocabulary's does",
            received=f"{' then '.join(cuts) or 'no cuts'}{', ignore_merges' if whole_words else ''}",
            expected=f"the cuts of {', '.join(sorted(name for pair in KINDS.values() for name in pair if name))}",
            fix="serve the merged folder with transformers or vLLM: fitune merge RUN --output FOLDER",
        )
    return found


def _cuts(part: Mapping[str, Any] | None) -> Iterator[str]:
    """Each step as the regular expression by which it cuts, or a name of ours."""
    if part is None:
        return
    if part["type"] == "Sequence":
        for one in part["pretokenizers"]:
            yield from _cuts(one)
    elif part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
        pattern = part["pattern"]
        text = pattern.get("Regex") or pattern.get("String") or ""
        yield text.replace("\r", "\\r").replace("\n", "\\n")
    elif part["type"] == "Digits" and part["individual_digits"]:
        yield DIGITS
    elif part["type"] == "ByteLevel":
        if part["add_prefix_space"]:
            yield "a space in front of each text"
        if part.get("use_regex", True):
            yield GPT2
    else:
        yield f"{part['type']} {dict(part)}"
