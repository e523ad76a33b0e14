"""What fitune asks of a tokenizer: the part of transformers' tokenizers that is used here, as a type.

In: nothing. Out: the protocol `Tokenizer`; tokenizers of transformers and those of ChatGLM fit it, so does a fake.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class AddedToken(Protocol):
    """An entry of the vocabulary that was added to its pieces."""

    content: str
    special: bool


class Tokenizer(Protocol):
    """Text to ids and back."""

    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    bos_token_id: int | None
    eos_token_id: int  # `load` refuses a folder without one
    pad_token_id: int | None
    unk_token_id: int | None
    chat_template: str | dict[str, str] | None
    special_tokens_map: Mapping[str, object]
    all_special_tokens: Sequence[str]
    init_kwargs: dict[str, object]  # as tokenizer_config.json has them

    @property
    def added_tokens_decoder(self) -> Mapping[int, AddedToken]:
        """Added tokens by their ids."""
        ...

    def __call__(self, text: str | list[str], **settings: bool) -> Mapping[str, Any]:
        """`input_ids` of a text, or of each of several."""
        ...

    def __len__(self) -> int: ...

    def decode(self, token_ids: Sequence[int], **settings: bool) -> object:
        """The text of ids."""
        ...

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> Any:
        """Names of ids."""
        ...

    def convert_tokens_to_ids(self, tokens: str) -> int | None:
        """The id of a name."""
        ...

    def get_vocab(self) -> Mapping[str, int]:
        """Every token by name."""
        ...

    def get_added_vocab(self) -> Mapping[str, int]:
        """The added tokens by name."""
        ...

    def add_tokens(self, new_tokens: Sequence[Any]) -> int:
        """Give the vocabulary more tokens."""
        ...

    def apply_chat_template(self, conversation: Sequence[Mapping[str, object]], **settings: Any) -> Any:
        """A conversation in the tokenizer's own template."""
        ...

    def save_pretrained(self, save_directory: str) -> object:
        """Write the tokenizer's files."""
        ...
