"""Does llama.cpp answer with an exported file as fitune's chat does: tokens, prompts, ends, logits, greedy ids.

In: a file, the draft of it, the tuned model. Out: what was compared and every difference, the first with its place. In
float32 two programs sum in another order, so their logits differ in the last digits, and where two tokens are equally
probable up to that, either may come first: such a place is named and counted apart, and only where the logits of both
programs differ by no more than the order of sums explains. Any other difference is a failure.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH, GGUFReader, Keys, TokenType
from numpy.typing import NDArray

from fitune.core.errors import FituneError, ModelError
from fitune.core.records import Conversation
from fitune.engine.generation import SIDE_BY_SIDE, most_probable
from fitune.models.configs import longest_row
from fitune.models.handover.conversations import CONVERSATIONS, talk
from fitune.models.handover.gguf import Draft
from fitune.models.handover.gguf.llamacpp import LlamaCpp
from fitune.models.handover.gguf.strings import CHINESE, CODE, ENGLISH, strings
from fitune.models.handover.gguf.vocabulary import INDENTED, MARKS, SPACE, Vocabulary, pieces
from fitune.models.handover.proof import rendered
from fitune.models.interfaces import causal_lm
from fitune.models.load import Tuned

PROMPTS, TOKENS, STRINGS = 200, 64, 10_000
NOISE = 1e-4  # of the largest logit: what another order of sums in float32 may change
TABLE = 5e-3  # the same where llama.cpp takes GELU from a table of float16
TEXT = (TokenType.NORMAL, TokenType.USER_DEFINED)
GELU = {
    MODEL_ARCH.GPT2, MODEL_ARCH.GPTNEOX, MODEL_ARCH.BLOOM, MODEL_ARCH.GEMMA, MODEL_ARCH.GEMMA2, MODEL_ARCH.GEMMA3,
    MODEL_ARCH.PHI2, MODEL_ARCH.STARCODER2,
}  # fmt: skip


@dataclass
class Compared:
    """What was compared. problems: differences; ties: places where two tokens are equally probable."""

    strings: int = 0
    strings_same: int = 0
    prompts: int = 0
    prompts_same: int = 0
    tokens: int = 0
    logits: float = 0.0  # the largest difference, relative to the largest logit
    problems: list[str] = field(default_factory=list)
    ties: list[str] = field(default_factory=list)
    known: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)

    def text(self) -> str:
        """In one line."""
        return (
            f"{self.prompts_same:,} of {self.prompts:,} prompts, {self.tokens:,} tokens equal; "
            f"{self.strings_same:,} of {self.strings:,} strings"
        )


@dataclass(frozen=True)
class Sizes:
    """How much is compared."""

    prompts: int = PROMPTS
    tokens: int = TOKENS
    strings: int = STRINGS


def compare(
    file: Path, draft: Draft, tuned: Tuned, sizes: Sizes | None = None, adapter: Path | None = None
) -> Compared:
    """Compare llama.cpp on a file with fitune's chat.

    Args:
        file: a GGUF in float32.
        draft: what it holds.
        tuned: the model that was exported, in float32 on the CPU.
        sizes: how much is compared.
        adapter: what is put on it.
    """
    sizes = sizes or Sizes()
    found = Compared(known=list(draft.vocabulary.exceptions))
    asked = questions(tuned, sizes, min(draft.context, longest_row(causal_lm(tuned.model).config)))
    longest = max((len(ids) for _, ids in asked), default=0)
    try:
        loaded = LlamaCpp(file, max(longest + sizes.tokens, 8), adapter)
    except ModelError as error:
        return replace(found, problems=[f"{error.what.partition(': ')[2]}: {error.received}"])
    with loaded as other:
        _strings(found, other, draft, tuned, sizes.strings)
        _ends(found, other, draft, tuned)
        same = _rendered_alike(found, other, file, tuned, asked)
        if same and not found.problems:
            _answers(found, other, draft, tuned, same, sizes.tokens)
    return found


def questions(tuned: Tuned, sizes: Sizes, room: int) -> list[tuple[Conversation, list[int]]]:
    """Conversations that the template takes, and their ids; short enough for the answers behind them.

    Args:
        tuned: whose template.
        sizes: how many conversations, and of how many tokens the answers are.
        room: tokens of the longest row.
    """
    made: list[tuple[Conversation, list[int]]] = []
    for one in _conversations():
        if len(made) == sizes.prompts:
            break
        try:
            ids = tuned.encoder.prompt(one.messages, one.tools)
        except FituneError:
            continue
        if len(ids) + sizes.tokens <= room:
            made.append((one, ids))
    return made


def _conversations() -> Iterator[Conversation]:
    """Those that a chat template is tried on, then questions of one and of several turns, some with a system text."""
    yield from (one for _, _, one in CONVERSATIONS if one.messages[-1].role != "assistant")
    asks = (
        "What is",
        "Explain",
        "Write a poem about",
        "Translate:",
        "How many",
        "为什么",
        "请介绍",
        "翻译",
        "Fix this:",
    )
    for n in range(4 * PROMPTS):
        parts = ENGLISH[n % len(ENGLISH) :][:3], CHINESE[n % len(CHINESE)], CODE[n % len(CODE)]
        text = f"{asks[n % len(asks)]} {' '.join(parts[0])} {parts[1] if n % 2 else parts[2]}{'?' if n % 3 else ''}"
        system = f"Be brief. {parts[1]}" if n % 5 == 4 else None
        yield talk(text, parts[1], f"{parts[2]} {n}", system=system) if n % 4 == 3 else talk(text, system=system)


def _strings(found: Compared, other: LlamaCpp, draft: Draft, tuned: Tuned, count: int) -> None:
    """Ids of texts, as transformers makes them."""
    tokenizer, vocabulary = tuned.tokenizer, draft.vocabulary
    control = [] if vocabulary.literal else [str(token) for token in tokenizer.all_special_tokens]
    taken = [vocabulary.tokens[n] for n in sorted(other.control()) if vocabulary.types[n] in TEXT]
    found.known += [f"{text!r} in a text: llama.cpp takes it for a control token, whatever it is" for text in taken]
    own = _pieces(found, other, tokenizer)
    texts = strings(2 * count, control, own, marks=MARKS not in vocabulary.exceptions)
    for text in [text for text in texts if not _known(text, vocabulary, taken, control)][:count]:
        received, expected = _both(text, other, draft, tokenizer, control)
        found.strings += 1
        found.strings_same += received == expected
        if received != expected and found.strings - found.strings_same == 1:
            found.problems.append(f"tokens of {text!r}: {_first(received, expected, tokenizer)}")
    if found.strings - found.strings_same > 1:
        found.problems.append(f"and of {found.strings - found.strings_same - 1:,} more texts")


def _known(text: str, vocabulary: Vocabulary, taken: Sequence[str], control: Sequence[str]) -> bool:
    """Is this text an exception that is said of the vocabulary?"""
    indented = text.startswith(" ") or any(f"{name} " in text for name in control)
    return any(name in text for name in taken) or (indented and INDENTED in vocabulary.exceptions)


def _both(
    text: str, other: LlamaCpp, draft: Draft, tokenizer: Any, control: Sequence[str]
) -> tuple[list[int], list[int]]:
    """A text's ids in llama.cpp and in transformers; where control tokens are named in it, they are not parsed in a
    second look, for what a user types must not become one."""
    vocabulary = draft.vocabulary
    if vocabulary.literal:
        return other.ids(text, parse=False, frame=False), list(tokenizer(text, add_special_tokens=False)["input_ids"])
    bos = [tokenizer.bos_token_id] if draft.metadata[Keys.Tokenizer.ADD_BOS] else []
    shown = f"{tokenizer.bos_token or tokenizer.eos_token}{text}" if vocabulary.inner else text
    expected = [*bos, *tokenizer(shown, add_special_tokens=False)["input_ids"]]
    received = other.ids(shown)
    named = any(name in text for name in control)
    if received != expected or vocabulary.inner or not named:
        return received, expected
    plain = list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
    return other.ids(text, parse=False, frame=False), plain


def _pieces(found: Compared, other: LlamaCpp, tokenizer: Any) -> list[str]:
    """What each token stands for must be the same; those of them that are text."""
    texts = []
    wrong = 0
    for n, piece in sorted(pieces(tokenizer).items()):
        if other.piece(n) != piece:
            wrong += 1
            if wrong == 1:
                found.problems.append(f"token {n}: stands for {other.piece(n)!r} for {piece!r}")
        text = piece.decode("utf-8", "ignore")
        if text and text == unicodedata.normalize("NFC", text) and SPACE not in text:
            texts.append(text)
    if wrong > 1:
        found.problems.append(f"and {wrong - 1:,} more tokens")
    return texts


def _first(received: Sequence[int], expected: Sequence[int], tokenizer: Any) -> str:
    """The first place where ids differ."""
    place = next((n for n, (a, b) in enumerate(zip(received, expected, strict=False)) if a != b), None)
    place = min(len(received), len(expected)) if place is None else place
    return f"at token {place} {_shown(received[place:], tokenizer)} for {_shown(expected[place:], tokenizer)}"


def _shown(ids: Sequence[int], tokenizer: Any) -> str:
    named = [f"{i} ({tokenizer.convert_ids_to_tokens(int(i))!r})" for i in ids[:2]]
    return ", ".join(named) + (", ..." if len(ids) > 2 else "") if named else "no more"


def _ends(found: Compared, other: LlamaCpp, draft: Draft, tuned: Tuned) -> None:
    """The tokens at which an answer ends: those of the chat; more only where llama.cpp knows them by their text."""
    ends, stops = other.ends(), set(tuned.encoder.stop_ids)
    if missing := sorted(stops - ends):
        found.problems.append(f"an answer would not end at {_shown(missing, tuned.tokenizer)}")
    written = {draft.metadata.get(key) for key in (Keys.Tokenizer.EOS_ID, Keys.Tokenizer.EOT_ID, Keys.Tokenizer.EOM_ID)}
    if more := sorted(ends - stops):
        names = _shown(more, tuned.tokenizer)
        by_file = "the base model's" if written & set(more) else "llama.cpp knows by their text"
        found.known.append(f"an answer ends at {names} too, which {by_file}")


def _rendered_alike(
    found: Compared, other: LlamaCpp, file: Path, tuned: Tuned, asked: Sequence[tuple[Conversation, list[int]]]
) -> list[list[int]]:
    """The prompts whose ids are the same by the file's chat template; without one all of them."""
    field_ = GGUFReader(file).get_field(Keys.Tokenizer.CHAT_TEMPLATE)
    if field_ is None:
        found.problems += [] if getattr(tuned.tokenizer, "chat_template", None) is None else ["no chat template in it"]
        found.known.append("no chat template in it: prompts were compared by their ids")
        return [ids for _, ids in asked]
    jinja = str(field_.contents())
    bos = tuned.tokenizer.bos_token
    same: list[list[int]] = []
    for conversation, ids in asked:
        text = rendered(jinja, tuned.tokenizer, conversation, tuned.encoder, tokenize=False)
        received = None if text is None else other.prompt(text, bos)
        if received == ids:
            same.append(ids)
        elif not any(problem.startswith("prompt") for problem in found.problems):
            shown = "the template fails" if received is None else _first(received, ids, tuned.tokenizer)
            found.problems.append(f"prompt {conversation.messages[-1].content[:40]!r}: {shown}")
    found.prompts = len(asked)
    return same


def _answers(
    found: Compared, other: LlamaCpp, draft: Draft, tuned: Tuned, prompts: Sequence[list[int]], tokens: int
) -> None:
    """Greedy ids and logits."""
    found.prompts = len(prompts)
    bound = TABLE if draft.architecture.arch in GELU else NOISE
    ours = [ids for start in range(0, len(prompts), SIDE_BY_SIDE) for ids in
            most_probable(tuned, prompts[start : start + SIDE_BY_SIDE], tokens)]  # fmt: skip
    for n, prompt, mine in zip(count(1), prompts, ours, strict=False):
        off = _off(_logits(tuned, prompt), other.logits(prompt))
        found.logits = max(found.logits, off)
        if not off <= bound:
            found.problems.append(
                f"prompt {n}: logits differ by {off:.1e} of the largest, {bound:.0e} at most expected"
            )
            return
        theirs = other.greedy(prompt, tokens)
        if theirs == mine:
            found.prompts_same += 1
            found.tokens += tokens
            continue
        if not _tie(found, other, tuned, (n, prompt, mine, theirs), bound):
            return


def _tie(
    found: Compared, other: LlamaCpp, tuned: Tuned, where: tuple[int, list[int], list[int], list[int]], bound: float
) -> bool:
    """Is the first difference of two answers a tie? It is noted as what it is."""
    n, prompt, mine, theirs = where
    place = next(k for k, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b)
    before = [*prompt, *mine[:place]]
    here, there = _logits(tuned, before), other.logits(before)
    off, a, b = _off(here, there), mine[place], theirs[place]
    tokens = tuned.tokenizer.convert_ids_to_tokens([a, b])
    text = (
        f"prompt {n}, token {place}: {b} ({tokens[1]!r}) for {a} ({tokens[0]!r}); their logits here {here[b]:.6f} and "
        f"{here[a]:.6f}, there {there[b]:.6f} and {there[a]:.6f}; all logits differ by {off:.1e} of the largest"
    )
    apart = float(abs(here[a] - here[b]) / np.abs(here).max())
    tie = off <= bound and apart <= 2 * bound  # each of the two may move by the bound
    found.tokens += place
    (found.ties if tie else found.problems).append(text)
    return tie


def rounded(file: Path, draft: Draft, tuned: Tuned, sizes: Sizes | None = None) -> str:
    """What the type of a file's numbers changes, measured: a line for the terminal.

    Args:
        file: a GGUF of any type.
        draft, tuned, sizes: as for `compare`.
    """
    sizes = sizes or Sizes()
    asked = questions(tuned, sizes, min(draft.context, longest_row(causal_lm(tuned.model).config)))
    same, largest = 0, 0.0
    with LlamaCpp(file, max(8, *(len(ids) for _, ids in asked))) as other:
        for _, ids in asked:
            here, there = _logits(tuned, ids), other.logits(ids)
            same += int(here.argmax() == there.argmax())
            largest = max(largest, _off(here, there))
    return f"next token the same behind {same:,} of {len(asked):,} prompts; logits differ by at most {largest:.1e}"


@torch.no_grad()
def _logits(tuned: Tuned, ids: Sequence[int]) -> NDArray[np.float32]:
    """(vocabulary,): of the token behind these."""
    found: NDArray[np.float32] = tuned.model(input_ids=torch.tensor([list(ids)])).logits[0, -1].float().numpy()
    return found


def _off(here: NDArray[np.float32], there: NDArray[np.float32]) -> float:
    size = min(len(here), len(there))
    return float(np.abs(here[:size] - there[:size]).max() / np.abs(here[:size]).max())
