"""Optimizers and the learning rate.

In: trainable parameters, a config. Out: an optimizer of the table, and a learning rate that is a pure function of the
step, so that there is no schedule to save. States become a flat table of tensors plus JSON, never a pickle.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fitune.core.config import RunConfig
from fitune.core.errors import ConfigError, did_you_mean
from fitune.core.options import LR_FACTORS
from fitune.core.records import Finding
from fitune.models import methods

Groups = list[dict[str, object]]


@dataclass(frozen=True)
class Kind:
    """An optimizer.

    state_bytes: of its states per trained parameter, where that is float32. lr_factor: its default learning rate as a
    multiple of AdamW's. epsilon: it has one. harm: the ratios of learning rate to epsilon above which training in
    float16 is harmed, and from which it is ruined; None: it computes in float32 and keeps states of its own.
    """

    name: str
    state_bytes: float
    make: Callable[..., torch.optim.Optimizer]
    why: str
    lr_factor: float = 1.0
    epsilon: bool = False
    harm: tuple[float, float] | None = None


SHARED = 256  # numbers in a table of bitsandbytes
# In float16 the second moment of every gradient below 5.5e-3 is zero, so that a step is learning rate x gradient /
# epsilon, and the model's fate depends on learning rate / epsilon alone. (harm, ruin): from half of the rows of
# results/epsilon.json.
FOREACH = (
    5.0,
    100.0,
)  # above the first the held-out loss was up to 1.5 times float32's, from the second on 1.6 and more
FUSED = (100.0, 10_000.0)  # divides by the second moment before it is rounded; full tuning was ruined from 3,000 on


def _adamw(groups: Groups, *, eps: float, **how: bool) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=eps, **how)


def _bitsandbytes(name: str) -> Callable[..., torch.optim.Optimizer]:
    def make(groups: Groups, **how: float) -> torch.optim.Optimizer:
        try:
            import bitsandbytes
        except ImportError as error:
            raise ConfigError(
                f"the optimizer {name} needs bitsandbytes, which is not installed",
                fix="pip install bitsandbytes, or --optimizer adafactor",
            ) from error
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on a CPU nothing is paged, and it says so at every tensor
            made: torch.optim.Optimizer = getattr(bitsandbytes.optim, name)(groups, lr=1e-3, **how)
        return made

    return make


# AdamW: Loshchilov & Hutter 2019, arXiv:1711.05101. 8-bit states: Dettmers et al. 2022, arXiv:2110.02861. Adafactor:
# Shazeer & Stern 2018, arXiv:1804.04235. Lion: Chen et al. 2023, arXiv:2302.06675 (learning
# rates 3 to 10 times smaller).
TABLE: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("adamw", 8, partial(_adamw, fused=True), "the usual one, in one fused kernel", epsilon=True, harm=FUSED),
        Kind(
            "adamw-foreach",
            8,
            partial(_adamw, foreach=True),
            "the same, a larger peak in the step",
            epsilon=True,
            harm=FOREACH,
        ),
        Kind("adamw-8bit", 2.03, _bitsandbytes("AdamW8bit"), "states in 8 bits, a quarter of the memory", epsilon=True),
        Kind(
            "paged-adamw-8bit",
            2.03,
            _bitsandbytes("PagedAdamW8bit"),
            "the same, moved out of a full GPU's memory",
            epsilon=True,
        ),
        Kind("adafactor", 0.01, partial(torch.optim.Adafactor, lr=1e-3), "sums of rows and columns for its state"),
        Kind("lion", 4, _bitsandbytes("Lion"), "one state, steps by sign", lr_factor=0.2),
        Kind("lion-8bit", 1.02, _bitsandbytes("Lion8bit"), "one state in 8 bits", lr_factor=0.2),
        Kind("sgd", 4, partial(torch.optim.SGD, lr=0.0, momentum=0.9), "one state, momentum 0.9", lr_factor=100),
    )
}


def find(name: str) -> Kind:
    """The optimizer of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in TABLE:
        raise ConfigError(f"unknown optimizer {name!r}", fix=did_you_mean(name, TABLE))
    return TABLE[name]


def check(config: RunConfig) -> None:
    """Raises ConfigError for an unknown optimizer, an epsilon that ruins float16 weights, or settings that do not go
    with an optimizer in the backward pass."""
    kind = find(config.optimizer)
    if config.epsilon != type(config).model_fields["epsilon"].default and not kind.epsilon:
        raise ConfigError(f"epsilon {config.epsilon:g} with {kind.name}, which has none", fix="leave it out")
    if config.trainable_dtype == "fp16" and kind.harm is not None:
        lr = peak_learning_rate(config) * methods.find(config.method).highest_rate(config)
        found = in_float16(kind.name, config.epsilon, lr, force=config.force)
        if found.level == "refuse":
            given = f"optimizer {kind.name}, epsilon {config.epsilon:g}, learning rate {lr:g}"
            raise ConfigError(found.text, received=f"trainable_dtype fp16, {given}", fix=found.fix)
    if not config.optimizer_in_backward:
        return
    wrong = []
    if config.method != "full":
        wrong.append(f"method {config.method} (it is for full)")
    if config.accumulation > 1:
        wrong.append(f"accumulation {config.accumulation} (gradients are gone before the next micro-batch)")
    if config.max_grad_norm > 0:
        wrong.append(f"max_grad_norm {config.max_grad_norm} (the norm of all is known only when all are updated)")
    if wrong:
        raise ConfigError(
            "optimizer_in_backward does not go with these settings",
            received="; ".join(wrong),
            fix="--method full --accumulation 1 --max-grad-norm 0, or leave it out",
        )


def peak_learning_rate(config: RunConfig) -> float:
    """The highest learning rate of a run.

    Raises:
        ConfigError: there is no such method or optimizer.
    """
    own = methods.find(config.method).default_lr * find(config.optimizer).lr_factor
    return config.lr or own * LR_FACTORS[config.objective]


def in_float16(name: str, epsilon: float, lr: float, *, force: bool = False) -> Finding:
    """The epsilon suits weights that are trained in float16: it is not zero there, and the learning rate allows it.

    Args:
        name: of the optimizer.
        epsilon: the optimizer's.
        lr: the highest learning rate; 0: it is not known.
        force: what may ruin the model is only a warning. What gives NaN for certain stays refused.
    """
    harm, fp32 = find(name).harm, "--trainable-dtype fp32, which is right beside --precision fp16"
    zero = bool(torch.tensor(epsilon, dtype=torch.float16) == 0)
    if harm is None or (lr <= harm[0] * epsilon * (1 + 1e-9) and not zero):
        return Finding("fp16-master", "warn", "trained in float16: small updates are lost", fp32)
    least = max(lr / harm[0], 1e-7)
    digit = 10.0 ** math.floor(math.log10(least))
    enough = math.ceil(least / digit - 1e-9) * digit
    fix = [fp32, f"--epsilon {enough if lr else 1e-4:g}", *([] if zero else [f"--lr {harm[0] * epsilon:g}"])]
    text = f"learning rate / epsilon is {lr / epsilon:,.0f}: where gradients are small, steps are too large"
    if zero:
        text = f"epsilon {epsilon:g} is zero in float16, and Adam divides by it"
    elif lr < harm[1] * epsilon * (1 - 1e-9):
        return Finding("fp16-master", "warn", text, "; or ".join(fix))
    certain = zero and harm == FOREACH  # NaN at every learning rate
    if force and not certain:
        return Finding("fp16-master", "warn", f"float16 weights may be ruined: {text}", "; or ".join(fix))
    fix += [] if certain else ["--force, to try it anyway"]
    return Finding("fp16-master", "refuse", f"float16 weights would be ruined: {text}", "; or ".join(fix))


def make(
    parameters: Mapping[str, torch.nn.Parameter], config: RunConfig, rates: Callable[[str], float] = lambda name: 1.0
) -> torch.optim.Optimizer:
    """The config's optimizer; vectors (norms, biases) are never decayed.

    Args:
        parameters: what is trained, by name.
        config: the settings.
        rates: the learning rate of a parameter, as a multiple of the run's.
    """
    kind = find(config.optimizer)
    how = {"eps": config.epsilon} if kind.epsilon else {}
    if config.optimizer_in_backward:
        return InBackward({name: kind.make(_groups({name: p}, config, rates), **how) for name, p in parameters.items()})
    return kind.make(_groups(parameters, config, rates), **how)


def _groups(parameters: Mapping[str, torch.nn.Parameter], config: RunConfig, rates: Callable[[str], float]) -> Groups:
    groups: dict[tuple[bool, float], list[torch.nn.Parameter]] = {}
    for name, parameter in parameters.items():
        groups.setdefault((parameter.ndim >= 2, rates(name)), []).append(parameter)
    return [
        {"params": some, "weight_decay": config.weight_decay if decays else 0.0, "times": times}
        for (decays, times), some in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]


class InBackward(torch.optim.Optimizer):
    """An optimizer for each parameter, which updates it in the backward pass and drops its gradient at once: at no time
    are all gradients there. A gradient that is not finite is not applied.

    Args:
        each: an optimizer for each parameter, by name.
    """

    def __init__(self, each: Mapping[str, torch.optim.Optimizer]) -> None:
        self.each = dict(each)
        self.bad: list[str] = []
        self.squares = 0.0
        self.param_groups = [group for one in each.values() for group in one.param_groups]
        for name, one in each.items():
            (parameter,) = one.param_groups[0]["params"]
            parameter.register_post_accumulate_grad_hook(self._updater(name, one))

    def _updater(self, name: str, optimizer: torch.optim.Optimizer) -> Callable[[Tensor], None]:
        def update(parameter: Tensor) -> None:
            assert parameter.grad is not None
            norm = float(parameter.grad.norm())
            if math.isfinite(norm):
                self.squares += norm * norm
                optimizer.step()
            else:
                self.bad.append(name)
            parameter.grad = None

        return update

    @property
    def state(self) -> dict[Tensor, dict[str, object]]:  # type: ignore[override]  # an attribute in torch
        """The states of all parameters."""
        return {p: s for one in self.each.values() for p, s in one.state.items()}

    def of(self, parameter: torch.nn.Parameter) -> torch.optim.Optimizer:
        """The optimizer of a parameter."""
        return next(one for one in self.each.values() if one.param_groups[0]["params"][0] is parameter)

    def taken(self) -> tuple[float, list[str]]:
        """Norm of the gradients since the last call, and the names of those that were not finite."""
        found = math.sqrt(self.squares) if not self.bad else math.nan, list(self.bad)
        self.squares, self.bad = 0.0, []
        return found

    def step(self, closure: object = None) -> None:  # type: ignore[override]  # takes no closure
        """Does nothing: every update was made in the backward pass."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Does nothing: every gradient was dropped in the backward pass."""


def learning_rate(step: int, total: int, peak: float, warmup: float) -> float:
    """Linear rise over the first `warmup` share of the steps, then a cosine to zero.

    Args:
        step: from 0.
        total: steps of the whole run.
        peak: the highest learning rate.
        warmup: share of the steps, 0 to 1.
    """
    rising = max(1, round(total * warmup)) if warmup > 0 else 0
    if step < rising:
        return peak * (step + 1) / rising
    progress = (step - rising) / max(1, total - rising)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group of parameters this learning rate, times its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["times"]


def state_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """The optimizer's state as tensors named `parameter|key`, to be written at once, and its other values. States on a
    CPU are not copied: a second copy of all would be the peak memory of full tuning."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, object] = {}
    written: set[int] = set()
    states = optimizer.state
    for name, parameter in parameters.items():
        for key, value in states.get(parameter, {}).items():
            if isinstance(value, Tensor):
                mine = value.detach().cpu().contiguous()
                storage = value.untyped_storage()._cdata  # value stays alive: its address is not reused
                # bitsandbytes' parameters share their tables, and safetensors refuses tensors that share memory
                apart = storage in written or mine.numel() <= SHARED
                tensors[f"{name}|{key}"] = mine.clone() if apart else mine
                written.add(storage)
            elif value is not None:
                scalars[f"{name}|{key}"] = value
    return tensors, scalars


def load_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, torch.nn.Parameter],
    tensors: Mapping[str, Tensor],
    scalars: Mapping[str, object],
) -> None:
    """Put back what `state_tensors` gave."""
    on_device = {id(p) for group in optimizer.param_groups if group.get("fused") for p in group["params"]}
    values: dict[str, object] = {**tensors, **scalars}
    for name, value in values.items():
        named, _, key = name.rpartition("|")
        parameter = parameters[named]
        holder = optimizer.of(parameter) if isinstance(optimizer, InBackward) else optimizer
        if isinstance(value, Tensor) and key in PAGED and getattr(holder, "is_paged", False):
            value = _paged(holder, parameter, value)
        elif isinstance(value, Tensor) and (key != "step" or id(parameter) in on_device):
            value = value.to(parameter.device)
        holder.state[parameter][key] = value


PAGED = ("state1", "state2")  # what bitsandbytes' paged optimizers keep in memory that moves between GPU and host


def _paged(optimizer: Any, parameter: torch.nn.Parameter, value: Tensor) -> Tensor:
    """The state in a buffer of the optimizer's own, paged where it would have paged it at its first step: a plain
    tensor would lie on the GPU for the rest of the run, and one on the host is moved there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on a CPU nothing is paged, and it says so
        buffer: Tensor = optimizer.get_state_buffer(parameter, dtype=value.dtype)
    return buffer.copy_(value)
