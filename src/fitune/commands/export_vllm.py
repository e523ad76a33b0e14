"""A run for vLLM: its adapter where vLLM serves it as it is trained, else the merged model, and the command.

In: a finished run. Out: a folder with the adapter (or the model), the run's tokenizer, chat template and stop tokens,
and the `vllm serve` command that uses all of them. What vLLM accepts of an adapter stands in `reasons`; what it reads
of the settings is one rank, one alpha and rsLoRA, so an adapter with several of them is rewritten to one.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fitune.commands.merge import merge
from fitune.core.config import RunConfig
from fitune.core.errors import ModelError, RunFolderError
from fitune.core.files import check_new, expand, whole_folder
from fitune.data import templates, tokenizer
from fitune.engine.checkpoint import RunFolder
from fitune.engine.loading import base_of, finished
from fitune.models import adapters, handover
from fitune.models.adapters.files import read_settings
from fitune.models.configs import quantized_as, read_config, read_values
from fitune.models.handover import GENERATION, Handover
from fitune.models.weights import safe

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes, but for 1, which older versions lack
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
PAIR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
# docs.vllm.ai, "Supported Models", November 2026: what is served with adapters, and what as a whole only
WITH_ADAPTERS = {
    "ApertusForCausalLM", "ArceeForCausalLM", "Cohere2ForCausalLM", "CohereForCausalLM", "DeepseekForCausalLM",
    "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "Ernie4_5ForCausalLM", "Exaone4ForCausalLM", "Gemma2ForCausalLM",
    "Gemma3ForCausalLM", "Gemma4ForCausalLM", "GemmaForCausalLM", "Glm4ForCausalLM", "Glm4MoeForCausalLM",
    "GlmForCausalLM", "GptOssForCausalLM", "GraniteForCausalLM", "GraniteMoeForCausalLM", "HunYuanDenseV1ForCausalLM",
    "Lfm2ForCausalLM", "LlamaForCausalLM", "MiniCPMForCausalLM", "MistralForCausalLM", "MixtralForCausalLM",
    "NemotronForCausalLM", "OPTForCausalLM", "Olmo2ForCausalLM", "Olmo3ForCausalLM", "OlmoForCausalLM",
    "Phi3ForCausalLM", "PhiForCausalLM", "Qwen2ForCausalLM", "Qwen2MoeForCausalLM", "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM", "Qwen3NextForCausalLM", "SeedOssForCausalLM", "SmolLM3ForCausalLM", "Starcoder2ForCausalLM",
}  # fmt: skip
WHOLE_ONLY = {
    "BloomForCausalLM", "DbrxForCausalLM", "FalconForCausalLM", "FalconMambaForCausalLM", "GPT2LMHeadModel",
    "GPTJForCausalLM", "GPTNeoXForCausalLM", "Gemma3ForConditionalGeneration", "Gemma4ForConditionalGeneration",
    "MPTForCausalLM", "Mamba2ForCausalLM", "MambaForCausalLM", "Mistral3ForConditionalGeneration",
    "OlmoeForCausalLM", "Qwen2_5_VLForConditionalGeneration", "Qwen3VLForConditionalGeneration",
    "Qwen3_5ForConditionalGeneration", "StableLmForCausalLM",
}  # fmt: skip


@dataclass(frozen=True)
class ExportedVllm:
    """What was written.

    kind: adapter, or merged. command: for a shell. reasons: why it is not the adapter as it was trained. rounding: the
    largest relative change of a weight by rewriting it. handed: template and stop tokens.
    """

    folder: str
    kind: str
    command: str
    reasons: tuple[str, ...]
    rounding: float
    handed: Handover

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        changed = f"; rewritten with a relative rounding of {self.rounding:.0e} at most" if self.rounding else ""
        because = [f"{'merged' if self.kind == 'merged' else 'note'}: {reason}" for reason in self.reasons]
        return [f"{self.folder}: {self.kind}{changed}", *because, *self.handed.lines(), self.command]


def export_vllm(
    run: str | Path, output: str | Path, *, merged: bool = False, base: str | Path | None = None
) -> ExportedVllm:
    """Write a run for vLLM.

    Args:
        run: a finished run.
        output: a folder that is not there yet, or is empty.
        merged: write the merged model even where the adapter could be served.
        base: where the run's base model is now, if it was moved.

    Raises:
        ModelError: vLLM does not serve this architecture, or it is no run.
        RunFolderError: the run is not finished, cannot be merged and must be, or the output is not new.
    """
    folder, target = RunFolder(expand(run)), expand(output)
    check_new(target, whole=True)
    if not (folder.path / "config.yaml").is_file():
        raise ModelError(f"{run}: no run", expected="a run folder", fix=f"vllm serve {shlex.quote(str(run))}")
    config = finished(folder)
    config = config.model_copy(update={"model": str(Path(base_of(folder, config, base)).resolve())})
    why = reasons(folder.adapter, config)
    if not why and not merged:
        return _adapter(folder, config, target)
    done = merge(run, target, model=base)
    if done.handed is None:
        raise RunFolderError(f"{target}: the merged model has no tokenizer of its own", fix="give another --output")
    command = _command([str(target.resolve()), "--served-model-name", folder.path.resolve().name], target, done.handed)
    precision = ["--dtype", DTYPES[config.precision]] if config.precision in DTYPES else []
    return ExportedVllm(str(target), "merged", shlex.join([*command, *precision]), tuple(why), 0.0, done.handed)


def reasons(adapter: Path, config: RunConfig) -> list[str]:
    """Why vLLM does not serve an adapter as it is trained; nothing: it does.

    Args:
        adapter: the run's adapter folder.
        config: the run's; its model is the base model's folder.

    Raises:
        ModelError: vLLM does not serve the base model at all.
    """
    names = read_values(Path(config.model) / "config.json").get("architectures")
    kind = str(names[0]) if isinstance(names, list) and names else "unknown"
    if kind not in WITH_ADAPTERS | WHOLE_ONLY or config.model.endswith(".gguf"):
        known = ", ".join(sorted(WITH_ADAPTERS | WHOLE_ONLY))
        raise ModelError(f"vLLM does not serve {kind}, as far as fitune knows", expected=known)
    settings = read_settings(adapter / adapters.PEFT_CONFIG)
    if settings.get("peft_type") != "LORA":
        return [f"the method is {config.method}, and vLLM serves LoRA adapters only"]
    found = [f"vLLM serves no adapters of {kind}"] if kind not in WITH_ADAPTERS else []
    found += [text for name, text in _SETTINGS.items() if settings.get(name) not in (None, False, "none", [], {})]
    if (adapter / adapters.NEW_IDS).is_file():
        found.append("it has new tokens, and vLLM keeps the vocabulary of the base model")
    with safe.opened(adapter / adapters.WEIGHTS) as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # no mapping
    others = [name for name in shapes if (pair := PAIR.fullmatch(name)) is None or not _linear(pair["module"])]
    if others:
        found.append(f"vLLM has no place for {others[0]}{f' and {len(others) - 1} more' if len(others) > 1 else ''}")
    ranks = [shape[0] for name, shape in shapes.items() if ".lora_A." in name]
    if max(ranks, default=0) > RANKS[-1]:
        found.append(f"rank {max(ranks)} is more than vLLM's {RANKS[-1]}")
    quantized = config.quant.name != "none" or quantized_as(read_config(Path(config.model))).name != "none"
    if quantized:
        found.append("it was tuned on quantized weights, which vLLM would replace by other ones")
    return found


_SETTINGS = {
    "use_dora": "vLLM has no DoRA",
    "modules_to_save": "vLLM takes no modules that were trained whole",
    "bias": "vLLM takes no biases of an adapter",
    "lora_bias": "vLLM takes no biases of an adapter",
    "target_parameters": "vLLM takes no adapters of bare parameters (fused experts)",
    "trainable_token_indices": "vLLM takes no trained rows of embeddings",
    "layer_replication": "vLLM repeats no layers",
}


def _linear(module: str) -> bool:
    """Is it a linear layer of a block?"""
    return module.rpartition(".")[2] not in ("lm_head", "embed_tokens", "wte", "embed_out") and ".experts" not in module


def _adapter(run: RunFolder, config: RunConfig, target: Path) -> ExportedVllm:
    trained = safe.load(run.adapter / adapters.WEIGHTS)
    tensors, settings, rounding = unified(trained, read_settings(run.adapter / adapters.PEFT_CONFIG))
    base = Path(config.model)
    settings["base_model_name_or_path"] = str(base)
    with whole_folder(target) as place:
        save_file(tensors, place / adapters.WEIGHTS, metadata={"format": "pt"})
        (place / adapters.PEFT_CONFIG).write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")
        if (base / GENERATION).is_file():
            shutil.copyfile(base / GENERATION, place / GENERATION)
        vocabulary = tokenizer.load(run.tokenizer)
        template = templates.from_dict(run.read("template"), vocabulary)
        handed = handover.hand_over(place, vocabulary, template, read_values(base / "config.json").get("eos_token_id"))
    rank = next(one for one in RANKS if one >= settings["r"])
    name = run.path.resolve().name
    first = [str(base), "--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"{name}={target.resolve()}"]
    there = target.resolve()
    command = [*_command(first, target, handed), "--tokenizer", str(there), "--generation-config", str(there)]
    notes = []
    if config.precision in ("bf16", "fp16"):
        command += ["--dtype", DTYPES[config.precision]]
    else:
        notes = ["vLLM computes adapters in 16 bits, and the run was trained in float32: --merged keeps that"]
    return ExportedVllm(str(target), "adapter", shlex.join(command), tuple(notes), rounding, handed)


def _command(first: list[str], target: Path, handed: Handover) -> list[str]:
    """`vllm serve` with the run's template."""
    file = target.resolve() / "chat_template.jinja"
    return ["vllm", "serve", *first, *(["--chat-template", str(file)] if handed.written and file.is_file() else [])]


def unified(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any], float]:
    """An adapter of one rank and one scale: tensors, settings, and the largest relative change of a weight.

    Smaller ranks are padded with zeros, which changes nothing; scales that differ are multiplied into B, which is exact
    for powers of two and rounds otherwise.

    Args:
        tensors: by PEFT's names.
        settings: adapter_config.json.
    """
    ranks, alphas = dict(settings.get("rank_pattern") or {}), dict(settings.get("alpha_pattern") or {})
    if not ranks and not alphas:
        return dict(tensors), dict(settings), 0.0
    modules = {pair["module"] for name in tensors if (pair := PAIR.fullmatch(name))}
    scales = {one: _scale(one, settings, ranks, alphas) for one in modules}
    most = max(tensors[f"base_model.model.{one}.lora_A.weight"].shape[0] for one in modules)
    common = Counter(scales.values()).most_common(1)[0][0]
    common = common if (common * most).is_integer() else 1.0
    made: dict[str, Tensor] = {}
    rounding = 0.0
    for module in sorted(modules):
        a, b = (tensors[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
        exact = b.double() * (scales[module] / common)
        scaled = exact.to(b.dtype)
        change = (scaled.double() - exact).abs() / exact.abs().clamp_min(torch.finfo(torch.float32).tiny)
        rounding = max(rounding, float(change.max()))
        more = most - a.shape[0]
        made[f"base_model.model.{module}.lora_A.weight"] = torch.cat([a, a.new_zeros(more, a.shape[1])]).contiguous()
        made[f"base_model.model.{module}.lora_B.weight"] = torch.cat(
            [scaled, b.new_zeros(b.shape[0], more)], dim=1
        ).contiguous()
    one = {"r": most, "lora_alpha": int(common * most), "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    return made, {**settings, **one}, rounding


def _scale(module: str, settings: Mapping[str, Any], ranks: Mapping[str, int], alphas: Mapping[str, float]) -> float:
    """What B A is multiplied by, as PEFT finds it."""
    rank, alpha = _of(module, ranks, settings["r"]), _of(module, alphas, settings["lora_alpha"])
    return float(alpha / (rank**0.5 if settings.get("use_rslora") else rank))


def _of(module: str, pattern: Mapping[str, Any], otherwise: Any) -> Any:
    """A module's value in one of PEFT's patterns: keys are ends of its name, or regular expressions of it."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), otherwise)
