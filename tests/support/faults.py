"""A disk that fails, or a process that is killed, at any chosen write of a piece of work.

Every rename, fsync, folder made and file opened for writing is counted, in this process. At the chosen one the disk is
full from then on; or the process is dead: half of the file is there, and nothing more is written, renamed or removed,
whatever a handler tries.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
import safetensors.torch
from safetensors import serialize_file

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
How = Literal["kill", "full", "stop"]


class Killed(BaseException):
    """The end of a process that cannot be caught; all that it tries afterwards raises it again."""


class Seam:
    """Counts the writes below a folder.

    Args:
        root: what lies elsewhere is not counted, and works.
        at: the write that fails, from 1; None: none does.
        how: kill: the process is dead. full: the disk is. stop: Ctrl-C.
    """

    def __init__(self, root: Path, at: int | None, how: How) -> None:
        self.root, self.at, self.how = str(root), at, how
        self.count = 0
        self.struck = False
        self.log: list[str] = []

    def inside(self, path: Any) -> bool:
        return isinstance(path, (str, os.PathLike)) and str(Path(path).absolute()).startswith(self.root)

    def write(self, what: str, path: Any, half: Callable[[], Any] | None = None) -> None:
        """One write; half: leaves what a killed process would."""
        if not self.inside(path):
            return
        if self.struck and self.how == "kill":
            raise Killed
        self.count += 1
        self.log.append(f"{what} {os.fspath(path)[len(self.root) + 1 :]}")
        if self.count == self.at:
            self.struck = True
            if self.how != "full" and half is not None:
                half()
            if self.how != "full":
                raise Killed if self.how == "kill" else KeyboardInterrupt
        if self.struck and self.how == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(path))

    def removal(self, path: Any) -> None:
        if self.struck and self.how == "kill" and self.inside(path):
            raise Killed


@contextmanager
def seam(root: Path, at: int | None = None, how: How = "kill") -> Iterator[Seam]:
    """Inside, the writes below root are counted, and one of them fails."""
    here = Seam(root.absolute(), at, how)
    opened, low, replace, rename, mkdir = io.open, os.open, os.replace, os.rename, os.mkdir
    fsync, unlink, rmdir, saved = os.fsync, os.unlink, os.rmdir, serialize_file

    def open_(file: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if set(mode) & set("wax+"):
            here.write("open", file, lambda: opened(file, mode, *rest, **more).close())
        return opened(file, mode, *rest, **more)

    def low_open(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & WRITES and more.get("dir_fd") is None:
            here.write("open", path)
        return low(path, flags, *rest, **more)

    def named(handle: int) -> str:
        return str(link.readlink()) if (link := Path(f"/proc/self/fd/{handle}")).is_symlink() else here.root

    def sync(handle: int) -> None:
        here.write("fsync", named(handle))
        fsync(handle)

    def moved(what: Callable[..., None]) -> Callable[..., None]:
        def move(source: Any, target: Any, **more: Any) -> None:
            here.write("rename", target)
            what(source, target, **more)

        return move

    def made(path: Any, *rest: Any, **more: Any) -> None:
        here.write("mkdir", path)
        mkdir(path, *rest, **more)

    def gone(what: Callable[..., None]) -> Callable[..., None]:
        def remove(path: Any, *rest: Any, **more: Any) -> None:
            if here.struck and here.how == "kill" and more.get("dir_fd") is not None:
                raise Killed
            here.removal(path)
            what(path, *rest, **more)

        return remove

    def save(tensors: Any, file: Any, **more: Any) -> None:
        def half() -> None:
            saved(tensors, file, **more)
            os.truncate(file, Path(file).stat().st_size // 2)

        here.write("save", file, half)
        saved(tensors, file, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "open", open_)
        patch.setattr(io, "open", open_)
        patch.setattr(os, "open", low_open)
        patch.setattr(os, "fsync", sync)
        patch.setattr(os, "replace", moved(replace))
        patch.setattr(os, "rename", moved(rename))
        patch.setattr(os, "mkdir", made)
        patch.setattr(os, "unlink", gone(unlink))
        patch.setattr(os, "remove", gone(unlink))
        patch.setattr(os, "rmdir", gone(rmdir))
        patch.setattr(safetensors.torch, "serialize_file", save)
        yield here


def some(points: int, how_many: int, seed: int) -> list[int]:
    """So many of the points, drawn; the last is among them."""
    return sorted([points, *random.Random(seed).sample(range(1, points), min(how_many, points) - 1)])
