"""What a run optimizes: the answers (sft), or preferences. One file for each of the latter: a function of sums of
log-probabilities (base.py), and a row of TABLE.
"""

from __future__ import annotations

from fitune.core.config import RunConfig
from fitune.engine.objectives import dpo, ipo, kto, orpo, simpo
from fitune.engine.objectives.base import Kind, Preference
from fitune.engine.step import SFT, Objective

TABLE: dict[str, Kind] = {module.KIND.name: module.KIND for module in (dpo, ipo, kto, orpo, simpo)}


def of(config: RunConfig) -> Objective:
    """The objective of a run, with its settings."""
    if config.objective not in TABLE:
        return SFT
    return Preference(TABLE[config.objective], getattr(config, config.objective))


def needs_reference(config: RunConfig) -> bool:
    """Is the model compared with what it was before?"""
    return config.objective in TABLE and TABLE[config.objective].reference
