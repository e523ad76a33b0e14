"""Old `.bin` weights to safetensors.

In: a model folder. Out: another with the same tensors, bit for bit, in safetensors, a shard of the old ones at a time;
everything that is no weight is copied. Nothing is unpickled (see weights/bins.py).
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import save_file

from fitune.core.errors import ModelError
from fitune.core.files import check_new, expand, whole_folder
from fitune.models import weights
from fitune.models.locate import locate
from fitune.models.weights import bins


@dataclass(frozen=True)
class Converted:
    """What was written."""

    folder: str
    tensors: int
    files: int

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def convert(model: str | Path, output: str | Path) -> Converted:
    """Write a model's `.bin` weights as safetensors.

    Args:
        model: a folder with pytorch_model.bin, or its shards and their index.
        output: a folder that is not there yet, or is empty.

    Raises:
        ModelError: there is nothing to convert, or a file that cannot be trusted.
        RunFolderError: the folder is not empty.
    """
    folder, target = locate(str(model)), expand(output)
    check_new(target, whole=True)
    weights.check(folder)
    if not weights.is_bin(folder):
        raise ModelError(f"{folder}: its weights are safetensors already")
    if wrong := weights.broken(folder):
        raise ModelError(f"{folder}: {'; '.join(wrong)}", fix="download the model again")
    old = weights.files(folder)
    with whole_folder(target) as place:
        where: dict[str, str] = {}
        count = total = 0
        for number, file in enumerate(old):
            name = weights.SAFE if len(old) == 1 else f"model-{number + 1:05}-of-{len(old):05}.safetensors"
            # clones: tensors that share memory, as tied weights do, are written each by itself
            held = {key: tensor.contiguous().clone() for key, tensor in bins.tensors([file])}
            save_file(held, place / name, metadata={"format": "pt"})
            where |= dict.fromkeys(held, name)
            count, total = count + len(held), total + sum(t.numel() * t.element_size() for t in held.values())
        if len(old) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": where}
            (place / weights.SAFE_INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
        for other in folder.iterdir():
            if other.is_file() and other.suffix != ".bin" and other.name != weights.BIN_INDEX:
                shutil.copyfile(other, place / other.name)
    return Converted(str(target), count, len(old))
