"""What the files of a model folder say of it that cannot all be true.

In: a folder. Out: one line for each contradiction: what one file says, and what another. Nothing is run or guessed;
what is only unusual (a Llama tokenizer beside a Qwen model, as in R1's distillations) is none. A folder without
config.json names no model, so nothing is imported that knows models.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from fitune.data.tokenizer import read_json


def contradictions(folder: Path) -> list[str]:
    """See the module's text.

    Args:
        folder: of a model; one with nothing but a tokenizer contradicts nothing.
    """
    config, settings = read_json(folder / "config.json"), read_json(folder / "tokenizer_config.json")
    if not config:
        return []
    return [*_architecture(config), *_code(config), *_chatglm(folder, config, settings)]


@cache
def _types() -> Mapping[str, frozenset[str]]:
    """Of each class of transformers the model types that it is for."""
    from transformers.models.auto import modeling_auto

    found: dict[str, set[str]] = {}
    for name, mapping in vars(modeling_auto).items():
        if name.endswith("_MAPPING_NAMES"):
            for kind, classes in mapping.items():
                for one in [classes] if isinstance(classes, str) else classes:
                    found.setdefault(one, set()).add(kind)
    return {name: frozenset(kinds) for name, kinds in found.items()}


def _architecture(config: Mapping[str, Any]) -> Iterator[str]:
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    for name in config.get("architectures") or []:
        kinds = _types().get(str(name), frozenset())
        if kinds and kind in CONFIG_MAPPING and kind not in kinds:
            whose = ", ".join(sorted(kinds))
            yield f"config.json: model_type is {kind}, architectures names {name}, a class of {whose}"


def _code(config: Mapping[str, object]) -> Iterator[str]:
    """Code is never run, but its name says whose it is."""
    from transformers import CONFIG_MAPPING

    kind, auto_map = str(config.get("model_type")), config.get("auto_map")
    named = str(auto_map.get("AutoConfig", "")) if isinstance(auto_map, dict) else ""
    found = re.search(r"configuration_(\w+)\.", named)
    if found and found[1] in CONFIG_MAPPING and not kind.startswith(found[1]):
        yield f"config.json: model_type is {kind}, auto_map names {named}, code of {found[1]}"


def _chatglm(folder: Path, config: Mapping[str, object], settings: Mapping[str, object]) -> Iterator[str]:
    """The three ChatGLMs, which share a model_type and a tokenizer_class."""
    from transformers import CONFIG_MAPPING

    from fitune.data.tokenizer import chatglm
    from fitune.models.families import original

    versions = chatglm.named(dict(settings), dict(config))
    if len(set(versions.values())) > 1:
        yield "; ".join(versions)
    kind, tokenizer_class = config.get("model_type"), str(settings.get("tokenizer_class", ""))
    known = kind in CONFIG_MAPPING
    if tokenizer_class.startswith("ChatGLM") and known and kind not in (original.TYPE, "glm"):
        yield f"config.json: model_type is {kind}; tokenizer_config.json: tokenizer_class is {tokenizer_class}"
    if kind == original.TYPE and tokenizer_class and not tokenizer_class.startswith("ChatGLM"):
        yield f"config.json: model_type is {kind}; tokenizer_config.json: tokenizer_class is {tokenizer_class}"
    first, files = original.is_first(config), (folder / "ice_text.model").is_file()
    of_chatglm = kind == original.TYPE and tokenizer_class.startswith("ChatGLM")
    if of_chatglm and first != files and (files or (folder / "tokenizer.model").is_file()):
        models = ("ChatGLM2 or 3", "ChatGLM-6B")
        yield f"config.json is of {models[first]}, the tokenizer's file of {models[files]}"
