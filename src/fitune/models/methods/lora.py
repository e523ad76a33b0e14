"""LoRA: a trainable low-rank update beside frozen linear layers (Hu et al. 2021, arXiv:2106.09685).

In: a model and the names of linear layers. Out: the model as PEFT wraps it, y = W x + (alpha / rank) B A x, with B = 0
at the start, so nothing changes until the first step. Parameters, names and files are PEFT's.

PiSSA (Meng et al. 2024, arXiv:2404.02948) begins with the largest singular vectors of W in A and B. The paper takes
them out of W; here W stays as it is, bit for bit, and B0 A0 x is taken off the output: a 16-bit W is not rounded
twice and nothing changes at the start. What it learned is B A - B0 A0: it is saved as a LoRA of twice the rank, which
loads on the untouched base.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fitune.core.config import RunConfig
from fitune.core.errors import ConfigError
from fitune.models.families import Family
from fitune.models.interfaces import CausalLM, Peft
from fitune.models.methods import misread
from fitune.models.methods.base import Method, Quantized, head_names, short, sizes, targets, trains_quantized
from fitune.models.quant import experts

PREFIX = "base_model.model."
EXACT = 1024  # narrower weights are decomposed exactly, wider ones by a randomised algorithm (Halko et al. 2011)


class Lora(Method):
    """See the module's text."""

    name = "lora"
    trains = "low-rank updates of linear layers (dora, rslora, pissa, LoRA+ rates, ranks by pattern)"
    options = "lora"
    default_lr = 2e-4
    why_lr = (
        "only the small update moves: ten times full tuning's rate (Hu et al. 2021, table 11; Biderman et al. 2024)"
    )

    def attach(self, model: CausalLM, family: Family, config: RunConfig) -> CausalLM:
        """See Method.attach."""
        names = _targets(model, family, config)
        named, by_tensors = misread.split(model, names)
        options = config.lora
        saved = _saved(model, config)
        wrapped: Peft = get_peft_model(
            model,
            LoraConfig(
                task_type="CAUSAL_LM",
                r=options.rank,
                lora_alpha=options.alpha,
                lora_dropout=options.dropout,
                target_modules=short(named, model) or misread.NOTHING,
                target_parameters=sorted({".".join(one.split(".")[-2:]) for one in _experts(model, config)}) or None,
                rank_pattern=dict(options.ranks),
                fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in names),
                use_dora=options.dora,
                use_rslora=options.rslora,
                modules_to_save=saved or None,
            ),
        )
        if by_tensors:
            misread.inject(wrapped, by_tensors)
        for parameter in wrapped.parameters():
            if parameter.requires_grad and parameter.dtype != torch.float32:
                parameter.data = parameter.data.float()
        if options.init == "pissa":
            for layer in _layers(wrapped):
                _start_pissa(layer)
        return wrapped

    def expected(self, model: CausalLM, family: Family, config: RunConfig) -> dict[str, int]:
        """rank x (inputs + outputs) for each target; with DoRA its outputs once more; whole modules as they are."""
        options, found = config.lora, {}
        for name in _targets(model, family, config):
            inputs, outputs = sizes(model.get_submodule(name))
            rank = _rank(name, options.ranks, options.rank)
            found[f"{PREFIX}{name}.lora_A.default.weight"] = rank * inputs
            found[f"{PREFIX}{name}.lora_B.default.weight"] = rank * outputs
            if options.dora:
                found[f"{PREFIX}{name}.lora_magnitude_vector.default.weight"] = outputs
        for name, path in _wrapped(_experts(model, config)):
            count, one, other = model.get_parameter(name).shape
            inputs, outputs = (one, other) if getattr(_holder(model, name), "is_transposed", False) else (other, one)
            found[f"{PREFIX}{path}.lora_A.default.weight"] = options.rank * count * inputs
            found[f"{PREFIX}{path}.lora_B.default.weight"] = options.rank * count * outputs
        for path in _saved_paths(model, config):
            for name, parameter in model.get_submodule(path).named_parameters():
                found[f"{PREFIX}{path}.modules_to_save.default.{name}"] = parameter.numel()
        return found

    def check(self, config: RunConfig) -> None:
        """PiSSA's saved form is a plain LoRA, which has no magnitudes."""
        if config.lora.init == "pissa" and (config.lora.dora or config.lora.ranks):
            raise ConfigError("lora.init=pissa goes neither with dora nor with ranks", fix="leave one of them out")
        if config.lora.experts and (config.lora.dora or config.lora.dropout or config.lora.init == "pissa"):
            raise ConfigError(
                "lora.experts goes with neither dora, dropout nor pissa: PEFT has none of these for parameters",
                fix="leave one of them out",
            )
        if config.new_tokens and config.lora.save:
            raise ConfigError(
                "new_tokens and lora.save do not go together: both would train rows of the same matrices",
                fix="leave one of them out",
            )

    def quant_problem(self, model: CausalLM, family: Family, config: RunConfig, quantized: Quantized) -> str | None:
        """PiSSA needs the weights themselves; DoRA on int8 dies at its second step on a CPU; whole modules are trained
        only where they are plain."""
        if config.lora.init == "pissa":
            return "lora.init=pissa begins with singular vectors of the weights, which are not there in full"
        if config.lora.dora and quantized.kind == "int8" and quantized.device == "cpu":
            return "lora.dora on int8 fails at the second step on a CPU (--quant nf4 takes it)"
        if config.lora.experts and set(quantized.names) & set(experts.parameters(model)):
            return "lora.experts needs plain experts, and they are packed (--quant.skip experts leaves them plain)"
        saved = [f"{path}.weight" for path in _saved_paths(model, config)]
        return trains_quantized(saved, quantized)

    def reads_weights(self, config: RunConfig) -> bool:
        """PiSSA's singular vectors, DoRA's norms, and whole modules, which are copied."""
        return config.lora.init == "pissa" or config.lora.dora or bool(config.lora.save)

    def rates(self, config: RunConfig, name: str) -> float:
        """LoRA+: B learns faster."""
        return config.lora.b_rate if ".lora_B." in name else 1.0

    def highest_rate(self, config: RunConfig) -> float:
        """See Method."""
        return max(1.0, config.lora.b_rate)


def _rank(name: str, ranks: dict[str, int], default: int) -> int:
    return ranks.get(get_pattern_key(list(ranks), name), default) if ranks else default


def _targets(model: CausalLM, family: Family, config: RunConfig) -> list[str]:
    options = config.lora
    as_parameters = not (options.dora or options.dropout or options.init == "pissa")
    auto = family.lora_targets if as_parameters else misread.split(model, family.lora_targets)[0]
    found = targets(model, options.targets, auto, "lora.targets")
    if not as_parameters and (taken := misread.split(model, found)[1]):
        raise ConfigError(
            f"lora.targets: on {model.config.model_type} PEFT takes {', '.join(_leaves(taken))} for parameters, for "
            "which it has neither dora, dropout nor pissa",
            expected="other layers, or none of these settings",
            fix="--lora.targets auto, or the names of attention's projections",
        )
    for pattern in config.lora.ranks:
        if not any(_rank(name, {pattern: -1}, 0) for name in found):
            raise ConfigError(
                f"lora.ranks: {pattern!r} matches no target", received=f"targets {', '.join(short(found, model))}"
            )
    return found


def _leaves(names: Sequence[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


def _experts(model: CausalLM, config: RunConfig) -> list[str]:
    """Names of the fused parameters that get an update.

    Raises:
        ConfigError: they are asked for, and there are none.
    """
    if not config.lora.experts:
        return []
    found = list(experts.parameters(model))
    if not found:
        raise ConfigError(
            "lora.experts: this model has no fused experts that are plain",
            received=model.config.model_type,
            fix="leave it out; --lora.targets names linear layers",
        )
    return found


def _holder(model: CausalLM, name: str) -> Any:
    return model.get_submodule(name.rpartition(".")[0])


def _wrapped(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(fused parameter, path of its update): PEFT wraps a module once for each, the first innermost."""
    for path, inside in groupby(names, lambda name: name.rpartition(".")[0]):
        several = list(inside)
        for number, name in enumerate(several):
            yield name, path + ".base_layer" * (len(several) - 1 - number)


def _saved_paths(model: CausalLM, config: RunConfig) -> list[str]:
    """Paths of the modules that are trained whole.

    Raises:
        ConfigError: there is none of that name, or the head is the embedding itself.
    """
    paths = {name: module for name, module in model.named_modules() if name}
    found = []
    for wanted in config.lora.save:
        if wanted == "head":
            hits = [head_names(model, "lora.save=head")[0].rpartition(".")[0]]
        elif wanted == "embeddings":
            head_names(model, "lora.save=embeddings")
            hits = [name for name, module in paths.items() if module is model.get_input_embeddings()]
        else:
            hits = [name for name in paths if name == wanted or name.endswith(f".{wanted}")]
            if any(paths[name] in (model.get_output_embeddings(), model.get_input_embeddings()) for name in hits):
                head_names(model, f"lora.save={wanted}")
        if not hits:
            own = (name for name, module in paths.items() if any(True for _ in module.parameters(recurse=False)))
            leaves = ", ".join(sorted({name.rpartition(".")[2] for name in own}))
            raise ConfigError(f"lora.save: this model has no module {wanted!r}", expected=f"embeddings, head, {leaves}")
        found += hits
    return list(dict.fromkeys(found))


def _saved(model: CausalLM, config: RunConfig) -> list[str]:
    return short(_saved_paths(model, config), model) if config.lora.save else []


def _layers(model: nn.Module) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


@torch.no_grad()
def _start_pissa(layer: LoraLayer) -> None:
    """A and B from the largest singular vectors of the layer's weight; what they give is taken off the output."""
    base, a, b = layer.get_base_layer(), layer.lora_A["default"].weight, layer.lora_B["default"].weight
    rank, scale = a.shape[0], layer.scaling["default"]
    weight = base.weight.float().T if isinstance(base, Conv1D) else base.weight.float()  # (out, in)
    if min(weight.shape) > EXACT:
        left, values, right = torch.svd_lowrank(weight, q=rank, niter=16)
        right = right.T
    else:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
    root = (values[:rank] / scale).sqrt()
    b.copy_(left[:, :rank] * root)
    a.copy_(root[:, None] * right[:rank])
    layer.pissa_start = a.detach().clone(), b.detach().clone()

    def take_off(module: LoraLayer, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if module.disable_adapters:
            return output
        a0, b0 = module.pissa_start
        low = nn.functional.linear(inputs[0].to(a0.dtype), a0)
        changed: Tensor = output - (nn.functional.linear(low, b0) * scale).to(output.dtype)
        return changed

    layer.register_forward_hook(take_off)


def is_pissa(model: nn.Module) -> bool:
    """Did this LoRA begin as PiSSA, so that it is saved in another form?"""
    return any(hasattr(layer, "pissa_start") for layer in _layers(model))


def pissa_as_lora(model: nn.Module, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], LoraConfig] | None:
    """A trained PiSSA as a plain LoRA of twice the rank: A = [A; A0], B = [B, -B0]; None where it is no PiSSA.

    Args:
        model: as `attach` gave it.
        state: its adapter's tensors, by PEFT's names.
    """
    if not is_pissa(model):
        return None
    config = cast(Peft, model).peft_config["default"]
    scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    rank = 2 * config.r
    made = dict(state)
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            a0, b0 = (tensor.to("cpu") for tensor in layer.pissa_start)
            a, b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
            made[a] = torch.cat([state[a].cpu(), a0]).contiguous()
            made[b] = torch.cat([state[b].cpu(), -b0], dim=1).contiguous()
    alpha = scale * (math.sqrt(rank) if config.use_rslora else rank)
    return made, replace(config, r=rank, lora_alpha=alpha, init_lora_weights=True)


METHOD = Lora()
