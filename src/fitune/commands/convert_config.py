"""A config of LLaMA-Factory, ms-swift or TRL as one of fitune.

In: their YAML or JSON, keys as their commands take them. Out: settings that `fitune train --config` reads, checked, and
what was left out with the reason. A key that nobody set has fitune's default, which may be another one than theirs:
those that decide a result (learning rate, epochs, rows of a step, rank) are listed where they are missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fitune.core import config as settings
from fitune.core.errors import ConfigError
from fitune.core.files import expand
from fitune.core.untrusted import read_json, read_yaml

Change = Callable[[Any], Any]  # their value to settings by name, or None: nothing is to be set
DECIDING = {"lr": "learning rate", "epochs": "epochs", "batch_size": "rows of a micro-batch", "lora.rank": "rank"}


def _as(name: str, change: Change = lambda value: value) -> Change:
    return lambda value: {name: change(value)}


def _number(value: Any) -> Any:
    """YAML reads 1e-4 as text."""
    return float(value) if isinstance(value, str) else value


def _listed(value: Any) -> list[str]:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else [str(part) for part in value]


def _targets(value: Any) -> Any:
    names = _listed(value)
    return "all-linear" if names in (["all"], ["all-linear"]) else names


def _bits(value: Any) -> Any:
    return {"quant": {4: "nf4", 8: "int8"}.get(int(value))} if int(value) in (4, 8) else None


def _method(value: Any) -> Any:
    return {
        "method": {"lora": "lora", "full": "full", "freeze": "freeze", "longlora": "lora"}.get(str(value), str(value))
    }


def _objective(value: Any) -> Any:
    return {"objective": {"sft": "sft", "sigmoid": "dpo"}.get(str(value), str(value))}


def _optimizer(value: Any) -> Any:
    name = str(value).removesuffix("_torch").removesuffix("_fused").removesuffix("_torch").removesuffix("_bnb_8bit")
    known = {
        "adamw": "adamw",
        "adamw_8bit": "adamw-8bit",
        "paged_adamw_8bit": "paged-adamw-8bit",
        "adafactor": "adafactor",
    }
    return {"optimizer": known.get(name, name)}


def _precision(name: str) -> Change:
    return lambda value: {"precision": name} if value else None


def _torch_dtype(value: Any) -> Any:
    return {"precision": {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(str(value), "auto")}


def _schedule(value: Any) -> Any:
    if str(value) != "cosine":
        raise ValueError("fitune's learning rate falls as a cosine")


def _init(value: Any) -> Any:
    return {"lora.init": "pissa"} if str(value).startswith("pissa") else None


def _nothing(value: Any) -> None:
    return None


PLAIN = {  # their keys, and the setting that has the same value
    "model": ("model_name_or_path", "model", "model_id"),
    "output": ("output_dir",),
    "adapter": ("adapter_name_or_path", "adapters"),
    "max_length": ("cutoff_len", "max_length", "max_seq_length"),
    "batch_size": ("per_device_train_batch_size",),
    "accumulation": ("gradient_accumulation_steps",),
    "max_steps": ("max_steps",),
    "val_share": ("val_size", "split_dataset_ratio"),
    "eval_every": ("eval_steps",),
    "save_every": ("save_steps",),
    "keep_last": ("save_total_limit",),
    "seed": ("seed",),
    "checkpointing": ("gradient_checkpointing",),
    "lora.rank": ("lora_rank", "lora_r"),
    "lora.dora": ("use_dora",),
    "lora.rslora": ("use_rslora",),
    "freeze.blocks": ("freeze_trainable_layers",),
    "quant.double": ("double_quantization", "bnb_4bit_use_double_quant", "use_bnb_nested_quant"),
    "new_tokens": ("new_special_tokens", "additional_special_tokens"),
}
NUMBERS = {
    "lr": ("learning_rate",),
    "epochs": ("num_train_epochs",),
    "warmup": ("warmup_ratio",),
    "weight_decay": ("weight_decay",),
    "max_grad_norm": ("max_grad_norm",),
    "lora.alpha": ("lora_alpha",),
    "lora.dropout": ("lora_dropout",),
    "lora.b_rate": ("loraplus_lr_ratio", "lorap_lr_ratio"),
    "dpo.beta": ("pref_beta", "beta"),
    "simpo.gamma": ("simpo_gamma",),
}
CHANGED: dict[str, Change] = {
    "dataset": _as("data", _listed), "dataset_name": _as("data", _listed), "eval_dataset": _as("eval_data", _listed),
    "val_dataset": _as("eval_data", _listed),
    "finetuning_type": _method, "train_type": _method, "tuner_type": _method,
    "use_peft": lambda value: {"method": "lora"} if value else {"method": "full"},
    "lora_target": _as("lora.targets", _targets), "target_modules": _as("lora.targets", _targets),
    "lora_target_modules": _as("lora.targets", _targets),
    "quantization_bit": _bits, "quant_bits": _bits,
    "load_in_4bit": lambda value: {"quant": "nf4"} if value else None,
    "load_in_8bit": lambda value: {"quant": "int8"} if value else None,
    "quantization_type": _as("quant.kind"), "bnb_4bit_quant_type": _as("quant.kind"),
    "bf16": _precision("bf16"), "fp16": _precision("fp16"), "pure_bf16": _precision("bf16"),
    "torch_dtype": _torch_dtype,
    "stage": _objective, "rlhf_type": _objective, "pref_loss": _objective, "loss_type": _objective,
    "optim": _optimizer, "lr_scheduler_type": _schedule, "pissa_init": _init, "init_weights": _init,
    "mask_history": lambda value: {"train_on": "last"} if value else None,
    "template": lambda value: {"template": "auto"},
}  # fmt: skip
UNNEEDED = (  # what fitune does anyway, or what changes no result
    "assistant_only_loss", "packing", "neat_packing", "padding_free", "flash_attn", "attn_impl", "logging_steps",
    "plot_loss", "overwrite_output_dir", "overwrite_cache", "preprocessing_num_workers", "dataloader_num_workers",
    "dataset_num_proc", "do_train", "trust_remote_code", "report_to", "ddp_timeout", "save_strategy", "eval_strategy",
    "per_device_eval_batch_size", "save_only_model",
)  # fmt: skip
WHY = {  # of what is left out on purpose
    "packing": "rows are always laid one after the other, and never see each other",
    "neat_packing": "rows are always laid one after the other, and never see each other",
    "padding_free": "rows are always laid one after the other, and never see each other",
    "template": "the model's own chat template is taken; --template names another one",
    "assistant_only_loss": "answers alone are trained",
    "trust_remote_code": "code from a model's folder is never run",
    "report_to": "see --track",
}
TABLE: dict[str, Change] = {
    **{theirs: _as(ours) for ours, names in PLAIN.items() for theirs in names},
    **{theirs: _as(ours, _number) for ours, names in NUMBERS.items() for theirs in names},
    **CHANGED,
    **dict.fromkeys(UNNEEDED, _nothing),
}


@dataclass(frozen=True)
class ConvertedConfig:
    """Settings by fitune's names, nested as in its YAML.

    left_out: their keys that have no place here, with the reason. defaults: fitune's own, of settings that decide a
    result and were not set.
    """

    settings: dict[str, Any]
    left_out: dict[str, str] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)

    def as_yaml(self) -> str:
        """For `fitune train --config`."""
        lines = [f"# {key} was left out: {why}" for key, why in self.left_out.items()]
        lines += [f"# {name} was not set: fitune's default {value}" for name, value in self.defaults.items()]
        body: str = yaml.safe_dump(self.settings, sort_keys=False, allow_unicode=True)
        return "\n".join([*lines, body])


def convert_config(path: str | Path) -> ConvertedConfig:
    """Settings of fitune from a config of LLaMA-Factory, ms-swift or TRL.

    Args:
        path: a YAML or JSON file with keys as their commands take them.

    Raises:
        ConfigError: the file cannot be read, nothing in it is known, or a value is none that fitune takes.
    """
    file = expand(str(path))
    try:
        given: Any = read_json(file, ConfigError) if file.suffix == ".json" else read_yaml(file, ConfigError)
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file", expected="a YAML or JSON file") from None
    if not isinstance(given, Mapping) or not any(key in TABLE for key in given):
        raise ConfigError(
            f"{file}: no config of LLaMA-Factory, ms-swift or TRL", received=json.dumps(given, default=str)[:80],
            expected="keys such as model_name_or_path, dataset, lora_rank",
        )  # fmt: skip
    found: dict[str, Any] = {}
    left_out = {}
    for key, value in given.items():
        change = TABLE.get(key)
        if change is None:
            left_out[str(key)] = "fitune has no such setting"
            continue
        try:
            made = change(value)
        except (TypeError, ValueError) as error:
            left_out[str(key)] = str(error)
            continue
        if made is None or key in WHY:
            left_out |= {str(key): WHY[key]} if key in WHY else {}
        found.update(made or {})
    return _checked(_for_objective(found), left_out)


def _for_objective(found: dict[str, Any]) -> dict[str, Any]:
    """Options of the objective that is used alone; one beta belongs to whichever it is."""
    objective = found.get("objective", "sft")
    beta = found.pop("dpo.beta", None)
    if beta is not None and objective != "sft":
        found[f"{objective}.beta"] = beta
    if objective != "simpo":
        found.pop("simpo.gamma", None)
    return found


def _checked(found: dict[str, Any], left_out: dict[str, str]) -> ConvertedConfig:
    """Nested, and as `train` would check them."""
    if found.get("method", "lora") != "lora":
        found = {name: value for name, value in found.items() if not name.startswith("lora.")}
    if found.get("method") != "freeze":
        found.pop("freeze.blocks", None)
    quant = found.pop("quant", None)
    parts = {name.partition(".")[2]: found.pop(name) for name in [n for n in found if n.startswith("quant.")]}
    if quant is not None:
        found["quant"] = {"name": quant, **(parts if quant == "nf4" else {})}
    nested = settings.parse_assignments([])
    for name, value in found.items():
        group, _, rest = name.partition(".")
        nested = settings.merge(nested, {group: {rest: value}} if rest else {name: value})
    defaults = settings.build({"model": "-", "data": ["-"], **nested})
    missing = {what: _value(defaults, name) for name, what in DECIDING.items() if name not in found}
    if defaults.method != "lora":
        missing.pop(DECIDING["lora.rank"], None)
    return ConvertedConfig(nested, left_out, missing)


def _value(config: Any, name: str) -> object:
    for part in name.split("."):
        config = getattr(config, part)
    return "of the method" if config is None else config
