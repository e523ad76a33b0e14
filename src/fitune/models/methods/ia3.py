"""IA3: trained factors on keys, values and the MLP's inner activations (Liu et al. 2022, arXiv:2205.05638).

In: a model. Out: the model as PEFT wraps it; all factors begin at one, so nothing changes until the first step.
"""

from __future__ import annotations

from peft import IA3Config, get_peft_model
from transformers.pytorch_utils import Conv1D

from fitune.core.config import RunConfig
from fitune.models.families import Family
from fitune.models.interfaces import CausalLM
from fitune.models.methods.base import Method, short, sizes, targets
from fitune.models.methods.lora import PREFIX


class Ia3(Method):
    """See the module's text."""

    name = "ia3"
    trains = "factors on keys, values and the MLP's inner activations"
    options = "ia3"
    default_lr = 3e-3
    why_lr = "very few factors that begin at one (Liu et al. 2022: 3e-3)"

    def attach(self, model: CausalLM, family: Family, config: RunConfig) -> CausalLM:
        """See Method.attach."""
        names = _targets(model, family, config)
        feedforward = [name for name in names if _is_feedforward(name, family)]
        conv = any(isinstance(model.get_submodule(name), Conv1D) for name in names)
        wrapped: CausalLM = get_peft_model(
            model,
            IA3Config(
                task_type="CAUSAL_LM",
                target_modules=short(names, model),
                feedforward_modules=short(feedforward, model) if feedforward else [],
                fan_in_fan_out=conv,
            ),
        )
        return wrapped

    def expected(self, model: CausalLM, family: Family, config: RunConfig) -> dict[str, int]:
        """A factor for each output; for the MLP's output layer, for each input."""
        found = {}
        for name in _targets(model, family, config):
            inputs, outputs = sizes(model.get_submodule(name))
            found[f"{PREFIX}{name}.ia3_l.default"] = inputs if _is_feedforward(name, family) else outputs
        return found


def _is_feedforward(name: str, family: Family) -> bool:
    return name.endswith(f".{family.mlp_out}")


def _targets(model: CausalLM, family: Family, config: RunConfig) -> list[str]:
    family.whole("ia3")
    return targets(model, config.ia3.targets, [*_keys_values(family), family.mlp_out], "ia3.targets")


def _keys_values(family: Family) -> list[str]:
    """The layers that make keys and values: two of their own, or the one that makes queries too."""
    own = [
        name for name in family.qkv if name.rpartition(".")[2][:2] in ("k_", "v_") or name.endswith((".key", ".value"))
    ]
    return own or list(family.qkv)


METHOD = Ia3()
