"""The catalog's shapes have the published number of parameters."""

from __future__ import annotations

import pytest

from fitune.core import catalog
from fitune.core.config import build
from fitune.core.errors import ModelError
from fitune.models import families, methods
from fitune.models.configs import config_of, without_weights

pytestmark = pytest.mark.unit

LISTED = (
    "llama-2-7b", "llama-3.1-8b", "llama-3.2-1b", "qwen2.5-7b", "qwen3-8b", "mistral-7b-v0.3", "gemma-2-9b", "phi-4",
    "glm-4-9b", "chatglm-6b", "chatglm2-6b", "chatglm3-6b", "bloom-7b1", "bloom-1b4-zh", "pythia-1.4b", "opt-6.7b",
    "gpt2", "qwen3-30b-a3b", "gpt-oss-20b",
)  # fmt: skip


@pytest.mark.parametrize("name", catalog.entries())
def test_a_shape_built_without_storage_has_the_published_parameters(name: str) -> None:
    entry = catalog.find(name)
    model = without_weights(config_of(entry.config))
    assert sum(p.numel() for p in model.parameters()) == entry.parameters
    assert all(p.is_meta for p in model.parameters())
    assert "/" in entry.id


def test_what_people_ask_for_is_there() -> None:
    assert set(LISTED) <= set(catalog.entries())
    assert catalog.find("Llama-3.2-1B").name == "llama-3.2-1b"
    with pytest.raises(ModelError, match=r"not in the catalog[\s\S]*did you mean 'qwen3-8b'"):
        catalog.find("qwen3-8bb")


def test_lora_counts_on_a_catalog_shape() -> None:
    """The published figure: rank 8 on queries and values of Llama-3.2-1B."""
    model = without_weights(config_of(catalog.find("llama-3.2-1b").config))
    config = build({"model": "m", "data": ["d"], "method": "lora"})
    assert methods.find("lora").count(model, families.of(model), config) == 851_968
