"""Model families: where the parts of an architecture are called what.

In: a model. Out: a Family. A new family is one file and one line in TABLE; what is not in it is found by its names.
"""

from __future__ import annotations

from fitune.models import attached
from fitune.models.families import (
    auto,
    bloom,
    chatglm,
    gemma2,
    gemma3,
    glm,
    glm4,
    gpt2,
    gpt_neox,
    llama,
    mistral,
    opt,
    phi3,
    qwen2,
    qwen3,
)
from fitune.models.family import Family
from fitune.models.interfaces import CausalLM

TABLE: dict[str, Family] = {
    module.FAMILY.model_type: module.FAMILY
    for module in (bloom, chatglm, gemma2, gemma3, glm, glm4, gpt2, gpt_neox, llama, mistral, opt, phi3, qwen2, qwen3)
}

__all__ = ["TABLE", "Family", "of"]


def of(model: CausalLM) -> Family:
    """The family of a causal LM. It is remembered, since a method put on it later hides its layers' names.

    Raises:
        ModelError: it is not in the table, and its names do not show its parts.
    """
    known = attached.of(model)
    if known.family is None:
        known.family = TABLE.get(model.config.model_type) or auto.find(model)
    return known.family
