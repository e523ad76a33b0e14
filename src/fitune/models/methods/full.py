"""Full tuning: every parameter of the base.

In: a model. Out: the same, all of it trainable in float32 (16 bytes a parameter with gradient and Adam's states). What
only chooses stays as it is, since no gradient comes through a choice: the indexer of sparse attention (DeepSeek-V3.2),
the biases that balance experts.
"""

from __future__ import annotations

import re

from fitune.core.config import RunConfig
from fitune.models.families import Family
from fitune.models.interfaces import CausalLM
from fitune.models.methods.base import Method, Quantized, train_only, trains_quantized

CHOOSES = re.compile(r"\.indexer\.|expert_bias$|score_correction_bias$")  # names of such parameters


class Full(Method):
    """See the module's text."""

    name = "full"
    trains = "all parameters"
    default_lr = 2e-5
    why_lr = "every weight moves, so small steps keep what the base knows (Touvron et al. 2023, section 3.1: 2e-5)"
    low_precision_base = False

    def attach(self, model: CausalLM, family: Family, config: RunConfig) -> CausalLM:
        """See Method.attach."""
        train_only(model, self.expected(model, family, config))
        return model

    def expected(self, model: CausalLM, family: Family, config: RunConfig) -> dict[str, int]:
        """All of them but those that only choose; a tied head counts once."""
        return {name: p.numel() for name, p in model.named_parameters() if not CHOOSES.search(name)}

    def quant_problem(self, model: CausalLM, family: Family, config: RunConfig, quantized: Quantized) -> str | None:
        """It trains every weight."""
        return trains_quantized(self.expected(model, family, config), quantized)


METHOD = Full()
