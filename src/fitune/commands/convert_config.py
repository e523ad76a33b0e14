"""A config of LLaMA-Factory, ms-swift or TRL as one of fitune.

In: their YAML or JSON, keys as their commands take them. Out: settings that `fitune train --config` reads, checked, and
what was left out with the reason. What a key is called here stands in core/names.py, for the command line too; BESIDE
has those that a whole config makes plain and a single flag does not. A key that nobody set has fitune's default, which
may be another one than theirs: those that decide a result are listed where they are missing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fitune.core import config as settings
from fitune.core import names
from fitune.core.errors import ConfigError, shorten
from fitune.core.files import expand
from fitune.core.options import ROWS
from fitune.core.untrusted import read_json, read_yaml

DECIDING = {"lr": "learning rate", "epochs": "epochs", "batch_size": "rows of a micro-batch", "lora.rank": "rank"}
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")  # 1e-4, which YAML reads as text
PREFERRED = {"sigmoid": "dpo", **{name: name for name in ROWS}}
TEMPLATE = "the model's own chat template is taken; --template names another one (fitune template MODEL shows it)"


def _share(value: Any) -> dict[str, Any] | None:
    return {"val_share": float(value)} if 0 <= float(value) < 1 else None


def _blocks(value: Any) -> dict[str, Any] | None:
    return {"freeze": {"blocks": int(value)}} if int(value) > 0 else None


def _tokens(value: Any) -> dict[str, Any]:
    return {"new_tokens": value.split(",") if isinstance(value, str) else list(value)}


def _steps(value: Any) -> dict[str, Any]:
    return {"max_steps": int(value)} if int(value) > 0 else {}  # -1: no limit


def _objective(value: Any) -> dict[str, Any] | None:
    return {"objective": PREFERRED[str(value)]} if str(value) in PREFERRED else None


BESIDE: dict[str, Callable[[Any], dict[str, Any] | None]] = {  # their value to settings; None: it cannot be carried
    **dict.fromkeys(("val_size", "split_dataset_ratio"), _share),
    "max_steps": _steps,
    "save_total_limit": lambda value: {"keep_last": int(value)},
    "freeze_trainable_layers": _blocks,
    **dict.fromkeys(("new_special_tokens", "add_tokens"), _tokens),
    "use_peft": lambda value: {"method": "lora" if value else "full"},
    **dict.fromkeys(("pref_loss", "loss_type"), _objective),
    "pure_bf16": lambda value: {"precision": "bf16", "trainable_dtype": "bf16"} if value else {},
}
WHY = {
    **dict.fromkeys(
        ("val_size", "split_dataset_ratio"), "a number of rows: --val-share is a share, --val-rows its most"
    ),
    "freeze_trainable_layers": "fitune trains the last blocks: --freeze.blocks N, or --freeze.patterns",
    **dict.fromkeys(("pref_loss", "loss_type"), "no objective of fitune"),
}
BETA = ("beta", "pref_beta")  # of the objective, whichever that is
ROWS_OF = re.compile(r"(?P<path>.+)#(?P<take>\d+)")  # ms-swift: so many rows of a data set


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
    given = _read(expand(str(path)))
    left_out: dict[str, str] = {}
    found: dict[str, Any] = {}
    plain = {key: value for key, value in given.items() if key not in BESIDE and key not in BETA}
    if "template" in plain:
        left_out["template"] = f"{TEMPLATE}; theirs was {plain.pop('template')}"
    for name, value in names.ours(plain).items():
        if name in settings.RunConfig.model_fields:
            found[name] = value
            continue
        known = names.problem(name, value)
        left_out[name] = "fitune has no such setting" if known is None else str(known.fix).removeprefix(names.OUT)
    for key, change in BESIDE.items():
        if key in given:
            try:
                made = change(given[key])
            except (TypeError, ValueError):
                raise ConfigError(f"{key}: wrong value", received=shorten(given[key])) from None
            if made is None:
                left_out[key] = f"{shorten(given[key])}: {WHY[key]}"
            found = settings.merge(found, made or {})
    if found.get("objective", "sft") == "sft":
        left_out |= {name: "no objective was named that has one" for name in BETA if name in given}
    return _checked(_with_beta(found, given), left_out)


def _read(file: Path) -> dict[str, Any]:
    try:
        given: Any = read_json(file, ConfigError) if file.suffix == ".json" else read_yaml(file, ConfigError)
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file", expected="a YAML or JSON file") from None
    known = {*names.SAME, *names.MEANS, *names.INSTEAD, *BESIDE, *settings.RunConfig.model_fields}
    if not isinstance(given, Mapping) or not known & {str(key) for key in given}:
        raise ConfigError(
            f"{file}: no config of LLaMA-Factory, ms-swift or TRL", received=json.dumps(given, default=str)[:80],
            expected="keys such as model_name_or_path, dataset, lora_rank",
        )  # fmt: skip
    values = {str(key): float(v) if isinstance(v, str) and NUMBER.fullmatch(v) else v for key, v in given.items()}
    return {key: v for key, v in values.items() if v is not None or key in BESIDE}  # null: not set, in all three


def _with_beta(found: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """One beta belongs to whichever objective it is."""
    objective = found.get("objective", "sft")
    beta = next((given[name] for name in BETA if name in given), None)
    if objective != "simpo":
        found.pop("simpo", None)
    return found if beta is None or objective == "sft" else settings.merge(found, {objective: {"beta": beta}})


def _checked(found: dict[str, Any], left_out: dict[str, str]) -> ConvertedConfig:
    """As `train` would check them, without options of methods and quantizers that are not used."""
    method, quant = found.get("method", "lora"), found.get("quant", {})
    unused: list[str] = [name for name in ("lora", "freeze") if name in found and name != method]
    if isinstance(quant, Mapping) and quant.get("name", "none") == "none":
        unused += ["quant"] if "quant" in found else []
    kept = {name: value for name, value in found.items() if name not in unused}
    left_out |= {name: "nothing is quantized" if name == "quant" else f"the method is {method}" for name in unused}
    for name in ("data", "eval_data"):
        if isinstance(kept.get(name), str):
            kept[name] = [kept[name]]
        if isinstance(kept.get(name), list):
            kept[name] = [_source(one) for one in kept[name]]
    defaults = settings.build({"model": "-", "data": ["-"], **kept})
    kept = _as_built(kept, defaults)
    missing = {what: _value(defaults, name) for name, what in DECIDING.items() if not _is_set(kept, name)}
    if defaults.method != "lora":
        missing.pop(DECIDING["lora.rank"], None)
    return ConvertedConfig(kept, left_out, missing)


def _source(given: object) -> object:
    """A source of data, with the number of its rows apart."""
    rows = ROWS_OF.fullmatch(given) if isinstance(given, str) else None
    return {"path": rows["path"], "take": int(rows["take"])} if rows and int(rows["take"]) else given


def _as_built(found: Mapping[str, Any], built: Any) -> dict[str, Any]:
    """Numbers that stood as text, as numbers."""
    out: dict[str, Any] = {}
    for name, value in found.items():
        read = getattr(built, name)
        if isinstance(value, Mapping) and not isinstance(read, Mapping):
            out[name] = _as_built(value, read)
        else:
            out[name] = read if isinstance(value, str) and isinstance(read, (bool, int, float)) else value
    return out


def _is_set(found: Mapping[str, Any], name: str) -> bool:
    group, _, rest = name.partition(".")
    return group in found and (not rest or rest in found[group])


def _value(config: Any, name: str) -> object:
    for part in name.split("."):
        config = getattr(config, part)
    return "of the method" if config is None else config
