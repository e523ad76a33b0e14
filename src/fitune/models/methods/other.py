"""Any other method of PEFT by its type: `peft:VERA`, `peft:LOHA`, ... with the settings of its own config in `peft`.

In: a model. Out: the model as PEFT wraps it. What is trained, and how many parameters, is PEFT's to say.
"""

from __future__ import annotations

import inspect
from importlib.util import find_spec

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, get_peft_model

from fitune.core.config import RunConfig
from fitune.core.errors import ConfigError, did_you_mean
from fitune.models.families import Family
from fitune.models.interfaces import CausalLM
from fitune.models.methods.base import Method, Quantized, short, targets

START = "peft:"
VIRTUAL_TOKENS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "LN_TUNING")  # and what trains norms alone
OWN_TARGETS = ("ADAPTION_PROMPT", "LN_TUNING")  # whole attentions, norms: PEFT knows which
NEEDS_MORE = {
    "ADALORA": "it moves ranks between layers by calls of its own, and adds a term to the loss",
    "CPT": "it has a loss of its own",
    "MULTITASK_PROMPT_TUNING": "every row needs the number of its task",
    "POLY": "every row needs the number of its task",
    "XLORA": "it mixes adapters that must be there already",
    "CARTRIDGE": "it learns from another model's answers",
    "SHADOW": "a second model runs beside it, through calls of the whole model alone",
    "TRAINABLE_TOKENS": "use --new-tokens",
}


class Other(Method):
    """See the module's text."""

    trains = "as PEFT's method of that type; settings in peft (--set peft.r=4)"
    options = "peft"
    default_lr = 1e-3
    why_lr = "most of PEFT's methods train few parameters that start at no change"
    same_at_start = False  # not promised: it is PEFT's to say

    def __init__(self, kind: str) -> None:
        self.name = f"{START}{kind}"
        self.kind = kind

    def reads_weights(self, config: RunConfig) -> bool:
        """Some do (PEFT's OFT, VB-LoRA, ...)."""
        return True

    def attach(self, model: CausalLM, family: Family, config: RunConfig) -> CausalLM:
        """See Method.attach."""
        maker = PEFT_TYPE_TO_CONFIG_MAPPING[self.kind]
        given = dict(config.peft)
        wanted = given.get("target_modules", "auto")
        if wanted == "auto" and self.kind in OWN_TARGETS:
            given.pop("target_modules", None)
        elif "target_modules" in inspect.signature(maker).parameters:
            names = targets(model, given.pop("target_modules", "auto"), family.lora_targets, "peft.target_modules")
            given["target_modules"] = short(names, model)
        try:
            wrapped: CausalLM = get_peft_model(model, maker(task_type="CAUSAL_LM", **given))
            return wrapped
        except ImportError as error:
            raise ConfigError(
                f"{self.name}: PEFT needs a package for it that is not here",
                received=" ".join(str(error).split())[:300],
                fix="install that package (pip install PACKAGE), or take another method",
            ) from error
        except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
            raise ConfigError(
                f"{self.name}: PEFT does not take it",
                received=" ".join(str(error).split())[:300],
                fix="--set peft.KEY=...",
            ) from error

    def quant_problem(self, model: CausalLM, family: Family, config: RunConfig, quantized: Quantized) -> str | None:
        """PEFT says of some types how they lie on quantized layers; virtual tokens touch no layer."""
        if self.kind in VIRTUAL_TOKENS or find_spec(f"peft.tuners.{self.kind.lower()}.bnb") is not None:
            return None
        return "PEFT has no layers of this type for quantized weights"

    def expected(self, model: CausalLM, family: Family, config: RunConfig) -> None:
        """Only PEFT knows."""

    def check(self, config: RunConfig) -> None:
        """The settings must be those of PEFT's config, and the type one that plain training steps are enough for."""
        if self.kind in NEEDS_MORE:
            raise ConfigError(f"{self.name} needs more than plain training steps: {NEEDS_MORE[self.kind]}")
        known = inspect.signature(PEFT_TYPE_TO_CONFIG_MAPPING[self.kind]).parameters
        for name in config.peft:
            if name not in known:
                raise ConfigError(f"peft.{name}: {self.kind} has no such setting", fix=did_you_mean(name, known))


def find(name: str) -> Other:
    """The method that `peft:TYPE` means.

    Raises:
        ConfigError: PEFT has none of that type.
    """
    kind = name.removeprefix(START).upper()
    known = {str(getattr(one, "value", one)) for one in PEFT_TYPE_TO_CONFIG_MAPPING}
    if kind not in known:
        raise ConfigError(f"unknown method {name!r}", fix=did_you_mean(kind, known))
    return Other(kind)
