"""Tokenizer folders to tokenizers, without remote code and without a question at the terminal.

In: a folder with tokenizer files: tokenizer.json, a sentencepiece *.model, or vocab.json + merges.txt. Out: a
transformers tokenizer whose special ids are known. tokenizer_config.json is read here, before any Auto class, so a
folder that names remote code is recognized at once: ChatGLM has a tokenizer of ours, others are refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fitune.core import quiet, untrusted
from fitune.core.errors import ModelError
from fitune.data.tokenizer import long
from fitune.data.tokenizer.interface import Tokenizer

EXPECTED = "tokenizer.json, a sentencepiece *.model, or vocab.json + merges.txt"


def load(folder: Path) -> Any:
    """The tokenizer of a model folder.

    Raises:
        ModelError: there is none, or it cannot be built.
    """
    folder = Path(folder)
    _check_files(folder)
    settings = read_json(folder / "tokenizer_config.json")
    if _is_chatglm(folder, settings):
        from fitune.data.tokenizer import chatglm

        tokenizer: Tokenizer = chatglm.load(folder, settings, read_json(folder / "config.json"))
    else:
        tokenizer = _from_transformers(folder, settings)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"{folder}: the tokenizer names no EOS token, so no answer could end",
            received="no eos_token",
            expected='"eos_token" in tokenizer_config.json',
            fix="add the model's own end-of-text token to tokenizer_config.json",
        )
    return tokenizer


def _check_files(folder: Path) -> None:
    if not folder.is_dir():
        raise ModelError(
            f"{folder}: no such folder",
            received=str(folder),
            expected=f"a folder with {EXPECTED}",
            fix="check the path",
        )
    bpe = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    if bpe or (folder / "tokenizer.json").is_file() or sentencepiece_file(folder):
        return
    raise ModelError(
        f"{folder}: no tokenizer files",
        received=", ".join(sorted(p.name for p in folder.iterdir())[:12]) or "an empty folder",
        expected=EXPECTED,
        fix=f"that of this run: {folder / 'tokenizer'}"
        if (folder / "tokenizer").is_dir()
        else "copy the tokenizer files of the model into its folder",
    )


def sentencepiece_file(folder: Path) -> Path | None:
    """The sentencepiece model of a folder; families name it differently."""
    return next(iter(sorted(folder.glob("*.model"))), None)


def read_json(path: Path) -> dict[str, object]:
    """A JSON object of the folder, empty where there is no such file.

    Raises:
        ModelError: the file is not a JSON object.
    """
    try:
        values: dict[str, Any] = untrusted.read_json(path)
    except FileNotFoundError:
        return {}
    return values


def _is_chatglm(folder: Path, settings: dict[str, object]) -> bool:
    """ChatGLM 1, 2 or 3: by the class that the folder names; where it names none, by the file or the model's type."""
    if (folder / "tokenizer.json").is_file() or sentencepiece_file(folder) is None:
        return False
    if "tokenizer_class" in settings:
        return str(settings["tokenizer_class"]).startswith("ChatGLM")
    model_type = read_json(folder / "config.json").get("model_type")
    return (folder / "ice_text.model").is_file() or model_type == "chatglm"


def _from_transformers(folder: Path, settings: dict[str, Any]) -> Any:
    """What transformers makes of the folder, or of its bare files where nothing names a class."""
    errors: list[Exception] = []
    for source, arguments in _readers(folder, settings):
        try:
            with quiet.without_panics():
                found = source.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True, **arguments)
                found("a b")  # some files fail at the first text only
        except Exception as error:  # transformers raises whatever its many readers raise
            errors.append(error)
            continue
        if "legacy" in settings:
            # transformers 5 does not save it, and without it the copy in a run folder splits text after </s> otherwise
            found.init_kwargs["legacy"] = settings["legacy"]
        return found
    raise _unreadable(folder, settings, errors[0]) from errors[0]


def _readers(folder: Path, settings: dict[str, Any]) -> list[tuple[Any, dict[str, Any]]]:
    """Classes that may read the folder, with their arguments, the likeliest first.

    AutoTokenizer is asked only where it has something to decide: importing it imports torch.
    """
    from transformers import GPT2TokenizerFast, LlamaTokenizerFast, PreTrainedTokenizerFast

    complete, has_model = (folder / "tokenizer.json").is_file(), (folder / "config.json").is_file()
    if complete and ("auto_map" in settings or not (settings or has_model)):
        # the file says it all; whatever code the folder names is not needed
        return [(PreTrainedTokenizerFast, {})]
    if settings and not has_model and (named := _named_class(settings, complete=complete)) is not None:
        return [(named, {})]
    if complete or settings:
        return [(_auto(), {})]
    found = sentencepiece_file(folder)
    plain = (GPT2TokenizerFast, {}) if found is None else (LlamaTokenizerFast, {"vocab_file": str(found)})
    # the model's config may name a class that these bare files are not for: another model's tokenizer
    return [(_auto(), {}), plain] if has_model else [plain]


def _auto() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer


def _named_class(settings: Mapping[str, object], *, complete: bool) -> Any:
    """The class of transformers that AutoTokenizer takes for a folder without a config.json.

    Args:
        settings: tokenizer_config.json.
        complete: is there a tokenizer.json?

    Returns:
        None where AutoTokenizer has more to look at: code in the folder, or the kind of a Llama's tokenizer.json.
    """
    import transformers

    name = str(settings.get("tokenizer_class", ""))
    if name in ("PreTrainedTokenizerFast", "TokenizersBackend") and "auto_map" not in settings:
        return transformers.PreTrainedTokenizerFast
    name = name.removesuffix("Fast")
    if not name or "auto_map" in settings or (complete and name == "LlamaTokenizer"):
        return None
    found = getattr(transformers, name, None)
    fast = isinstance(found, type) and issubclass(found, transformers.PreTrainedTokenizerFast)
    return found if fast else None


def _unreadable(folder: Path, settings: dict[str, object], error: Exception) -> ModelError:
    if "auto_map" in settings:
        return ModelError(
            f"{folder}: this tokenizer is Python code of the model's own, which fitune never runs",
            received=f"tokenizer_class {settings.get('tokenizer_class')!r} with auto_map",
            expected="a class of transformers, or ChatGLMTokenizer",
            fix="convert the tokenizer to a tokenizer.json and put that into the folder",
        )
    return ModelError(
        f"{folder}: the tokenizer cannot be read",
        received=" ".join(str(error).split())[:300],
        expected=EXPECTED,
        fix="copy the tokenizer files of the model again, tokenizer_config.json among them",
    )


def encode(tokenizer: Tokenizer, text: str, *, literal: bool, continued: bool = False) -> list[int]:
    """Ids of a piece of text.

    Args:
        tokenizer: whose ids.
        text: what is encoded.
        literal: a template's text, in which special tokens are parsed. In other text they stay text.
        continued: other text stands right before it, so the space that the tokenizer puts in front of a text has no
            place here. Only for tokenizers of which `opens_with_space` says yes.
    """
    if not text:
        return []
    if continued:
        # a line break is a token of its own, so what follows it in the ids is the text without the space in front
        front, whole = _ids(tokenizer, "\n", literal), _ids(tokenizer, "\n" + text, literal)
        if whole[: len(front)] == front:
            return whole[len(front) :]
    return _ids(tokenizer, text, literal)


def encode_many(tokenizer: Tokenizer, texts: Sequence[str], *, continued: bool = False) -> list[list[int]]:
    """`encode` of many texts that are no part of a template, in one call: fast tokenizers use all cores for it."""
    if not texts:
        return []
    if not continued:
        return _batch(tokenizer, texts)
    front, whole = _ids(tokenizer, "\n", literal=False), _batch(tokenizer, [f"\n{text}" for text in texts])
    return [
        ids[len(front) :] if ids[: len(front)] == front else encode(tokenizer, text, literal=False, continued=True)
        for text, ids in zip(texts, whole, strict=True)
    ]


def _batch(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text. Where the Rust tokenizer alone gives them, it is asked without the place of each token in
    its text: that takes a third of the time, and a long text takes three quarters of the memory."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        shortest = min(texts, key=len)[: long.AROUND]
        expected = _ids(tokenizer, shortest, literal=False)  # and the settings of the backend are those of this call
        if _bare(backend, [shortest]) == [expected]:
            if max(len(text) for text in texts) > long.LONG:
                joints = long.Joints(tokenizer.get_vocab())
                return [_in_parts(backend, text, joints) for text in texts]
            return _bare(backend, texts)
    found = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, return_attention_mask=False)
    return list(found["input_ids"])


def _bare(backend: Any, texts: Sequence[str]) -> list[list[int]]:
    return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def _in_parts(backend: Any, text: str, joints: long.Joints) -> list[int]:
    front = _bare(backend, ["\n"])[0]

    def first(part: str) -> list[int]:
        return _bare(backend, [part])[0]

    def later(part: str) -> list[int]:  # as in `encode`
        ids = first("\n" + part)
        return ids[len(front) :] if ids[: len(front)] == front else []

    return [one for ids in long.parts(text, joints, first, later) for one in ids]


def _ids(tokenizer: Tokenizer, text: str, literal: bool) -> list[int]:
    if literal:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def opens_with_space(tokenizer: Tokenizer) -> bool:
    """Does this tokenizer put a space of its own in front of each text, and should parts of a prompt do without?

    ChatGLM's own chat encodes the parts of a prompt as texts of their own, space and all, so it does not count.
    """
    first = tokenizer.convert_ids_to_tokens(_ids(tokenizer, "a", literal=False)[:1])
    return bool(first) and first[0].startswith("▁") and not hasattr(tokenizer, "family")


def adds_bos(tokenizer: Tokenizer) -> bool:
    """Does this tokenizer begin a text with BOS?"""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and bool(ids) and ids[0] == tokenizer.bos_token_id


def single_id(tokenizer: Tokenizer, token: str) -> int | None:
    """The id of a token that the vocabulary holds as one piece, or None."""
    found = tokenizer.convert_tokens_to_ids(token)
    if found is None or (found == tokenizer.unk_token_id and token != tokenizer.unk_token):
        return None
    return int(found)


@dataclass(frozen=True)
class Difference:
    """A text that the tokenizer in use splits otherwise than the sentencepiece file beside it."""

    text: str
    received: list[int]
    expected: list[int]


def parity(folder: Path, tokenizer: Tokenizer, texts: Iterable[str]) -> list[Difference]:
    """Where the tokenizer in use and the folder's sentencepiece file disagree.

    Pieces are compared, not ids: some families move the ids by a constant. No file, no differences.

    Raises:
        ModelError: the sentencepiece file cannot be read.
    """
    file = sentencepiece_file(Path(folder))
    if file is None or hasattr(tokenizer, "family"):  # ChatGLM's ids come from that very file
        return []
    reference = open_sentencepiece(file)
    found = []
    for text in texts:
        ids = _ids(tokenizer, text, literal=False)
        if tokenizer.convert_ids_to_tokens(ids) != reference.encode(text, out_type=str):
            found.append(Difference(text, ids, reference.encode(text)))
    return found


def open_sentencepiece(file: Path) -> Any:
    """A sentencepiece model.

    Raises:
        ModelError: it cannot be read.
    """
    untrusted.check_file(file, most=untrusted.MOST_JSON)
    try:
        there = file.stat()
        return _opened(file.resolve(), there.st_size, there.st_mtime_ns)
    except (OSError, RuntimeError) as error:
        raise ModelError(
            f"{file}: not a sentencepiece model",
            received=f"{file.stat().st_size if file.is_file() else 0:,} bytes",
            expected="the tokenizer file of the model",
            fix="download it again: a Git LFS pointer in place of the file is a few hundred bytes of text",
        ) from error


@lru_cache(maxsize=2)  # one tokenizer of a ChatGLM asks for it three times, and each time takes a third of a second
def _opened(file: Path, size: int, changed: int) -> Any:
    import sentencepiece

    found = sentencepiece.SentencePieceProcessor(model_proto=file.read_bytes())
    if not found.get_piece_size():  # an empty file is a model without pieces
        raise RuntimeError("no pieces")
    return found
