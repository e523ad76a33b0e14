"""Prefix tuning: trained keys and values before those of the input, in every layer (Li & Liang 2021, arXiv:2101.00190;
P-Tuning v2, Liu et al. 2022, arXiv:2110.07602).

In: a model. Out: the model as PEFT wraps it. With grouped-query attention there are as many heads as the keys have.
"""

from __future__ import annotations

import peft
import torch
from peft import PrefixTuningConfig, get_peft_model

from fitune.core.config import RunConfig
from fitune.core.errors import ConfigError
from fitune.models import sizes
from fitune.models.families import Family
from fitune.models.interfaces import CausalLM, Peft
from fitune.models.methods.virtual import ENCODER, VirtualTokens, in_float32

MISPLACED = (0, 20)  # before this version PEFT takes keys and values of one layer of a Gemma for those of all layers
START = 0.1  # spread at the start: at PEFT's 1.0 the values drown what the attention says


class Prefix(VirtualTokens):
    """See the module's text."""

    name = "prefix"
    trains = "keys and values before the input in every layer (prefix.projection: through an MLP)"
    options = "prefix"
    default_lr = 1e-2
    why_lr = "P-Tuning v2 (Liu et al. 2022, appendix) uses 5e-3 to 2e-2 for prefixes without projection"

    def attach(self, model: CausalLM, family: Family, config: RunConfig) -> CausalLM:
        """See Method.attach."""
        placed(model)
        options = config.prefix
        wrapped: Peft = get_peft_model(
            model,
            PrefixTuningConfig(
                task_type="CAUSAL_LM",
                num_virtual_tokens=options.tokens,
                prefix_projection=options.projection,
                encoder_hidden_size=options.width or _width(model),
            ),
        )
        if not options.projection:
            with torch.no_grad():
                wrapped.prompt_encoder["default"].embedding.weight.mul_(START)
        return in_float32(wrapped)

    def expected(self, model: CausalLM, family: Family, config: RunConfig) -> dict[str, int]:
        """tokens x layers x 2 x key heads x head width; projected: tokens x that width, and the MLP's two layers."""
        options = config.prefix
        keys = sizes.key_width(model.config)
        layers = model.config.num_hidden_layers
        if not options.projection:
            return {f"{ENCODER}.embedding.weight": options.tokens * layers * 2 * keys}
        inner = options.width or _width(model)
        found = {
            "embedding.weight": options.tokens * keys,
            "transform.0.weight": keys * inner,
            "transform.0.bias": inner,
            "transform.2.weight": inner * layers * 2 * keys,
            "transform.2.bias": layers * 2 * keys,
        }
        return {f"{ENCODER}.{name}": size for name, size in found.items()}

    def rates(self, config: RunConfig, name: str) -> float:
        """A projection learns at the rates of networks, not of vectors."""
        return 0.1 if config.prefix.projection else 1.0


def placed(model: CausalLM) -> None:
    """A prefix gets into the layers of this model, with the PEFT that is installed.

    Raises:
        ConfigError: it does not.
    """
    kind = model.config.model_type
    version = tuple(int(number) for number in peft.__version__.split(".")[:2])
    if version < MISPLACED and ("gemma2" in kind or "gemma3_text" in kind):
        raise ConfigError(
            f"prefix: this PEFT puts a prefix into the wrong layers of {kind}",
            received=f"peft {peft.__version__}",
            expected="peft 0.20 or later",
            fix='pip install "peft>=0.20", or another --method (prompt, lora)',
        )


def _width(model: CausalLM) -> int:
    return int(model.config.hidden_size)


METHOD = Prefix()
