"""A GGUF read back and compared with what was to be written: every key, every tensor, byte for byte.

In: a file, the draft of it. Out: what differs, the first place first. It finds damage and mistakes in writing; whether
llama.cpp makes of the file what transformers makes of the model is compared elsewhere (commands/same_answers.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, Keys

from fitune.models.handover.gguf import Draft, stream
from fitune.models.handover.gguf.names import Piece

OWN = (
    "GGUF.version",
    "GGUF.tensor_count",
    "GGUF.kv_count",
    Keys.General.ARCHITECTURE,
    Keys.General.FILE_TYPE,
    Keys.General.QUANTIZATION_VERSION,
)
MOST = 5  # differences that are listed


def differences(file: Path, draft: Draft, wanted: str) -> list[str]:
    """What differs; empty: nothing does.

    Args:
        file: the file.
        draft: what it was to hold.
        wanted: the type of its numbers.
    """
    try:
        reader = GGUFReader(file)
    except Exception as error:  # the reader raises whatever a broken file leads it to
        return [f"it cannot be read: {' '.join(str(error).split())[:200] or type(error).__name__}"]
    found = _keys(reader, draft, wanted)
    by_name = {tensor.name: tensor for tensor in reader.tensors}
    meant = {piece.name for piece in draft.pieces}
    found += [f"{name}: a tensor that was not to be there" for name in by_name if name not in meant]
    for piece in draft.pieces:
        if len(found) >= MOST:
            break
        tensor = by_name.get(piece.name)
        found += [f"{piece.name}: is missing"] if tensor is None else _tensor(tensor, piece, wanted)
    return found


def _keys(reader: GGUFReader, draft: Draft, wanted: str) -> list[str]:
    expected = {
        **draft.metadata,
        Keys.General.ARCHITECTURE: draft.architecture.name,
        Keys.General.FILE_TYPE: int(stream.TYPES[wanted][1]),
    }
    found = []
    for key, value in expected.items():
        field = reader.get_field(key)
        if field is None:
            found.append(f"{key}: is missing")
        elif (text := _differs(field.contents(), value)) is not None:
            found.append(f"{key}: {text}")
    extra = [key for key in reader.fields if key not in expected and key not in OWN]
    return found + [f"{key}: was not to be there" for key in extra]


def _differs(there: Any, meant: Any) -> str | None:
    """Where two values part; None: they do not."""
    if isinstance(meant, list):
        if len(there) != len(meant):
            return f"{len(there):,} entries for {len(meant):,}"
        for n, (one, other) in enumerate(zip(there, meant, strict=True)):
            if not _same(one, other):
                return f"entry {n:,} is {one!r} for {other!r}"
        return None
    if _same(there, meant):
        return None
    if isinstance(meant, str) and isinstance(there, str):
        place = next(
            (n for n, (a, b) in enumerate(zip(there, meant, strict=False)) if a != b), min(map(len, (there, meant)))
        )
        return f"at character {place:,}: {there[place : place + 20]!r} for {meant[place : place + 20]!r}"
    return f"{there!r} for {meant!r}"


def _same(there: Any, meant: Any) -> bool:
    if isinstance(meant, float):
        return bool(np.float32(there) == np.float32(meant))
    return bool(there == meant)


def _tensor(tensor: Any, piece: Piece, wanted: str) -> list[str]:
    """What differs in one tensor."""
    kind = stream.type_of(piece, wanted)
    if tensor.tensor_type != kind:
        return [f"{piece.name}: {tensor.tensor_type.name} for {kind.name}"]
    if tuple(int(size) for size in reversed(tensor.shape)) != piece.shape:
        return [f"{piece.name}: {tuple(int(size) for size in reversed(tensor.shape))} for {piece.shape}"]
    there = tensor.data.reshape(-1).view(np.uint8)
    start = 0
    for array in stream.encoded(piece, kind):
        meant = array.reshape(-1).view(np.uint8)
        part = there[start : start + len(meant)]
        if not np.array_equal(part, meant):
            place = start + int(np.flatnonzero(part != meant)[0])
            return [f"{piece.name}: other numbers from byte {place:,} of {len(there):,} on"]
        start += len(meant)
    return []
