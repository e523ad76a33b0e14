"""The command line in forked processes, which are killed, and whose files fail, at a chosen place.

In: arguments. Out: how it ended and what it wrote. Everything that is needed is imported once, before the first fork,
so a child costs its own work alone. Places are counted by Python's audit events (open for writing, rename, mkdir,
remove) and by fsync; nothing of fitune is changed for it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
PATIENCE = 600.0  # seconds for a child that waits for others on a busy machine; of its own work it may do MOST_WORK
MOST_WORK = 90
MOST_CPU, MOST_MIB = 20.0, 2048  # of an input that is refused; torch and transformers themselves take some 500 MiB


@dataclass(frozen=True)
class Ran:
    """How a child ended: exit code (negative: by this signal), output, errors; events seen; its CPU seconds and MiB."""

    code: int
    out: str
    err: str
    cpu: float = 0.0
    mib: float = 0.0

    @property
    def traceback(self) -> bool:
        """It ended as no user should see it."""
        return "Traceback (most recent call last)" in self.err or self.code not in (0, 2, 130, -signal.SIGKILL)

    def last(self) -> str:
        """What it said last, for a row."""
        lines = [line for line in self.err.strip().splitlines() if line.strip()]
        return " | ".join(lines[-4:])[-400:]


@dataclass
class Trouble:
    """What happens in a child.

    Args:
        root: only events below this folder count.
        kill_at: SIGKILL at this event, from 0.
        kill_after: SIGKILL so many seconds after the start.
        fail_at: an OSError at this event, and `times` of them in all.
        number: the error's number.
        file_size: RLIMIT_FSIZE in bytes.
        record: write the events into this file.
        before: is called in the child before the command.
    """

    root: Path
    kill_at: int | None = None
    kill_after: float | None = None
    fail_at: int | None = None
    times: int = 1
    number: int = errno.EIO
    file_size: int | None = None
    record: Path | None = None
    before: Callable[[], None] | None = None
    seen: int = field(default=0, init=False)

    def start(self) -> None:
        """In the child: from here on."""
        prefix, real = str(self.root), os.fsync
        log = self.record.open("w", encoding="utf-8", buffering=1) if self.record else None

        def event(kind: str, path: str) -> None:
            number = self.seen
            self.seen += 1
            if log is not None:
                log.write(f"{kind} {path}\n")
            if number == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if self.fail_at is not None and self.fail_at <= number < self.fail_at + self.times:
                raise OSError(self.number, os.strerror(self.number), path)

        def hook(name: str, args: tuple[Any, ...]) -> None:
            if name in EVENTS and args and _counts(name, args) and (path := _text(args[0])).startswith(prefix):
                event(name, path)

        def fsync(fd: Any) -> None:
            path = str(Path(f"/proc/self/fd/{fd}").readlink()) if isinstance(fd, int) else ""
            if path.startswith(prefix):
                event("fsync", path)
            real(fd)

        os.fsync = fsync
        sys.addaudithook(hook)
        if self.file_size is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.file_size, self.file_size))
        if self.kill_after is not None:
            signal.signal(signal.SIGALRM, lambda number, frame: None)
            _kill_later(os.getpid(), self.kill_after)


def _counts(name: str, args: tuple[Any, ...]) -> bool:
    return name != "open" or (len(args) > 2 and bool((args[2] or 0) & WRITES))


def _text(path: object) -> str:
    try:
        return os.fspath(path).decode() if isinstance(path, bytes) else str(os.fspath(path))  # type: ignore[call-overload]
    except TypeError:
        return ""


def _kill_later(pid: int, seconds: float) -> None:
    """A process of its own that kills this one."""
    if os.fork() == 0:
        time.sleep(seconds)
        try:
            if os.getppid() == pid:
                os.kill(pid, signal.SIGKILL)
        finally:
            os._exit(0)


def start(words: Sequence[object], place: Path, trouble: Trouble | None = None, stdin: str = "") -> int:
    """Fork a child that runs `fitune WORDS`; its process id. Its output goes to place/out and place/err."""
    place.mkdir(parents=True, exist_ok=True)
    (place / "in").write_text(stdin, encoding="utf-8")
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        for number, name in enumerate(("in", "out", "err")):
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC if number else os.O_RDONLY
            os.dup2(os.open(place / name, flags, 0o644), number)
        code = _command([str(word) for word in words], trouble)
    finally:
        os._exit(code)


def _command(words: list[str], trouble: Trouble | None) -> int:
    from fitune.cli import main as cli

    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode) for n, mode in ((0, "r"), (1, "w"), (2, "w")))
    vars(sys).update(__stdout__=sys.stdout, __stderr__=sys.stderr)  # as in a process of its own
    sys.argv, code = ["fitune", *words], 0
    resource.setrlimit(resource.RLIMIT_CPU, (MOST_WORK, MOST_WORK))
    try:
        if trouble is not None:
            if trouble.before is not None:
                trouble.before()
            trouble.start()
        cli.main()
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else int(done.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            code = code or 1
    return code


def end(pid: int, place: Path, patience: float = PATIENCE) -> Ran:
    """Wait for a child; one that takes too long is killed, and has the code -9 with a word about it."""
    until, slow = time.monotonic() + patience, ""
    while True:
        done, status, used = os.wait4(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() > until and not slow:
            os.kill(pid, signal.SIGKILL)
            slow = f"\nkilled after {patience:.0f} s"
        time.sleep(0.004)
    texts = [(place / name).read_text(encoding="utf-8", errors="replace") for name in ("out", "err")]
    code = -999 if slow else os.waitstatus_to_exitcode(status)
    return Ran(code, texts[0], texts[1] + slow, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


def fitune(*words: object, place: Path, trouble: Trouble | None = None, stdin: str = "") -> Ran:
    """Run a command to its end."""
    return end(start(words, place, trouble, stdin), place)


# ---- what a run folder came to ----

FREE = {  # what differs from run to run: times, memory, the machine
    "seconds", "phases", "real_tokens_per_second", "peak_memory_mib", "expected_memory_mib", "run", "id", "pid", "host",
    "started", "created", "output",
}  # fmt: skip


def outcome(run: Path) -> dict[str, str]:
    """Digests of what a finished run hands on: the tensors, the steps, the result without its times."""
    found = {}
    for file in sorted((run / "adapter").glob("*.safetensors")):
        found[f"adapter/{file.name}"] = _sha(file.read_bytes())
    steps = run / "steps.jsonl"
    lines = steps.read_text(encoding="utf-8").splitlines() if steps.is_file() else []
    found["steps.jsonl"] = _sha(repr([_without_times(json.loads(line)) for line in lines]).encode())
    for name in ("result.json", "answers.json"):
        if (run / name).is_file():
            found[name] = _sha(repr(_without_times(json.loads((run / name).read_text(encoding="utf-8")))).encode())
    return found


def names(run: Path) -> set[str]:
    """The files of a run folder, but for checkpoints, whose steps differ with the kills, locks and logs."""
    found = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    return {n for n in found if not n.startswith("checkpoints/") and not n.endswith((".lock", ".log"))}


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_times(v) for k, v in sorted(value.items()) if k not in FREE and "digest" not in k}
    return value


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def temporary(root: Path) -> Path:
    """A new folder."""
    return Path(tempfile.mkdtemp(dir=root))


def together(tasks: Iterable[Callable[[], object]], workers: int) -> None:
    """Do tasks that leave files, so many at once, each in a process of its own.

    Raises:
        RuntimeError: one failed; its traceback is on standard error.
    """
    waiting, running = list(reversed(list(tasks))), 0
    while waiting or running:
        while waiting and running < workers:
            task = waiting.pop()
            running += 1
            if os.fork() == 0:
                code = 1
                try:
                    task()
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(code)
        _, status = os.wait()
        running -= 1
        if status:
            raise RuntimeError("what the cases are compared with could not be made")
