"""Models that take images too: their language model alone, as the causal LM that it is.

In: the config of such a model, its tensors. Out: the config and the tensors of its language model under the names that
transformers' causal LM has; adapters under the names of the whole model, and back. Text needs nothing else: the vision
tower and what connects it are neither loaded nor tuned, and stay in the folder as they are. Positions of three axes
(M-RoPE) are one for text, so Qwen's are the plain ones. Each entry of TABLE is shown to give the logits of the whole
model (tests/models/test_towers.py); others are refused by name, by every verb alike, since each reads a config through
here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from fitune.core.errors import ModelError
from fitune.core.records import Finding
from fitune.core.untrusted import read_json
from fitune.models import attached
from fitune.models.family import Tower
from fitune.models.interfaces import CausalLM

TABLE: dict[str, Tower] = {
    **dict.fromkeys(("gemma3", "internvl", "lfm2_vl", "llava", "llava_next", "llava_onevision", "mistral3"), Tower()),
    **dict.fromkeys(("llava_next_video", "qwen3_5", "video_llava", "vipllava"), Tower()),
    **dict.fromkeys(("aria", "deepseek_vl", "exaone4_5", "gemma4", "gemma4_unified", "janus", "lighton_ocr"), Tower()),
    **dict.fromkeys(("minicpmv4_6", "ovis2", "qwen3_5_moe", "qwen4_exp", "video_llama_3"), Tower()),
    "llama4": Tower("language_model.model"),
    "glm4v": Tower(like="glm4"),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), Tower(like="qwen2")),
    "qwen3_vl": Tower(like="qwen3"),
    **dict.fromkeys(("idefics2", "idefics3", "smolvlm"), Tower("model.text_model")),
}
# how files call the language model: as the whole model's class does, or as published before transformers 5
PREFIXES = ("model.language_model.", "language_model.model.", "model.text_model.", "model.language_model.model.")
OWN = ("model.embed_tokens.", "model.layers.", "model.norm.", "model.embedding_norm.", "lm_head.")
MROPE = ("mrope_section", "mrope_interleaved")  # settings of its three axes


def of(folder: Path) -> Tower | None:
    """The entry of a folder's model; None: it is a language model and nothing else, or of no known kind."""
    values = read_json(folder / "config.json")
    return TABLE.get(values.get("model_type"))


def language_config(whole: Any) -> Any:
    """The config of the causal LM in a model; of one that is nothing else its own.

    Args:
        whole: a transformers config.

    Raises:
        ModelError: it has none that is known.
    """
    kind = whole.model_type
    text = whole.get_text_config(decoder=True)
    more = any(getattr(whole, name, None) is not None for name in ("text_config", "vision_config", "audio_config"))
    if kind not in TABLE and (what := _no_decoder(whole)):
        raise ModelError(
            f"model_type {kind!r} is {what}, and fitune tunes decoders of text: models that continue it",
            received=", ".join(getattr(whole, "architectures", None) or []) or None,
            fix="take a model that continues text: llama, qwen3, gemma3, glm4, ...",
        )
    if kind not in TABLE and not more and type(whole) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return whole
    if kind not in TABLE and more:
        raise ModelError(
            f"model_type {kind!r} takes more than text, and its language model is not one that fitune can tune alone",
            received=f"its language model is of type {text.model_type!r}" if text is not whole else None,
            expected=f"a causal language model, or the one in {', '.join(sorted(TABLE))}",
            fix="take the text-only model of the same family",
        )
    if kind not in TABLE:
        raise ModelError(
            f"model_type {kind!r} is no causal language model",
            received=", ".join(getattr(whole, "architectures", None) or []) or None,
            fix="take a model that continues text: llama, qwen3, gemma3, glm4, ...",
        )
    made = _causal(text, TABLE[kind])
    made.tie_word_embeddings = bool(getattr(whole, "tie_word_embeddings", False))
    made.dtype = made.dtype or getattr(whole, "dtype", None)
    if (packed := getattr(whole, "quantization_config", None)) is not None:
        values = packed if isinstance(packed, dict) else packed.to_dict()
        left_out = values.get("llm_int8_skip_modules")
        renamed = left_out and [name if (t := language_name(f"{name}.")) is None else t[:-1] for name in left_out]
        made.quantization_config = {**values, "llm_int8_skip_modules": renamed}
    if type(made) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"model_type {kind!r}: its language model, {made.model_type!r}, is no causal language model")
    return made


# what else has a class for causal models in transformers, by the ends of those types' names
OTHERS = {
    "_assistant": "a draft model, which reads the hidden states of another one",
    "moshi": "a model of sound and text together",
    "musicgen": "a model of sound",
    "musicgen_melody": "a model of sound",
    "trocr": "the decoder of a model that reads images",
    "cohere_compass_text": "a model of embeddings",
    "blt": "a model of bytes in patches, with three stacks of blocks",
    "cpmant": "a model with prompts of its own before every text",
    "reformer": "a model whose rows must all have the one length that its positions are made for",
}


ENCODERS = ("encoder_layers", "num_encoder_layers")  # settings of those that have an encoder beside the decoder


def _no_decoder(whole: Any) -> str:
    """What a config describes where that is no decoder of text; empty where it is, or may be.

    Encoders have a class for causal models, too: with `is_decoder` they are one. Which they are when published is what
    their config says.
    """
    kind = whole.model_type
    if (other := next((what for end, what in OTHERS.items() if kind.endswith(end)), None)) is not None:
        return other
    if getattr(whole, "is_encoder_decoder", False) or any(hasattr(whole, name) for name in ENCODERS):
        return "an encoder and a decoder"
    masked = hasattr(whole, "add_cross_attention") or kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    both_ways = (getattr(whole, "is_decoder", None) is False and masked) or getattr(whole, "attn_type", None) == "bi"
    if both_ways or getattr(whole, "causal", None) is False:
        return "an encoder, whose tokens see those behind them"
    return ""


def _causal(text: Any, tower: Tower) -> Any:
    if tower.like is None:
        return text
    values = text.to_dict()
    rope = values.get("rope_parameters") or {}
    values["rope_parameters"] = {name: value for name, value in rope.items() if name not in MROPE}
    drop = ("model_type", "architectures", "transformers_version")
    return CONFIG_MAPPING[tower.like].from_dict({name: value for name, value in values.items() if name not in drop})


def language_name(name: str) -> str | None:
    """The causal LM's name of a tensor of the whole model; None: it is of another part."""
    for prefix in PREFIXES:
        if name.startswith(prefix):
            rest = name.removeprefix(prefix)
            return rest if rest.startswith("lm_head.") else f"model.{rest}"
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    return name if name.startswith(OWN) else None


def tensors(found: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the language model under the causal LM's names, each when its turn comes."""
    for name, tensor in found:
        if (own := language_name(name)) is not None:
            yield own, tensor


def finding(model: CausalLM) -> list[Finding]:
    """Of a model that takes images too, the language model alone is loaded and tuned.

    Returns:
        The finding in a list; empty for a model of text alone.
    """
    if attached.of(model).tower is None:
        return []
    text = "this model takes images too: its language model alone is loaded and tuned, all other parts stay as they are"
    return [Finding("language-model", "fixed", text)]


# ---- adapters: PEFT puts them on the whole model ----

BASE = "base_model.model."  # before each name in PEFT's files


def whole_adapter(names: Iterable[str], settings: Mapping[str, Any], tower: Tower) -> tuple[dict[str, str], Any]:
    """A PEFT adapter of the causal LM as one of the whole model, so that PEFT adapts nothing of the vision tower.

    Args:
        names: of its tensors.
        settings: its adapter_config.json.
        tower: where the language model stands.

    Returns:
        New names by old ones, and the new settings.
    """
    renamed = {name: _moved(name, f"{BASE}model.", f"{BASE}{tower.path}.") for name in names}
    targets = _whole_targets(settings.get("target_modules"), tower)
    return renamed, {**settings, "target_modules": targets, **_parameters(settings, "model.", f"{tower.path}.")}


def _parameters(settings: Mapping[str, Any], old: str, new: str) -> dict[str, list[str]]:
    """The setting of parameters that are adapted, with other names; nothing where there is none."""
    found = settings.get("target_parameters")
    return {"target_parameters": [_moved(name, old, new) for name in found]} if found else {}


def _moved(name: str, old: str, new: str) -> str:
    return new + name.removeprefix(old) if name.startswith(old) else name


def _whole_targets(targets: Any, tower: Tower) -> Any:
    """PEFT takes a list for ends of names, which the vision tower has too, and a text for a pattern of whole names."""
    if isinstance(targets, str):
        return f"{re.escape(tower.path)}{targets.removeprefix('model')}" if targets.startswith("model") else targets
    if not targets:
        return targets
    ends = "|".join(re.escape(target.removeprefix("model.")) for target in sorted(targets) if target != "lm_head")
    inside = rf"{re.escape(tower.path)}\.(?:.*\.)?(?:{ends})"
    return rf"(?:{inside}|lm_head)" if "lm_head" in targets else inside


def language_adapter(
    names: Iterable[str], settings: Mapping[str, Any], tower: Tower, modules: Iterable[str]
) -> tuple[dict[str, str], Any]:
    """The way back; what was published for the whole model is taken too.

    Args:
        names, settings, tower: as for `whole_adapter`.
        modules: names in the causal LM, among which a pattern finds what it adapts.

    Raises:
        ModelError: it adapts another part than the language model.
    """
    renamed = {name: name for name in names}
    for name in [name for name in renamed if name.startswith(BASE)]:
        renamed[name] = f"{BASE}{language_name(name.removeprefix(BASE)) or ''}"
    if others := sorted(name for name, own in renamed.items() if own == BASE):
        raise ModelError(
            "the adapter tunes other parts than the language model, which fitune loads alone",
            received=", ".join(others[:3]),
            fix="use it with PEFT on the whole model",
        )
    targets = settings.get("target_modules")
    if isinstance(targets, str):
        targets = [name for name in modules if re.fullmatch(targets, _moved(name, "model.", f"{tower.path}."))]
    return renamed, {**settings, "target_modules": targets, **_parameters(settings, f"{tower.path}.", "model.")}
