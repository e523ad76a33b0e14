"""The tokenizers of ChatGLM 1, 2 and 3, from their sentencepiece files: no code of the checkpoint is run.

In: a folder with ice_text.model (ChatGLM-6B) or tokenizer.model (ChatGLM2, ChatGLM3). Out: a transformers tokenizer
with the ids of the original. Text never yields a special id, whoever wrote it: templates append those by name.

ChatGLM2 and ChatGLM3 have the same file and the same ids; they differ in the prompt only, so `family` decides nothing
but the template that `auto` stands for.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizer

from fitune.core.errors import ModelError
from fitune.data.tokenizer import open_sentencepiece, sentencepiece_file

FAMILIES = ("chatglm", "chatglm2", "chatglm3")
# ChatGLM2/3: ids that follow the sentencepiece vocabulary, in this order
COMMANDS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
LONGEST_BLANK = 80  # ChatGLM-6B has pieces for 2 to 80 blanks in a row


def load(folder: Path, settings: dict[str, Any], config: dict[str, Any]) -> Any:
    """The tokenizer of a ChatGLM folder.

    Args:
        folder: holds the sentencepiece file.
        settings: its tokenizer_config.json.
        config: its config.json, which may be empty.

    Raises:
        ModelError: a vocabulary that is none of the three.
    """
    file = sentencepiece_file(folder) or folder / "tokenizer.model"
    model = open_sentencepiece(file)
    keep = {key: settings[key] for key in ("padding_side", "model_max_length") if key in settings}
    if model.piece_to_id("<eop>") != model.unk_id():
        if settings.get("num_image_tokens"):
            raise ModelError(
                f"{folder}: the old ChatGLM-6B vocabulary, with room for image tokens",
                received=f"num_image_tokens {settings['num_image_tokens']}",
                expected="num_image_tokens 0 (the checkpoint of April 2023 and later)",
                fix="use the newer checkpoint, of 130,528 ids",
            )
        return ChatGLMTokenizer(file, **keep)
    if model.get_piece_size() + len(COMMANDS) > 65024:
        raise ModelError(
            f"{file}: not the vocabulary of ChatGLM 1, 2 or 3",
            received=f"{model.get_piece_size():,} pieces",
            expected="64,789 pieces",
            fix="newer GLM models come with a tokenizer.json: put it into the folder",
        )
    made = ChatGLM2Tokenizer(file, family=_family(folder, settings, config), **keep)
    versions = named(settings, config) if settings.get("family") not in FAMILIES else {}
    made.contradiction = versions if len(set(versions.values())) > 1 else {}
    return made


def named(settings: dict[str, Any], config: dict[str, Any]) -> dict[str, str]:
    """Which of the two each file of a folder names: chatglm2 or chatglm3, by what it says where."""
    names = {
        "tokenizer_config.json": settings.get("name_or_path"),
        "config.json": config.get("_name_or_path") or config.get("name_or_path"),
    }
    found = {file: re.search(r"chatglm[-_]?([23])", str(name or "").lower()) for file, name in names.items()}
    return {f"{file} names {names[file]}": f"chatglm{hit[1]}" for file, hit in found.items() if hit}


def _family(folder: Path, settings: dict[str, object], config: dict[str, object]) -> str:
    """chatglm2 or chatglm3: whatever in the folder names it; unnamed, the older one."""
    if settings.get("family") in FAMILIES:
        return str(settings["family"])
    if by_files := named(settings, config):
        return next(iter(by_files.values()))
    if found := re.search(r"chatglm[-_]?([23])", folder.name.lower()):
        return f"chatglm{found[1]}"
    return "chatglm3" if "<|assistant|>" in str(settings) else "chatglm2"


class _SentencePieceTokenizer(PreTrainedTokenizer):
    """What the two vocabularies share: pieces by id, special ids that no text yields, the file kept on saving."""

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012  # transformers' own form
    file_name = "tokenizer.model"

    def __init__(self, vocab_file: str | Path, *, family: str, commands: dict[str, int], **kwargs: object) -> None:
        self.vocab_file, self.family, self.commands = Path(vocab_file), family, commands
        self.model = open_sentencepiece(self.vocab_file)
        self.names = {id_: name for name, id_ in commands.items()}
        for key in ("extra_special_tokens", "additional_special_tokens"):
            kwargs.pop(key, None)
        super().__init__(family=family, extra_special_tokens=list(commands), **kwargs)

    @property
    def vocab_size(self) -> int:
        """Pieces and special ids."""
        return max(int(self.model.get_piece_size()), max(self.commands.values()) + 1)

    def get_vocab(self) -> dict[str, int]:
        """Every token by name; a special id wins over a piece of the same name."""
        return {self.model.id_to_piece(n): n for n in range(self.model.get_piece_size())} | self.commands

    def before(self, text: str) -> str:
        """What happens to a text before sentencepiece sees it."""
        return text

    def after(self, text: str) -> str:
        """The way back."""
        return text

    def tokenize(self, text: str, **_: object) -> list[str]:
        """Pieces of a text; special tokens are never parsed."""
        return list(self.model.encode(self.before(text), out_type=str))

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """Ids of tokens by name."""
        if tokens is None:
            return None
        return (
            self._convert_token_to_id(tokens)
            if isinstance(tokens, str)
            else list(map(self._convert_token_to_id, tokens))
        )

    def _convert_token_to_id(self, token: str) -> int:
        return int(self.commands.get(token, self.model.piece_to_id(token)))

    def _convert_id_to_token(self, index: int) -> str:
        if index in self.names:
            return self.names[index]
        return str(self.model.id_to_piece(index)) if 0 <= index < self.model.get_piece_size() else ""

    def _decode(self, token_ids: Any, skip_special_tokens: bool = False, **_: Any) -> str:
        """Text of ids; ids of the padded vocabulary, which stand for nothing, are left out."""
        ids = [token_ids] if isinstance(token_ids, int) else [int(i) for i in token_ids]
        special = set(self.all_special_ids)
        text, run = "", []
        for id_ in [*ids, None]:
            if id_ is not None and id_ not in special:
                run += [id_] if id_ < self.model.get_piece_size() else []
                continue
            text += self.after(self.model.decode(run)) if run else ""
            run = []
            if id_ is not None and not skip_special_tokens:
                text += self._convert_id_to_token(id_)
        return text

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """The sentencepiece file, as it is."""
        target = Path(save_directory) / ((f"{filename_prefix}-" if filename_prefix else "") + self.file_name)
        if target.resolve() != self.vocab_file.resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)


class ChatGLMTokenizer(_SentencePieceTokenizer):
    """ChatGLM-6B. Line breaks, tabs and runs of blanks have pieces of their own: <n>, <|tab|>, <|blank_2|> ..."""

    file_name = "ice_text.model"
    vocab_files_names = {"vocab_file": "ice_text.model"}  # noqa: RUF012

    def __init__(self, vocab_file: str | Path, **kwargs: object) -> None:
        model = open_sentencepiece(Path(vocab_file))
        names = ("[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>")
        kwargs.pop("family", None)
        kwargs.setdefault("padding_side", "left")
        super().__init__(
            vocab_file,
            family="chatglm",
            commands={name: model.piece_to_id(name) for name in names},
            **{
                "bos_token": "<sop>",
                "eos_token": "<eop>",
                "pad_token": "<pad>",
                "unk_token": "<unk>",
                "mask_token": "[MASK]",
                **kwargs,
            },
        )

    def before(self, text: str) -> str:
        """Line breaks, tabs and runs of blanks as the names of their pieces; the longest runs first."""
        text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
        return re.sub(f" {{2,{LONGEST_BLANK}}}", lambda run: f"<|blank_{len(run[0])}|>", text)

    def after(self, text: str) -> str:
        """The names back to what they stand for."""
        text = text.replace("<n>", "\n").replace("<|tab|>", "\t")
        return re.sub(r"<\|blank_(\d+)\|>", lambda name: " " * int(name[1]), text)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Prompt [gMASK] <sop>, and with an answer: answer <eop>."""
        ids = [*token_ids_0, self.commands["[gMASK]"], self.commands["<sop>"]]
        return ids if token_ids_1 is None else [*ids, *token_ids_1, self.commands["<eop>"]]


class ChatGLM2Tokenizer(_SentencePieceTokenizer):
    """ChatGLM2 and ChatGLM3."""

    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012

    def __init__(self, vocab_file: str | Path, *, family: str = "chatglm2", **kwargs: object) -> None:
        size = open_sentencepiece(Path(vocab_file)).get_piece_size()
        kwargs.setdefault("padding_side", "left")
        super().__init__(
            vocab_file,
            family=family,
            commands={name: size + n for n, name in enumerate(COMMANDS)},
            **{"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>", "unk_token": "<unk>", **kwargs},
        )

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """[gMASK] sop prompt, and with an answer: answer </s>."""
        ids = [self.commands["[gMASK]"], self.commands["sop"], *token_ids_0]
        return ids if token_ids_1 is None else [*ids, *token_ids_1, int(self.eos_token_id)]
