"""Methods: each one a file, found by the name that users type.

In: a method's name. Out: a Method, which attaches trainable parameters to a model and says what it trains.
"""

from __future__ import annotations

from fitune.core.errors import ConfigError, did_you_mean
from fitune.models.methods import adapter, bitfit, freeze, full, ia3, lora, other, p_tuning, prefix, prompt, tail
from fitune.models.methods.base import Method, Quantized

TABLE: dict[str, Method] = {
    module.METHOD.name: module.METHOD
    for module in (full, freeze, tail, bitfit, prompt, p_tuning, prefix, adapter, lora, ia3)
}

__all__ = ["TABLE", "Method", "Quantized", "find"]


def find(name: str) -> Method:
    """The method of that name.

    Raises:
        ConfigError: there is none.
    """
    if name.startswith(other.START):
        return other.find(name)
    if name not in TABLE:
        raise ConfigError(f"unknown method {name!r}", fix=did_you_mean(name, [*TABLE, f"{other.START}TYPE"]))
    return TABLE[name]
