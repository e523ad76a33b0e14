"""Model families: where the parts of an architecture are called what.

In: a model. Out: a Family. A new family is one file and one line in TABLE; what is not in it is found by its names.
"""

from __future__ import annotations

from typing import Any

from fitune.families import auto, bloom, chatglm, glm, gpt2, llama, qwen2
from fitune.families.base import Family

TABLE: dict[str, Family] = {
    family.model_type: family
    for family in (llama.FAMILY, qwen2.FAMILY, gpt2.FAMILY, glm.FAMILY, bloom.FAMILY, chatglm.FAMILY)
}

__all__ = ["TABLE", "Family", "of"]


def of(model: Any) -> Family:
    """The family of a causal LM.

    Raises:
        ModelError: it is not in the table, and its names do not show its parts.
    """
    return TABLE.get(model.config.model_type) or auto.find(model)
