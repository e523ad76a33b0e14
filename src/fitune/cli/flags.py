"""Flags made from the fields of the settings, and what was typed as settings again.

In: RunConfig, DataConfig. Out: groups of flags for the verbs, so that a setting has one name, one default and one text
everywhere; the settings that were typed, ready for `config.build`. No torch here.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, get_args, get_origin

from cyclopts import Argument, Parameter
from pydantic import AfterValidator, BaseModel, Field, PlainSerializer, create_model

from fitune.core import config as settings
from fitune.core import options
from fitune.core.errors import ConfigError
from fitune.core.files import as_json
from fitune.views.screen import Screen, check_written

Given = dict[str, Any]  # settings by name, as they were typed: values of any type, which `config.build` checks


def optional(model: type[BaseModel], name: str, without: tuple[str, ...] = ()) -> type[BaseModel]:
    """The settings with nothing required and no defaults: what was not typed is not there."""
    fields: Given = {}
    for field, info in model.model_fields.items():
        if field in without:
            continue
        kind: Any = _flag_type(info.annotation)
        text = info.description or ""
        if isinstance(info.default, options.QuantOptions):
            fields |= _quant_flags(type(info.default))
            continue
        if isinstance(info.default, options.Options):
            kind = optional(type(info.default), f"{name}_{field}")
        elif not info.is_required() and info.default is not None and info.default not in ([], {}, False):
            text = f"{text} [default: {info.default}]"
        fields[field] = (Optional[kind], Field(default=None, description=text))  # noqa: UP045
    return create_model(name, **fields)


QUANT = "quant__"


def _quant_flags(group: type[BaseModel]) -> Given:
    """`--quant nf4` beside `--quant.kind` and the like: a group whose first setting has the group's own name."""
    fields: Given = {}
    for field, info in group.model_fields.items():
        kind: Any = Literal["none", "int8", "nf4", "fp4"] if field == "name" else info.annotation
        flag = "--quant" if field == "name" else f"--quant.{field}"
        default = f" [default: {info.default}]" if info.default not in ([], "none") else ""
        typed = Annotated[Optional[kind], Parameter(name=flag)]  # noqa: UP045
        fields[QUANT + field] = (typed, Field(default=None, description=f"{info.description}{default}"))
    return fields


def _as_yaml(value: bool | int | str) -> Any:
    """What was typed for a setting that takes more than text: true is no text."""
    return settings.value_of(value) if isinstance(value, str) else value


def _flag_type(kind: Any) -> Any:
    """What is typed for a setting: of sources the paths, and `name=text` for each entry of a mapping.

    Bounds inside a list, and numbers of blocks, are left to the settings' own check, which says what is wrong as fitune
    does.
    """
    if settings.BlockNumbers in get_args(kind):
        return Annotated[bool | str, AfterValidator(_as_yaml), PlainSerializer(lambda value: value)]  # a number, too
    if get_origin(kind) is dict or kind in (list[options.AnySource], options.OneOrMore):
        return list[str]
    item = get_args(kind)[0] if get_origin(kind) is list else None
    return list[get_args(item)[0]] if get_origin(item) is Annotated else kind  # type: ignore[misc]  # a type made at run time


Flags = optional(settings.RunConfig, "Flags")
# what a verb takes by itself (model, data) is no flag of the group beside it
DataFlags = optional(settings.DataConfig, "DataFlags", without=("model", "data", "eval_data"))
SetOption = Annotated[
    list[str] | None,
    Parameter(name="--set", negative="", consume_multiple=True, help="Any settings: --set lora.rank=16 seed=1."),
]


def typed(flags: BaseModel | None, group: type[BaseModel] = settings.RunConfig) -> Given:
    """What was typed."""
    values = flags.model_dump(exclude_none=True) if flags else {}
    quant = {name.removeprefix(QUANT): values.pop(name) for name in list(values) if name.startswith(QUANT)}
    if quant:
        values["quant"] = quant
    return _with_mappings(values, group)


def _with_mappings(values: Given, group: type[BaseModel]) -> Given:
    """`name=text` as entries of a mapping; numbers and the like are read as in YAML where texts are not wanted."""
    out = dict(values)
    for name, info in group.model_fields.items():
        if name not in out:
            continue
        if isinstance(info.default, options.Options):
            out[name] = _with_mappings(out[name], type(info.default))
        elif get_origin(info.annotation) is dict:
            pairs = dict(pair(name, text) for text in out[name])
            as_text = get_args(info.annotation)[1] is str
            out[name] = pairs if as_text else {key: settings.value_of(text) for key, text in pairs.items()}
        elif info.annotation == options.OneOrMore and len(out[name]) == 1:
            out[name] = out[name][0]
    return out


def whole_numbers(_app: object, _commands: object, arguments: Iterable[Argument]) -> None:
    """Refuse 2.7 where a whole number is wanted: it would be rounded, and nobody would see it."""
    for argument in arguments:
        kinds = _kinds(argument.hint)
        for token in argument.tokens if int in kinds and not kinds & {float, str} else ():
            number = token.value.replace("_", "")
            if re.fullmatch(r"[-+]?\d*\.\d*", number) and number.partition(".")[2].strip("0"):
                raise ConfigError(f"{argument.name}: wrong value", received=token.value, expected="a whole number")


def _kinds(hint: Any) -> set[object]:
    """The types that a value may have."""
    return {hint}.union(*map(_kinds, get_args(hint))) if get_origin(hint) is not Literal else set()


def pair(name: str, text: str) -> tuple[str, str]:
    """`content=prompt` as its two halves; more `=` belong to the second."""
    left, equals, right = text.partition("=")
    if not equals or not left.strip():
        raise ConfigError(f"--{name}", received=repr(text), expected=f"name=value, for example {EXAMPLES[name]}")
    return left.strip(), right


EXAMPLES = {
    "map": "content=prompt",
    "fill": "name=Ada",
    "ranks": "q_proj=16",
    "peft": "r=4",
    "template_options": "enable_thinking=false",
}


Json = Annotated[bool, Parameter(negative="", help="Print one JSON object at the end, on standard output.")]
Verbose = Annotated[
    bool, Parameter(negative="", help="Print all settings, parameters, dtypes and checks; report.html has them anyway.")
]

Precision = Annotated[
    Literal["auto", "fp32", "bf16", "fp16"] | None,
    Parameter(help="Dtype of the computation. [default: the run's own; fp32 for a model folder]"),
]
Moved = Annotated[
    str | None, Parameter(help="Folder of the run's base model, if it was moved; its weights must be the same.")
]
Quant = Annotated[
    Literal["none", "int8", "nf4", "fp4"] | None,
    Parameter(help="Quantization format. [default: the run's own; none for a model folder]"),
]


def console_for(json: bool) -> Screen:
    """Where people read: standard error where a program reads standard output."""
    return Screen(stderr=json)


def print_json(value: Mapping[str, object]) -> None:
    """The one JSON object of `--json`, on standard output.

    Raises:
        FituneError: it could not be written.
    """
    sys.stdout.write(as_json(value) + "\n")
    check_written()


def check_page(html: Path | None, option: str = "--html") -> None:
    """Whether it can be written is known before the work."""
    if html is not None and html.exists():
        raise ConfigError(f"{html}: exists; nothing of yours is overwritten", fix=f"choose another {option}")
    if html is not None and not html.absolute().parent.is_dir():
        raise ConfigError(f"{html}: no such folder", fix=f"mkdir -p {shlex.quote(str(html.parent))}")
