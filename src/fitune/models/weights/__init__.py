"""The weights of a model folder, in whichever of its formats they lie: safetensors, or torch's old `.bin` files.

In: a folder. Out: its files, checked against its index and their own headers; names, dtypes, and tensors one at a time,
mapped into memory. Everything that reads weights goes through here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fitune.core.errors import ModelError
from fitune.core.untrusted import check_depth, read_json
from fitune.data import sums
from fitune.models.weights import bins, safe

SAFE, SAFE_INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def index_of(folder: Path) -> Path | None:
    """The file that says which shard holds which tensor, where the model is in shards."""
    for single, index in ((SAFE, SAFE_INDEX), (BIN, BIN_INDEX)):
        if (folder / single).is_file():
            return None
        if (folder / index).is_file():
            return folder / index
    return None


def read_index(path: Path) -> dict[str, str]:
    """Tensor to shard.

    Raises:
        ModelError: it is broken, or names a file outside of its folder.
    """
    try:
        found = read_json(path)["weight_map"]
        if not all(isinstance(name, str) and isinstance(shard, str) for name, shard in found.items()):
            raise TypeError("weight_map: names and files are texts")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: cannot be read", received=" ".join(str(error).split())[:200]) from None
    wrong = sorted({shard for shard in found.values() if Path(shard).name != shard or shard in ("", ".", "..")})
    if wrong:
        raise ModelError(f"{path}: names a file outside of its folder", received=wrong[0])
    return dict(found)


def files(folder: Path) -> list[Path]:
    """The files that hold a model: the one, or the shards of its index. Others may lie beside them."""
    for single in (SAFE, BIN):
        if (folder / single).is_file():
            return [folder / single]
        if (index := index_of(folder)) is not None:
            return sorted(folder / shard for shard in set(read_index(index).values()))
    return sorted(folder.glob("*.safetensors"))


def check(folder: Path) -> None:
    """Raises ModelError unless the folder holds weights, each shard of its index included."""
    there = files(folder)
    if any(SHARD.fullmatch(file.name) for file in there) and index_of(folder) is None:
        raise ModelError(
            f"{folder}: weights are missing",
            received=f"shards without an index: {', '.join(file.name for file in there[:5])}",
            expected=f"{SAFE}.index.json beside them",
            fix="download that file, too",
        )
    missing = [file.name for file in there if not file.is_file()]
    if missing:
        index = index_of(folder)
        raise ModelError(
            f"{folder}: weights are missing",
            received=f"{', '.join(missing[:5])} not there",
            expected=index.name if index else SAFE,
            fix="download the missing files",
        )
    if there:
        return
    others = sorted(path.name for path in folder.glob("*.bin"))
    raise ModelError(
        f"{folder}: no weights",
        received=f"{', '.join(others[:5])}, which no index names" if others else "no *.safetensors",
        expected=f"{SAFE}, {BIN}, or an index with its shards",
        fix="copy the weights into the folder",
    )


def broken(folder: Path) -> list[str]:
    """What is wrong with the files, by their own headers and the index: one line each."""
    wrong = [text for file in files(folder) if file.is_file() and (text := _broken(file))]
    index = index_of(folder)
    if index is None or wrong:
        return wrong
    listed = read_index(index)
    for shard in sorted(set(listed.values())):
        if not (folder / shard).is_file():
            wrong.append(f"{shard} is missing")
            continue
        there = set(names(folder / shard))
        meant = {name for name, file in listed.items() if file == shard}
        if lacking := sorted(meant - there):
            wrong.append(f"{shard} lacks {len(lacking)} tensors that the index names: {', '.join(lacking[:3])}")
        if extra := sorted(there - meant):
            wrong.append(f"{shard} has {len(extra)} tensors that the index does not name: {', '.join(extra[:3])}")
    return wrong


def _broken(file: Path) -> str | None:
    """What is wrong with a file, by its own header."""
    if file.suffix != ".safetensors":
        try:
            bins.Bin(file)
        except ModelError as error:
            return error.what
        return None
    there = file.stat().st_size
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if size > there - 8:
            return f"{file.name} is cut off: {there:,} bytes"
        try:
            header = json.loads(stream.read(size))
            check_depth(header)
            end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            return f"{file.name} has no readable header"
    expected = 8 + size + end
    return None if there == expected else f"{file.name} has {there:,} bytes, its header says {expected:,}"


def names(file: Path) -> list[str]:
    """The tensors of a file."""
    if file.suffix != ".safetensors":
        return bins.Bin(file).keys()
    with safe.opened(file) as opened:
        return list(opened.keys())


def tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a folder, mapped into memory."""
    for file in files(folder):
        if file.suffix != ".safetensors":
            yield from bins.tensors([file])
            continue
        with safe.opened(file) as opened:
            for name in opened.keys():  # noqa: SIM118
                yield name, opened.get_tensor(name)


def is_bin(folder: Path) -> bool:
    """Do the weights lie in torch's old format?"""
    return any(file.suffix != ".safetensors" for file in files(folder))


def dtypes(file: Path) -> Iterator[tuple[torch.dtype, int]]:
    """Of each floating-point tensor of 16 or 32 bits in a file its dtype and bytes."""
    if file.suffix != ".safetensors":
        for place in bins.Bin(file).places.values():
            if place.dtype in FLOATS.values():
                yield place.dtype, torch.Size(place.shape).numel() * place.dtype.itemsize
        return
    for name, entry in _header(file).items():
        if name != "__metadata__" and entry["dtype"] in FLOATS:
            start, end = entry["data_offsets"]
            yield FLOATS[entry["dtype"]], end - start


def _header(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        header: dict[str, object] = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return header


def scales(files_: Iterable[Path]) -> str:
    """The dtype of the scales of packed layers in safetensors files."""
    for file in files_:
        for name, entry in _header(file).items():
            if name.endswith(("scales", "weight_scale", "weight_scale_inv")) and entry["dtype"] in FLOATS:
                return str(FLOATS[entry["dtype"]]).removeprefix("torch.")
    return "float16"


def stored_dtype(folder: Path) -> torch.dtype:
    """As what most of a folder's weights are stored; what is no float of 16 or 32 bits does not count."""
    counts: dict[torch.dtype, int] = {}
    for file in files(folder):
        for dtype, count in dtypes(file):
            counts[dtype] = counts.get(dtype, 0) + count
    return max(counts, key=lambda dtype: counts[dtype]) if counts else torch.float32


def summed(folder: Path, *, fresh: bool = False) -> dict[str, dict[str, Any]]:
    """Of each file the length and the sum of all that is in it: `facts` are the same for every fine-tune.

    Args:
        folder: of a model.
        fresh: believe no sum that was kept (sums.py).
    """
    return {file.name: sums.summed(file, fresh=fresh) for file in files(folder)}


def facts(folder: Path) -> dict[str, list[Any]]:
    """Of each file: bytes, and the SHA-256 of what names its tensors (a header; of a `.bin` its table of entries)."""
    found: dict[str, list[Any]] = {}
    for file in files(folder):
        if file.suffix != ".safetensors":
            header = repr([(name, place.shape, place.start) for name, place in bins.Bin(file).places.items()]).encode()
        else:
            with file.open("rb") as stream:
                size = int.from_bytes(stream.read(8), "little")
                header = stream.read(size) if size < 1 << 30 else b""
        found[file.name] = [file.stat().st_size, hashlib.sha256(header).hexdigest()]
    return found
