"""Ways of tuning: each one a file, found by the name that users type.

In: a method's name. Out: a Method, which attaches trainable parameters to a model and says what it trains.
"""

from __future__ import annotations

from fitune.errors import ConfigError, did_you_mean
from fitune.methods import lora
from fitune.methods.base import Method

TABLE: dict[str, Method] = {method.name: method for method in (lora.METHOD,)}

__all__ = ["TABLE", "Method", "find"]


def find(name: str) -> Method:
    """The method of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in TABLE:
        raise ConfigError(f"unknown method {name!r}", fix=did_you_mean(name, TABLE))
    return TABLE[name]
