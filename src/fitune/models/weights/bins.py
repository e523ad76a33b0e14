"""Old `.bin` weights without unpickling: torch's zip files, read for what a state dict needs and nothing else.

In: a file that `torch.save` wrote. Out: its tensors by name, mapped into memory. The pickle inside is walked opcode by
opcode with a stack of our own: it may make dictionaries, tuples, texts and numbers, and it may name the few things that
a state dict names (tensor rebuild, storages, OrderedDict), which are symbols here. Nothing is imported, called or
executed; whatever else is named is refused, by its name.
"""

from __future__ import annotations

import pickletools
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fitune.core.errors import ModelError
from fitune.core.units import MIB

STORAGES = {
    "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16,
    "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
REBUILD, PARAMETER, ORDERED = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter", "OrderedDict"
KNOWN = {
    ("torch._utils", "_rebuild_tensor_v2"): REBUILD,
    ("torch._utils", "_rebuild_parameter"): PARAMETER,
    ("collections", "OrderedDict"): ORDERED,
    **{("torch", name): name for name in STORAGES},
}
WRAPPERS = ("state_dict", "module", "model")  # a checkpoint may hold its state dict under one of these names
LARGEST_PICKLE = 64 * MIB  # bytes; that of a model with ten thousand tensors has less than two million
MAGIC_OLD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # of torch before 1.6, which wrote no zip


@dataclass(frozen=True)
class Place:
    """A tensor in a file. Sizes and strides count elements, start bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class _Symbol:
    """A name that the pickle may use."""

    name: str


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    key: str
    count: int


Stack = list[object]  # of the pickle: texts, numbers, containers, and the symbols above
T = TypeVar("T")


class _Mark:
    """Where a group on the stack begins."""


class Bin:
    """The tensors of one file.

    Args:
        file: as `torch.save` wrote it, torch 1.6 or later.

    Raises:
        ModelError: it is damaged, or holds anything but a state dict. One line says what.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            self._open()
        except (zipfile.BadZipFile, OSError, EOFError, struct.error, RuntimeError, NotImplementedError) as error:
            raise self._bad(f"damaged: {' '.join(str(error).split())[:120]}") from None

    def _open(self) -> None:
        with self.file.open("rb") as stream:
            if stream.read(len(MAGIC_OLD)) == MAGIC_OLD:
                raise self._bad("in the format of torch before 1.6", fix="save it again with a newer torch")
        if not zipfile.is_zipfile(self.file):
            raise self._bad("not a zip file that torch wrote, or cut off")
        with zipfile.ZipFile(self.file) as archive:
            self.entries = self._checked(archive)
            pickles = [name for name in self.entries if name.endswith("/data.pkl")]
            if len(pickles) != 1 or pickles[0].count("/") != 1:
                raise self._bad(f"{len(pickles)} entries called data.pkl", expected="one")
            self.prefix = pickles[0].removesuffix("data.pkl")
            if self.entries[pickles[0]].file_size > LARGEST_PICKLE:
                raise self._bad(f"a pickle of {self.entries[pickles[0]].file_size:,} bytes")
            order = self.entries.get(f"{self.prefix}byteorder")
            if order is not None and (order.file_size > 16 or archive.read(order) != b"little"):
                raise self._bad("not in little-endian order")
            data = archive.read(pickles[0])
        self.places = self._places(self._walk(data))

    def _checked(self, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
        """The entries by name: stored as they are, inside the file, each once."""
        entries: dict[str, zipfile.ZipInfo] = {}
        size = self.file.stat().st_size
        for info in archive.infolist():
            name = info.filename
            if name in entries:
                raise self._bad(f"the entry {_brief(name)} is there twice")
            if name.startswith("/") or "\\" in name or ".." in name.split("/"):
                raise self._bad(f"an entry that leads out of the file: {_brief(name)}")
            if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
                raise self._bad(f"the entry {_brief(name)} is compressed or encrypted, which torch never does")
            if info.header_offset + info.file_size > size:
                raise self._bad(f"the entry {_brief(name)} is longer than the file")
            entries[name] = info
        return entries

    def _bad(self, what: str, *, expected: str | None = None, fix: str | None = None) -> ModelError:
        text = f"{self.file.name}: {what}"
        return ModelError(text, expected=expected, fix=fix or "download the file again, or its safetensors version")

    # ---- the pickle ----

    def _walk(self, data: bytes) -> object:
        """What the pickle describes, made of our own symbols."""
        stack: Stack = []
        memo: dict[int, object] = {}
        try:
            for opcode, argument, _ in pickletools.genops(data):
                if opcode.name == "STOP":
                    break
                step = getattr(self, f"_op_{opcode.name.lower()}", None)
                if step is not None:
                    step(stack, memo, argument)
                elif opcode.name in CONSTANTS:
                    stack.append(CONSTANTS[opcode.name])
                elif opcode.name in VALUES:
                    stack.append(argument)
                elif opcode.name not in NOTHING:
                    raise self._bad(f"its pickle wants {opcode.name}, which no state dict needs")
            (made,) = stack
        except ModelError:
            raise
        except (ValueError, IndexError, KeyError, TypeError, AttributeError, UnicodeError, OverflowError) as error:
            reason = " ".join(str(error).split())[:120]
            raise self._bad(f"its pickle makes no sense ({type(error).__name__}: {reason})") from None
        return made

    def _name(self, module: object, name: object) -> _Symbol:
        known = KNOWN.get((str(module), str(name)))
        if known is None:
            raise self._bad(f"its pickle names {_brief(f'{module}.{name}')}, which no state dict needs")
        return _Symbol(known)

    def _op_global(self, stack: Stack, memo: dict[int, object], argument: str) -> None:
        module, _, name = argument.partition(" ")
        stack.append(self._name(module, name))

    def _op_stack_global(self, stack: Stack, memo: dict[int, object], argument: None) -> None:
        name, module = stack.pop(), stack.pop()
        stack.append(self._name(module, name))

    def _op_mark(self, stack: Stack, memo: dict[int, object], argument: None) -> None:
        stack.append(_Mark())

    def _op_empty_dict(self, stack: Stack, memo: dict[int, object], argument: None) -> None:
        stack.append({})

    def _op_empty_list(self, stack: Stack, memo: dict[int, object], argument: None) -> None:
        stack.append([])

    def _op_empty_tuple(self, stack: Stack, memo: dict[int, object], argument: None) -> None:
        stack.append(())

    def _op_tuple(self, stack: Stack, memo: dict[int, object], argument: None) -> None:
        stack.append(tuple(_group(stack)))

    def _op_tuple1(self, stack: Stack, memo: dict[int, object], argument: None) -> None:
        stack[-1:] = [(stack[-1],)]

    def _op_tuple2(self, stack: Stack, memo: dict[int, object], argument: None) -> None:
        stack[-2:] = [(stack[-2], stack[-1])]

    def _op_tuple3(self, stack: Stack, memo: dict[int, object], argument: None) -> None:
        stack[-3:] = [(stack[-3], stack[-2], stack[-1])]

    def _op_append(self, stack: Stack, memo: dict[int, object], argument: None) -> None:
        value = stack.pop()
        self._a(list, stack[-1]).append(value)

    def _op_appends(self, stack: Stack, memo: dict[int, object], argument: None) -> None:
        values = _group(stack)
        self._a(list, stack[-1]).extend(values)

    def _op_setitem(self, stack: Stack, memo: dict[int, object], argument: None) -> None:
        value, key = stack.pop(), stack.pop()
        self._a(dict, stack[-1])[self._key(key)] = value

    def _op_setitems(self, stack: Stack, memo: dict[int, object], argument: None) -> None:
        values = _group(stack)
        for key, value in zip(values[::2], values[1::2], strict=True):
            self._a(dict, stack[-1])[self._key(key)] = value

    def _op_binput(self, stack: Stack, memo: dict[int, object], argument: int) -> None:
        memo[argument] = stack[-1]

    _op_long_binput = _op_binput

    def _op_memoize(self, stack: Stack, memo: dict[int, object], argument: None) -> None:
        memo[len(memo)] = stack[-1]

    def _op_binget(self, stack: Stack, memo: dict[int, object], argument: int) -> None:
        stack.append(memo[argument])

    _op_long_binget = _op_binget

    def _op_binpersid(self, stack: Stack, memo: dict[int, object], argument: None) -> None:
        kind, storage, key, _, count = self._a(tuple, stack.pop())
        if kind != "storage" or not isinstance(storage, _Symbol) or storage.name not in STORAGES:
            raise self._bad(f"a persistent id of another kind: {_brief(kind)}")
        if not isinstance(key, str) or not key.isalnum():
            raise self._bad(f"a storage called {_brief(key)}")
        stack.append(_Storage(STORAGES[storage.name], key, self._whole(count)))

    def _op_build(self, stack: Stack, memo: dict[int, object], argument: None) -> None:
        state = stack.pop()  # an OrderedDict's own attributes: torch keeps versions of modules there
        if not isinstance(stack[-1], dict) or not isinstance(state, dict) or set(state) - {"_metadata"}:
            raise self._bad("its pickle sets attributes, which no state dict needs")

    def _op_reduce(self, stack: Stack, memo: dict[int, object], argument: None) -> None:
        values, what = self._a(tuple, stack.pop()), stack.pop()
        if not isinstance(what, _Symbol):
            raise self._bad(f"its pickle calls {_brief(what)}, which no state dict needs")
        if what.name == ORDERED:
            if values not in ((), ([],)):
                raise self._bad("an OrderedDict made of something")
            stack.append({})
        elif what.name == PARAMETER:
            stack.append(self._a(Place, values[0]))
        elif what.name == REBUILD:
            stack.append(self._tensor(*values[:4]))
        else:
            raise self._bad(f"its pickle calls {what.name}, which is a name only")

    def _key(self, key: object) -> str | int:
        """Texts and numbers only: the hash of a tuple of tuples of tuples can take forever."""
        if not isinstance(key, (str, int)):
            raise self._bad(f"its pickle has {_brief(key)} for a key")
        return key

    def _a(self, kind: type[T], value: object) -> T:
        if not isinstance(value, kind):
            raise self._bad(f"its pickle has {_brief(value)} where {kind.__name__} is needed")
        return value

    def _whole(self, value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**62:
            raise self._bad(f"its pickle has {_brief(value)} where a size is needed")
        return value

    # ---- tensors ----

    def _tensor(self, storage: object, offset: object, shape: object, stride: object) -> Place:
        storage = self._a(_Storage, storage)
        sizes = tuple(self._whole(n) for n in self._a(tuple, shape))
        steps = tuple(self._whole(n) for n in self._a(tuple, stride))
        entry = self.entries.get(f"{self.prefix}data/{storage.key}")
        if entry is None:
            raise self._bad(f"the storage {storage.key} is not in the file")
        each = torch.empty(0, dtype=storage.dtype).element_size()
        if entry.file_size != storage.count * each:
            raise self._bad(
                f"the storage {storage.key} has {entry.file_size:,} bytes, its pickle says {storage.count * each:,}"
            )
        begin = self._whole(offset)
        last = begin + sum((size - 1) * step for size, step in zip(sizes, steps, strict=True))
        if 0 not in sizes and last >= storage.count:
            raise self._bad(f"a tensor that goes beyond its storage {storage.key}")
        return Place(storage.dtype, sizes, steps, self._start(entry) + begin * each)

    def _start(self, entry: zipfile.ZipInfo) -> int:
        """Where an entry's bytes begin: behind its own header, which gives its own length."""
        with self.file.open("rb") as stream:
            stream.seek(entry.header_offset)
            head = stream.read(30)
        if head[:4] != b"PK\x03\x04":
            raise self._bad(f"the entry {_brief(entry.filename)} has no header")
        name, extra = struct.unpack("<HH", head[26:30])
        start = entry.header_offset + 30 + int(name) + int(extra)
        if start + entry.file_size > self.file.stat().st_size:
            raise self._bad(f"the entry {_brief(entry.filename)} is longer than the file")
        return start

    def _places(self, made: object) -> dict[str, Place]:
        found: dict[str, Any] = self._a(dict, made)
        for name in WRAPPERS:
            if isinstance(found.get(name), dict) and not any(isinstance(value, Place) for value in found.values()):
                found = found[name]
        wrong = [key for key, value in found.items() if not isinstance(key, str) or not isinstance(value, Place)]
        if wrong or not found:
            raise self._bad(f"not a state dict: {_brief(wrong[0]) if wrong else 'empty'}", expected="tensors by name")
        return found

    def keys(self) -> list[str]:
        """The tensors' names, in the file's order."""
        return list(self.places)

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name, mapped: its bytes are read when they are used."""
        place = self.places[name]
        if 0 in place.shape:
            return torch.empty(place.shape, dtype=place.dtype)
        span = 1 + sum((size - 1) * step for size, step in zip(place.shape, place.stride, strict=True))
        each = torch.empty(0, dtype=place.dtype).element_size()
        # copy-on-write: torch wants memory that may be written, the file stays as it is
        raw = np.memmap(self.file, dtype=np.uint8, mode="c", offset=place.start, shape=(span * each,))
        flat = torch.from_numpy(np.asarray(raw) if place.start % each == 0 else np.array(raw))
        return flat.view(place.dtype).as_strided(place.shape, place.stride)


CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
VALUES = {
    "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
}  # fmt: skip
NOTHING = {"PROTO", "FRAME"}


def _brief(value: object) -> str:
    """A text or a number in short; of anything else its kind, since what it holds may be endless."""
    if isinstance(value, (str, int, float)):
        return repr(value if len(str(value)[:81]) < 80 else f"{str(value)[:77]}...")
    return type(value).__name__.strip("_")


def _group(stack: Stack) -> list[object]:
    """Everything above the last mark, taken off."""
    values: list[object] = []
    while not isinstance(stack[-1], _Mark):
        values.append(stack.pop())
    stack.pop()
    return values[::-1]


def tensors(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of some files, one file open at a time."""
    for file in files:
        opened = Bin(file)
        for name in opened.keys():  # noqa: SIM118
            yield name, opened.tensor(name)
