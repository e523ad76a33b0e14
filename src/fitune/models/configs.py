"""config.json to a transformers config of a causal LM: the one place where a folder's kind of model is decided.

In: a folder, a config.json, or its values. Out: the config, and how the weights are quantized already. It is read by us
before any Auto class sees it: code named in it is never run, and of a model that takes images too the language model's
config is given (families/towers.py), or the model is refused by name; every verb comes through here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from copy import deepcopy
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from pydantic import ValidationError
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from fitune.core.errors import ModelError, shorten
from fitune.core.options import QuantOptions
from fitune.core.untrusted import read_json
from fitune.data.fitting import NO_LIMIT
from fitune.models import families, weights
from fitune.models import quant as quants
from fitune.models.families import original, towers
from fitune.models.quant import modelopt
from fitune.models.quant.stored import Stored
from fitune.models.sizes import largest

MOST_OF_LIST = 10_000  # entries of a list in a config.json that are looked at
# Keys of config.json that choose code to run (CVE-2026-4372 is one of them). Who trains chooses, not the folder.
CODE_KEYS = (
    "auto_map",
    "_attn_implementation",
    "attn_implementation",
    "_experts_implementation",
    "experts_implementation",
)


def longest_row(model_config: Any, virtual_tokens: int = 0) -> int:
    """The most tokens that a row may have; NO_LIMIT, less the virtual ones, where the model names no limit. Scaled
    positions reach as far as their scaling says.

    Args:
        model_config: the transformers config of the model.
        virtual_tokens: those that the method puts before every row, which take positions too.
    """
    own = getattr(model_config, "max_position_embeddings", None) or NO_LIMIT
    rope = getattr(model_config, "rope_parameters", None) or {}
    kind, start = rope.get("rope_type"), rope.get("original_max_position_embeddings")
    start = own if kind == "dynamic" else start if kind in ("yarn", "longrope") else None
    return max(own, int(start * (rope.get("factor") or 1)) if start else 0) - virtual_tokens


def read_config(folder: Path) -> Any:
    """The transformers config of a folder, without anything that names code.

    Raises:
        ModelError: config.json is missing, broken, or of a model that needs code of its own.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder}: no config.json", expected="a model folder in transformers format")
    check_generation(folder / "generation_config.json")
    config = read_config_file(path)
    if getattr(config, "quantization_config", None) is not None:
        _look_at_packed(folder, config)
    return config


def _look_at_packed(folder: Path, config: Any) -> None:
    """Of weights that others packed, which layers are, goes into the config.

    Raises:
        ModelError: config.json describes packed weights, and the files hold plain ones.
    """
    there = [file for file in weights.files(folder) if file.is_file() and file.suffix == ".safetensors"]
    if there and not weights.broken(folder):
        names = [name for file in there for name in weights.names(file)]
        method = quantized_as(config).name
        marks = quants.packing(method).marks if method in quants.STORED else (".SCB", ".absmax")
        marked = [name for name in names if name.endswith(marks)]
        if method in quants.STORED and marked:
            ends = "|".join(map(re.escape, marks))
            layers = sorted({re.sub(f"({ends})$", "", name) for name in marked})
            there_ = {"layers": layers, "scales": weights.scales(there)}
            config.quantization_config = {**_values(config), FOUND: there_}
        if not marked and not any(".quant_state." in name for name in names):
            raise ModelError(
                f"{folder / 'config.json'}: names a quantization, and the weights beside it are not quantized",
                received=f"quantization_config of {'bitsandbytes' if method in quants.NAMES else method}",
                expected="weights with their scales, or no quantization_config",
                fix="take quantization_config out; --quant nf4 or int8 quantizes while loading",
            )


NUMBERS = re.compile(r"(top|min|typical)_[pk]$|temperature|penalty|_cutoff$|_length$|_tokens$|num_|_size$|_scale$")
NO_NUMBERS = re.compile(r"_schedule$|^exponential_")
IDS = re.compile(r"(_token_ids?|suppress_tokens)$")
SWITCHES = re.compile(r"^(do|output|return|use|remove|renormalize|low|early)_|_output$")


def check_generation(path: Path) -> None:
    """Raises ModelError for a generation_config.json whose fields are of other types: generation fails at them late."""
    try:
        values = read_json(path)
    except FileNotFoundError:
        return
    wrong = [f"{name} {shorten(value, 40)}" for name, value in values.items() if not _fits(name, value)]
    if wrong:
        raise ModelError(
            f"{path}: wrong values",
            received=", ".join(wrong[:5]),
            expected="numbers, ids and switches as published",
            fix="copy the file again from where it came",
        )


def _fits(name: str, value: object) -> bool:
    whole = type(value) is int and -1 <= value < MOST_OF_OTHERS
    if value is None:
        return True
    if IDS.search(name):
        several = isinstance(value, list) and all(type(one) is int and one >= 0 for one in value)
        return whole or several or value == -1
    if SWITCHES.search(name):
        return isinstance(value, bool) or (name == "early_stopping" and value == "never")
    if NUMBERS.search(name) and not NO_NUMBERS.search(name):
        return whole or (isinstance(value, float) and math.isfinite(value) and -1 <= value < MOST_OF_OTHERS)
    return True


def read_config_file(path: Path) -> Any:
    """The same of a config.json by whatever name.

    Raises:
        ModelError: it is broken, or of a model that needs code of its own.
    """
    values = read_values(path)
    if values.get("quantization_config") is None and (found := modelopt.beside(path.parent)) is not None:
        values["quantization_config"] = found
    kind = values.get("model_type")
    if not isinstance(kind, str):
        raise ModelError(
            f"{path}: no model_type",
            received=f"keys {sorted(values)[:8]}" if kind is None else shorten(kind),
            expected='"model_type": "llama"',
        )
    if kind != original.TYPE and kind not in CONFIG_MAPPING:
        code = "it works only with Python code from its folder, which fitune never runs"
        raise ModelError(
            f"{path}: model_type {kind!r} is unknown to transformers",
            received=code if "auto_map" in values else f"transformers {transformers.__version__}; later ones know more",
            fix=_nearest(kind),
        )
    _check_quantized(path.parent, values.get("quantization_config"))
    _check_numbers(path, values)
    try:
        return config_of(values)
    except ModelError as error:
        error.what = error.what.replace("config.json:", f"{path}:", 1)
        raise
    except Exception as error:  # each config class checks itself in its own way
        raise ModelError(f"{path}: wrong values", received=" ".join(str(error).split())[:300]) from error


def read_values(path: Path) -> dict[str, object]:
    """The values of a config.json.

    Raises:
        ModelError: it is missing, or no JSON object.
    """
    try:
        values: dict[str, Any] = read_json(path)
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file", expected="the config.json of a model") from None
    return values


# What people had when their model needed its own code, and the family that is native today
SUCCESSORS = {
    **dict.fromkeys(("baichuan", "internlm", "internlm2", "xverse", "yi", "aquila", "deepseek", "minicpm"), "llama"),
    **dict.fromkeys(("orion", "telechat", "skywork"), "llama"),
    **{"qwen": "qwen2", "phi-msft": "phi3", "phi3small": "phi3", "refinedweb": "falcon", "glm-130b": "glm"},
}


def _nearest(kind: str) -> str:
    """The native family that is nearest to an unknown one."""
    close = get_close_matches(kind.lower(), [*families.TABLE, *CONFIG_MAPPING.keys()], n=1, cutoff=0.75)
    near = SUCCESSORS.get(kind.lower()) or (close[0] if close else "llama")
    return f"take a model of a native family: nearest is {near!r}; or a version of this one in transformers' own layout"


def config_of(values: Mapping[str, object]) -> Any:
    """The config of a causal LM from the values of a config.json, without what names code; of a model that takes images
    too that of its language model.

    Raises:
        ModelError: a ChatGLM that differs from the published ones; no causal LM, and none inside that is known.
    """
    plain = {name: _plain(value) for name, value in values.items() if name not in CODE_KEYS}
    original_ = plain["model_type"] == original.TYPE
    found = original.config_of(plain) if original_ else CONFIG_MAPPING[plain["model_type"]].from_dict(plain)
    config = found if original_ else towers.language_config(found)
    _check_sizes(config)
    return config


def _plain(value: object) -> object:
    """A value of config.json with its infinite numbers, which transformers writes as objects."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity"):
            return float(value["__float__"])
        return {name: _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list) else value


# the most that a size may be: many times that of any published model
SIZES = {
    "vocab_size": 10**8,
    "hidden_size": 10**6,
    "intermediate_size": 10**7,
    "num_hidden_layers": 10**4,
    "num_attention_heads": 10**5,
    "num_key_value_heads": 10**5,
    "head_dim": 10**5,
    "max_position_embeddings": 10**9,
}
# of a layer there are numbers, too, and those count from the end where they are negative (vision_feature_layer)
OTHER_SIZES = re.compile(r"(^|_)(num|n)_|_(size|dim|heads?|experts?|rank|width)$|^d_|window|coder_layers$|embd$")
MOST_OF_OTHERS = 10**10  # no size of a model, whatever it counts, has so many


def _check_sizes(config: object) -> None:
    """transformers takes any number, and fails later in its own way, or never ends."""
    found = {name: largest(config, name) for name in SIZES}
    wrong = [
        f"{name} {shorten(size, 40)} (expected: 1 to {SIZES[name]:,})"
        for name, size in found.items()
        if isinstance(size, (int, float)) and not (1 <= size <= SIZES[name] and size == int(size))
    ]
    if wrong:
        raise ModelError("config.json: sizes that no model has", received=", ".join(wrong), fix="copy the file again")
    heads, groups = found["num_attention_heads"], found["num_key_value_heads"]
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        sizes = f"num_attention_heads {heads}, num_key_value_heads {groups}"
        raise ModelError("config.json: heads that no group divides", received=sizes, expected="a multiple")


def _check_numbers(path: Path, values: Mapping[str, object]) -> None:
    """Raises ModelError for numbers that are no size, at any depth; what is -1 says `none` in some families."""
    wrong: list[str] = []

    def look(value: object, name: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                look(inner, f"{name}.{key}" if name else key)
        elif isinstance(value, list):
            for inner in value[:MOST_OF_LIST]:
                look(inner, name)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            size = OTHER_SIZES.search(name.rpartition(".")[2]) is not None
            if not math.isfinite(value) or abs(value) > 10**15 or (size and not -1 <= value <= MOST_OF_OTHERS):
                wrong.append(f"{name} {shorten(value, 40)}")

    look(values, "")
    if wrong:
        received = ", ".join(list(dict.fromkeys(wrong))[:5])
        raise ModelError(f"{path}: numbers that no model has", received=received, fix="copy the file again")


def _check_quantized(folder: Path, found: object) -> None:
    """A folder may hold a model quantized by bitsandbytes, or packed in one of the ways that are known."""
    if found is None:
        return
    kind = found.get("quant_method") if isinstance(found, dict) else found
    if isinstance(found, dict) and isinstance(kind, str) and kind in quants.STORED:
        try:
            quants.packing(kind).check(found)
        except ModelError as error:
            error.what = f"{folder}: holds a model quantized by {kind}; {error.what}"
            raise
        return
    if kind != "bitsandbytes":
        raise ModelError(
            f"{folder}: holds a model quantized by {kind}",
            received=shorten(found, 600),
            expected=f"weights in fp32, bf16 or fp16, or quantized by bitsandbytes, {', '.join(quants.STORED)}",
            fix="take the original model, with --quant nf4 or int8 if it is to be small",
        )


FOUND = "found"  # what was found in a folder's files, beside its quantization_config
STORAGES: dict[str, Literal["fp32", "bf16", "fp16"]] = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def quantized_as(config: object) -> QuantOptions:
    """How the weights of a folder are quantized already, by its config."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return QuantOptions()
    values = _values(config)
    try:
        if values.get("quant_method") in quants.STORED:
            plain = {name: value for name, value in values.items() if name != FOUND}
            return Stored(name=values["quant_method"], values=plain, **values.get(FOUND, {}))
        return _packed(values)
    except ValidationError as error:
        wrong = "; ".join(f"{one['loc'][-1]} {shorten(one['input'], 40)}: {one['msg']}" for one in error.errors())
        raise ModelError("config.json: quantization_config has wrong values", received=wrong) from None


def _values(config: Any) -> dict[str, Any]:
    found = config.quantization_config
    values: dict[str, Any] = found if isinstance(found, dict) else found.to_dict()
    return values


def _packed(values: Mapping[str, Any]) -> QuantOptions:
    left_out = values.get("llm_int8_skip_modules")
    if values.get("load_in_8bit"):
        return quants.Packed(name="int8", threshold=values.get("llm_int8_threshold", 6.0), left_out=left_out)
    return quants.Packed(
        name="nf4",
        kind=values.get("bnb_4bit_quant_type", "fp4"),
        double=values.get("bnb_4bit_use_double_quant", False),
        storage=STORAGES.get(str(values.get("bnb_4bit_quant_storage", "uint8")).removeprefix("torch."), "uint8"),
        left_out=left_out,
    )


def without_weights(config: Any) -> Any:
    """A causal LM of that config that takes no memory. It has a config of its own: a method may change it.

    Raises:
        ModelError: it is no causal LM.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(deepcopy(config), trust_remote_code=False)
    except ValueError as error:
        raise ModelError(
            f"model_type {config.model_type!r} is no causal language model", received=str(error)[:200]
        ) from error
    except Exception as error:  # each model fails in its own way at values that its config let through
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        fix = "the config.json of a published model"
        raise ModelError("no model can be built from this config.json", received=reason, fix=fix) from error


def is_original(folder: Path) -> bool:
    """Does a folder hold a ChatGLM2 or 3 in its published layout?"""
    values = read_values(folder / "config.json")
    return values.get("model_type") == original.TYPE and not original.is_first(values)
