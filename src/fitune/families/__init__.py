"""Model families: where the parts of an architecture are called what.

In: a config's model_type. Out: a Family. A new family is one file and one line in TABLE.
"""

from __future__ import annotations

from fitune.errors import ModelError, did_you_mean
from fitune.families import gpt2, llama, qwen2
from fitune.families.base import Family

TABLE: dict[str, Family] = {family.model_type: family for family in (llama.FAMILY, qwen2.FAMILY, gpt2.FAMILY)}

__all__ = ["TABLE", "Family", "find"]


def find(model_type: str) -> Family:
    """The family of a model_type.

    Raises:
        ModelError: there is none of that name.
    """
    if model_type not in TABLE:
        raise ModelError(f"model type {model_type!r} is not known to this version", fix=did_you_mean(model_type, TABLE))
    return TABLE[model_type]
