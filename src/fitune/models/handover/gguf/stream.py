"""A GGUF written tensor by tensor.

In: metadata, pieces, the type of the numbers. Out: a file. Headers are written first, since all sizes are known; then
each tensor is read, turned into its type some rows at a time, and forgotten: no more than one tensor and a few rows of
it are in memory.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType, quants
from numpy.typing import NDArray
from torch import Tensor

from fitune.core.errors import ModelError
from fitune.models.handover.gguf.names import EMBEDDING, HEAD, Piece

T = GGMLQuantizationType
TYPES: dict[str, tuple[GGMLQuantizationType, LlamaFileType]] = {
    "f32": (T.F32, LlamaFileType.ALL_F32),
    "f16": (T.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (T.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (T.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (T.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}
ROWS = 1 << 24  # numbers that are turned at once
MOST_F16 = 65504.0
PLAIN = ("ffn_gate_inp", "rope_f", "position_embd", "norm")  # names of tensors that llama.cpp computes in float32


def type_of(piece: Piece, wanted: str) -> GGMLQuantizationType:
    """The type of a tensor: float32 for vectors, norms and routers; rows that no block fits into are float16; and where
    the rest has 4 bits, the embedding and the head have 8."""
    kind, _ = TYPES[wanted]
    if len(piece.shape) < 2 or any(part in piece.name for part in PLAIN):
        return T.F32
    if kind == T.Q4_0 and piece.name in (EMBEDDING, HEAD):
        kind = T.Q8_0
    return T.F16 if piece.shape[-1] % GGML_QUANT_SIZES[kind][0] else kind


def write(file: Path, name: str, metadata: Mapping[str, Any], pieces: Sequence[Piece], wanted: str) -> None:
    """Write the file.

    Args:
        file: to write; it may be there, and empty.
        name: of the architecture.
        metadata: keys and values.
        pieces: all tensors.
        wanted: their type, one of TYPES.

    Raises:
        ModelError: numbers that the type cannot hold.
    """
    writer = GGUFWriter(file, name)
    add(writer, metadata)
    writer.add_file_type(TYPES[wanted][1])
    if wanted.startswith("q"):
        writer.add_quantization_version(2)
    for piece in pieces:
        kind = type_of(piece, wanted)
        writer.add_tensor_info(piece.name, _stored_shape(piece.shape, kind), _dtype(kind), _bytes(piece, kind), kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        stream = writer.fout[0]
        writer.write_padding(stream, stream.tell())
        for piece in pieces:
            start = stream.tell()
            for array in encoded(piece, type_of(piece, wanted)):
                stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
                del array  # a view of the tensor: the next one is not read beside it
            writer.write_padding(stream, stream.tell() - start)
        stream.flush()
        os.fsync(stream.fileno())
    finally:
        writer.close()


def add(writer: GGUFWriter, metadata: Mapping[str, Any]) -> None:
    """Keys and values, each in llama.cpp's type for what it is."""
    logging.getLogger("gguf.gguf_writer").setLevel(logging.ERROR)
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)


def _dtype(kind: GGMLQuantizationType) -> np.dtype[Any]:
    """As the writer calls what is stored."""
    return np.dtype({T.F32: np.float32, T.F16: np.float16}.get(kind, np.uint8))


def _stored_shape(shape: Sequence[int], kind: GGMLQuantizationType) -> Sequence[int]:
    """Sizes in bytes along the last axis, for types that are packed."""
    if kind in (T.F32, T.F16):
        return shape
    return quants.quant_shape_to_byte_shape(shape, kind)


def _bytes(piece: Piece, kind: GGMLQuantizationType) -> int:
    block, size = GGML_QUANT_SIZES[kind]
    return int(np.prod(piece.shape)) // block * size


def encoded(piece: Piece, kind: GGMLQuantizationType) -> Iterator[NDArray[Any]]:
    """The bytes of a tensor, some rows at a time.

    Raises:
        ModelError: numbers that are not finite, or too large for float16.
    """
    for part in piece.parts:
        for rows in _some_rows(part()):
            array = rows.float().contiguous().numpy()
            largest = float(np.abs(array).max(initial=0.0))
            if not largest <= (MOST_F16 if kind == T.F16 else np.finfo(np.float32).max):
                raise ModelError(
                    f"{piece.name}: numbers that {kind.name.lower()} cannot hold",
                    received=f"{largest:g}",
                    expected=f"at most {MOST_F16:g}" if kind == T.F16 and np.isfinite(largest) else "finite numbers",
                    fix="--type f32 or bf16" if np.isfinite(largest) else "train again: the weights are broken",
                )
            yield array if kind == T.F32 else quants.quantize(array, kind)


def _some_rows(tensor: Tensor) -> Iterator[Tensor]:
    if tensor.dim() < 2:
        yield tensor
        return
    yield from tensor.split(max(1, ROWS // max(1, tensor[0].numel())))
