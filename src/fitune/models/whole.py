"""A tuned language model back into the model that takes images too, whose other parts stay bit for bit as they are.

In: the merged language model, the folder of the whole model. Out: a folder that transformers loads as the whole model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from fitune.core.errors import RunFolderError
from fitune.core.untrusted import read_json
from fitune.models import weights
from fitune.models.families import towers
from fitune.models.interfaces import CausalLM
from fitune.models.quant import modelopt
from fitune.models.weights import bins, safe

KINDS = (".json", ".jinja", ".txt", ".model", ".md")  # of files that are copied; none of them holds weights or code
PACKED = (".quant_state.", ".SCB")  # in names of what lies beside weights that bitsandbytes packed
BESIDE = (".SCB", ".weight_format")


def save(model: CausalLM, base: Path, folder: Path) -> None:
    """Write the whole model, file by file.

    Args:
        model: the merged language model, in the dtype that it is to have.
        base: the folder that it was tuned from.
        folder: where to; it is there and empty.

    Raises:
        RunFolderError: what was tuned has no place in the whole model, or its other parts are quantized.
    """
    state = dict(model.state_dict())
    files = weights.files(base)
    names = [name for file in files for name in weights.names(file)]
    _check(state, names, base)
    where: dict[str, str] = {}
    total = 0
    for number, file in enumerate(files):
        name = weights.SAFE if len(files) == 1 else f"model-{number + 1:05}-of-{len(files):05}.safetensors"
        held = {key: _merged(key, tensor, state).contiguous().clone() for key, tensor in _tensors(file)}
        save_file(held, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(held, name)
        total += sum(tensor.numel() * tensor.element_size() for tensor in held.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / weights.SAFE_INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    _copy(base, folder, str(next(model.parameters()).dtype).removeprefix("torch."))


def _check(state: dict[str, Tensor], names: list[str], base: Path) -> None:
    known = {own for name in names if (own := towers.language_name(name)) is not None}
    tied = {"lm_head.weight"}  # where it is the embedding, files may leave it out
    homeless = sorted(state.keys() - known - tied)
    if homeless:
        raise RunFolderError(
            "what was tuned has no place in the model that takes images too",
            received=", ".join(homeless[:3]),
            fix="use it as it is: fitune chat RUN",
        )
    if any(towers.language_name(name) is None and any(part in name for part in PACKED) for name in names):
        raise RunFolderError(
            f"{base}: parts of it that fitune does not load are quantized, and cannot stand beside plain weights",
            fix="use the run as it is (fitune chat RUN), or tune the original model with --quant nf4",
        )


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    if file.suffix != ".safetensors":
        yield from bins.tensors([file])
        return
    with safe.opened(file) as opened:
        for name in opened.keys():  # noqa: SIM118
            if ".weight." not in name and not name.endswith(BESIDE):  # scales of what is plain now
                yield name, opened.get_tensor(name)


def _merged(name: str, tensor: Tensor, state: dict[str, Tensor]) -> Tensor:
    own = towers.language_name(name)
    found = tensor if own is None else state.get(own, tensor)
    if own is not None and found.shape != tensor.shape and tensor.dtype.is_floating_point:
        raise RunFolderError(
            f"{name}: has another shape than in the whole model",
            received=str(tuple(found.shape)),
            expected=str(tuple(tensor.shape)),
            fix="use it as it is: fitune chat RUN",
        )
    return found


def _copy(base: Path, folder: Path, dtype: str) -> None:
    for file in base.iterdir():
        settings = ".index." in file.name or file.name in ("config.json", modelopt.FILE)
        if file.is_file() and file.suffix in KINDS and not settings:
            shutil.copyfile(file, folder / file.name)
    values = read_json(base / "config.json")
    for name in ("quantization_config", "torch_dtype"):
        values.pop(name, None)
    (folder / "config.json").write_text(json.dumps({**values, "dtype": dtype}, indent=2), encoding="utf-8")
