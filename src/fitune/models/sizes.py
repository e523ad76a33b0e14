"""Sizes in a transformers config, whatever a family calls them, and where its layers differ.

In: a config. Out: a number; of layers that differ the largest.
"""

from __future__ import annotations

from typing import Any


def largest(config: Any, name: str) -> Any:
    """A setting of a config, the largest of its layers' where they differ; None: it has none of that name."""
    try:
        found = getattr(config, name, None)
    except RuntimeError:  # transformers' for a setting that each layer has its own of
        found = [getattr(layer, name, None) for layer in config.per_layer_config]
    if isinstance(found, (list, tuple)):
        return max((one for one in found if one is not None), default=None)
    return found


def heads(config: Any) -> int:
    """Query heads; 0: no layer has attention."""
    return int(largest(config, "num_attention_heads") or 0)


def head_width(config: Any) -> int:
    """Width of a head of keys; 0: no layer has attention."""
    count = heads(config)
    return int(largest(config, "head_dim") or config.hidden_size // count) if count else 0


def key_width(config: Any) -> int:
    """Key heads x head width."""
    return int(largest(config, "num_key_value_heads") or heads(config)) * head_width(config)


def inner_width(config: Any) -> int:
    """Width inside an MLP."""
    found = (largest(config, name) for name in ("intermediate_size", "n_inner", "ffn_dim"))
    return int(next((size for size in found if size), 4 * config.hidden_size))
