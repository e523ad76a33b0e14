"""What every method offers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

from torch import nn
from transformers.pytorch_utils import Conv1D

from fitune.core.config import RunConfig
from fitune.core.errors import ConfigError, did_you_mean
from fitune.models.families import Family
from fitune.models.interfaces import CausalLM, Layer


@dataclass(frozen=True)
class Quantized:
    """What will be quantized: names of layers. kind: int8 or nf4. device: cpu, cuda, ..."""

    names: Sequence[str]
    kind: str
    device: str


class Method:
    """A method of tuning.

    The model never knows its method: `attach` converts it from outside and leaves exactly the method's parameters
    trainable, in float32. `expected` is the closed form that the result is checked against before the first step.
    """

    name: str
    trains: ClassVar[str]  # in one line, for `fitune methods`
    families: ClassVar[str] = "all"
    options: ClassVar[str | None] = None  # the group of settings that is its own
    default_lr: ClassVar[float]
    why_lr: ClassVar[str]
    cannot_merge: ClassVar[str | None] = None  # why it cannot become part of the base's weights
    same_at_start: ClassVar[bool] = True  # nothing changes before the first step
    low_precision_base: ClassVar[bool] = True  # frozen weights may be kept in 16 bits

    def attach(self, model: CausalLM, family: Family, config: RunConfig) -> CausalLM:
        """The model with the method's parameters, trainable, in float32; everything else frozen."""
        raise NotImplementedError

    def expected(self, model: CausalLM, family: Family, config: RunConfig) -> dict[str, int] | None:
        """Names and sizes of the parameters that will be trainable, from the shapes of the model before `attach`.

        None: only PEFT knows.
        """
        raise NotImplementedError

    def count(self, model: CausalLM, family: Family, config: RunConfig) -> int | None:
        """How many parameters will be trainable."""
        expected = self.expected(model, family, config)
        return None if expected is None else sum(expected.values())

    def check(self, config: RunConfig) -> None:
        """Raises ConfigError where the settings do not go together. No model is needed."""

    def reads_weights(self, config: RunConfig) -> bool:
        """Does `attach` look at the values of the blocks' weights, and not at their shapes alone?"""
        return False

    def rates(self, config: RunConfig, name: str) -> float:
        """The learning rate of a parameter, in times of the run's."""
        return 1.0

    def highest_rate(self, config: RunConfig) -> float:
        """The learning rate of the parameters that have the highest, in times of the run's."""
        return self.rates(config, "")

    def virtual_tokens(self, config: RunConfig) -> int:
        """Positions that it takes before every row."""
        return 0

    def quant_problem(self, model: CausalLM, family: Family, config: RunConfig, quantized: Quantized) -> str | None:
        """Why it cannot be put on quantized weights.

        Args:
            model: the plain base, without weights.
            family: its family.
            config: the run's settings.
            quantized: what will be quantized, and where.
        """
        return None

    def merge_problem(self, model: CausalLM, family: Family, config: RunConfig) -> str | None:
        """Why this model cannot become a plain one."""
        return self.cannot_merge


LINEAR = (nn.Linear, Conv1D)


def trains_quantized(names: Iterable[str], quantized: Quantized) -> str | None:
    """The reason where one of the parameters belongs to a layer that will be quantized; biases do not count."""
    wrong = [name for name in names if name.rpartition(".")[0] in set(quantized.names) and not name.endswith(".bias")]
    if not wrong:
        return None
    return f"it trains {len(wrong)} weights that are quantized, and those have no gradient ({wrong[0]}, ...)"


def is_linear(module: nn.Module) -> bool:
    """A linear layer, GPT-2's kind too."""
    return isinstance(module, LINEAR)


def sizes(module: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear layer, quantized or not."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    rows, columns = cast(Layer, module).weight.shape
    return rows, columns


def linear_names(model: CausalLM) -> list[str]:
    """Every linear layer but the output head."""
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if is_linear(module) and module is not head]


def targets(model: CausalLM, setting: str | list[str], auto: Sequence[str], what: str) -> list[str]:
    """Full names of the linear layers that a setting means, in the model's order.

    Args:
        model: the base.
        setting: auto, all-linear, a name or names: the end of a layer's name.
        auto: what auto means.
        what: the setting's name, for the error.

    Raises:
        ConfigError: a name matches no linear layer.
    """
    linear = linear_names(model)
    if setting == "all-linear":
        return linear
    wanted = list(auto) if setting == "auto" else [setting] if isinstance(setting, str) else setting
    found: set[str] = set()
    for want in wanted:
        hits = {name for name in linear if name == want or name.endswith(f".{want}")}
        if not hits:
            leaves = {name.rpartition(".")[2] for name in linear}
            raise ConfigError(
                f"{what}: {want!r} matches no linear layer of this model",
                expected=f"auto, all-linear or names such as {', '.join(sorted(leaves))}",
                fix=did_you_mean(want, leaves),
            )
        found |= hits
    return [name for name in linear if name in found]


def short(names: Sequence[str], model: CausalLM) -> list[str]:
    """The layers' last names where those mean exactly these layers, as PEFT's own users write them."""
    leaves = {name.rpartition(".")[2] for name in names}
    meant = sum(name.rpartition(".")[2] in leaves for name, _ in model.named_modules())
    return sorted(leaves) if meant == len(names) else list(names)


def train_only(model: nn.Module, names: Iterable[str]) -> None:
    """Freeze everything but these parameters, which become float32; so do the rest of a norm that they belong to."""
    wanted = set(names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        for parameter in own:
            # a linear layer casts its bias to what it computes in, a norm wants weight and bias of one kind
            if parameter.requires_grad or (any(p.requires_grad for p in own) and not is_linear(module)):
                parameter.data = parameter.data.float()


def tied_head(model: CausalLM) -> bool:
    """Is the output head the embedding itself?"""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and head.weight is embedding.weight


def head_names(model: CausalLM, what: str) -> list[str]:
    """Parameters of the output head.

    Raises:
        ConfigError: the head is tied to the embedding, so it cannot be trained apart from it.
    """
    if tied_head(model):
        raise ConfigError(
            f"{what}: this model's output head is its embedding, so training it would change what goes in too",
            expected="a model with a head of its own",
            fix=f"leave out {what}, or --method full",
        )
    head = model.get_output_embeddings()
    prefix = next(name for name, module in model.named_modules() if module is head)
    return [f"{prefix}.{name}" for name, _ in head.named_parameters()]


def matching(names: Sequence[str], patterns: Sequence[str], what: str) -> list[str]:
    """The names in which one of the patterns is found; each must be found somewhere.

    Raises:
        ConfigError: a pattern is no regular expression, or matches nothing.
    """
    found: set[str] = set()
    for pattern in patterns:
        try:
            hits = {name for name in names if re.search(pattern, name)}
        except re.error as error:
            raise ConfigError(f"{what}: {pattern!r} is no regular expression ({error})") from None
        if not hits:
            parts = {part for name in names for part in name.split(".") if not part.isdigit()}
            raise ConfigError(
                f"{what}: {pattern!r} matches no parameter of this model", fix=did_you_mean(pattern, parts)
            )
        found |= hits
    return [name for name in names if name in found]
