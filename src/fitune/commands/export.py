"""A run or a model for other programs: ChatGLM2 and 3 as they were published here, others in files of their own.

In: a model folder in transformers' layout (what `fitune merge` writes); for GGUF a run too. Out: a folder with the
published names and shapes, tensors bit for bit, a shard at a time, which the published code and the tools around it
load; or what the exporter that `to` names writes.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save_file
from torch import Tensor
from transformers import GlmConfig

from fitune.core.errors import ModelError
from fitune.core.files import check_new, expand, whole_folder
from fitune.models import weights
from fitune.models.configs import quantized_as, read_config, read_values
from fitune.models.families import original
from fitune.models.locate import locate
from fitune.models.weights import safe

if TYPE_CHECKING:
    from fitune.commands.export_gguf import ExportedGguf
    from fitune.commands.export_vllm import ExportedVllm

LAYOUTS = ("original", "gguf", "gguf-lora", "ollama", "vllm")
SHARD = 4 * 2**30  # bytes of a file


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: str
    tensors: int
    files: int

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def export(
    model: str | Path,
    output: str | Path,
    *,
    to: str = "original",
    shard: int = SHARD,
    type_: str = "auto",
    verify: bool = False,
    merged: bool = False,
    base: str | Path | None = None,
) -> Exported | ExportedGguf | ExportedVllm:
    """Write a run or a model for other programs.

    Args:
        model: for `original` a folder that holds a GLM of ChatGLM2's or 3's kind in transformers' layout; for `gguf` a
            run, or the folder of a model, and so for `ollama`; for `gguf-lora` and `vllm` a run.
        output: a new or empty folder; for `gguf` and `gguf-lora` a file that is not there yet.
        to: original, gguf, gguf-lora, ollama, or vllm.
        shard: for `original`: most bytes of a file.
        type_: for `gguf`, `gguf-lora`, `ollama`: of its numbers: auto (as the model is stored), f32, f16, bf16, q8_0
            or q4_0.
        verify: for the same: compare llama.cpp on the file with fitune's chat, where its library is installed.
        merged: for `vllm`: write the merged model even where the adapter could be served.
        base: for a run: where its base model is now, if it was moved.

    Raises:
        ModelError: no such layout, or a model that has none, or that would answer otherwise there.
        RunFolderError: something lies there already.
    """
    if to not in LAYOUTS:
        raise ModelError(f"--to {to}", expected=", ".join(LAYOUTS))
    if to in ("gguf", "gguf-lora", "ollama"):
        from fitune.commands import export_gguf, export_lora, export_ollama

        write = {
            "gguf": export_gguf.export_gguf,
            "gguf-lora": export_lora.export_lora,
            "ollama": export_ollama.export_ollama,
        }
        return write[to](model, output, export_gguf.GgufOptions(type_, verify, base))
    if to == "vllm":
        from fitune.commands.export_vllm import export_vllm

        return export_vllm(model, output, merged=merged, base=base)
    return _published(model, output, shard)


def _published(model: str | Path, output: str | Path, shard: int) -> Exported:
    """ChatGLM2 and 3."""
    folder, target = locate(str(model)), expand(output)
    check_new(target, whole=True)
    if (folder / "config.yaml").is_file() and not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder}: is a run", expected="a model", fix=f"fitune merge {folder} --output MERGED, then that"
        )
    config = read_config(folder)
    weights.check(folder)
    values = read_values(folder / "config.json")
    if values.get("model_type") == original.TYPE:
        raise ModelError(f"{folder}: is in its published layout already")
    if not isinstance(config, GlmConfig) or quantized_as(config).name != "none":
        raise ModelError(
            f"{folder}: has no other layout to be published in",
            received=f"model_type {config.model_type}",
            expected="glm, not quantized: ChatGLM2 or 3",
        )
    with whole_folder(target) as place:
        count, files = _write(folder, place, config, shard)
        text = json.dumps(original.published_config(config), ensure_ascii=False, indent=2)
        (place / "config.json").write_text(text, encoding="utf-8")
        for file in folder.iterdir():
            of_weights = file.suffix in (".safetensors", ".bin") or ".index." in file.name
            if file.is_file() and not of_weights and file.name != "config.json":
                shutil.copyfile(file, place / file.name)
    return Exported(str(target), count, files)


def _write(folder: Path, place: Path, config: GlmConfig, shard: int) -> tuple[int, int]:
    """Tensors into files of at most so many bytes; how many there are of both."""
    where: dict[str, Path] = {}
    for file in weights.files(folder):
        with safe.opened(file) as tensors:
            where |= dict.fromkeys(tensors.keys(), file)

    def read(name: str) -> Tensor:
        with safe.opened(where[name]) as tensors:
            tensor: Tensor = tensors.get_tensor(name)
        return tensor

    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    size = 0

    def flush() -> None:
        if held:
            save_file(held, place / f"part-{len(shards)}", metadata={"format": "pt"})
            shards.append(list(held))
            held.clear()

    total = 0
    for name, tensor in original.published(where, read):
        count = tensor.numel() * tensor.element_size()
        if held and size + count > shard:
            flush()
            size = 0
        held[name], size, total = tensor.contiguous(), size + count, total + count
    flush()
    names = [weights.SAFE] if len(shards) == 1 else [_shard_name(n, len(shards)) for n in range(len(shards))]
    for number, name in enumerate(names):
        (place / f"part-{number}").rename(place / name)
    if len(names) > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {t: n for n, s in zip(names, shards, strict=True) for t in s},
        }
        (place / weights.SAFE_INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    return sum(len(one) for one in shards), len(shards)


def _shard_name(number: int, of: int) -> str:
    return f"model-{number + 1:05}-of-{of:05}.safetensors"
