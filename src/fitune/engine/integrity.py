"""The seal of a run folder: its files are those that the run wrote, and belong to this run and no other.

In: a run folder. Out: `seal.json`, with checksums of the files that commands rely on and with the run's identity: an id
of its own, digests of settings, data, template and base weights. It is written before the first step over what a run
begins with, and again at the end over what it made; each checkpoint holds the same identity. Every command that reads a
run checks what it reads. Pages, the model card and files whose names begin with a dot are not sealed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shlex
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fitune.core.config import RunConfig
from fitune.core.errors import RunFolderError
from fitune.core.files import MANIFEST, disk, read_summed, sync, with_own_sum, write_atomic, write_json
from fitune.core.records import Finding
from fitune.data import sums
from fitune.data.cache import key
from fitune.engine.checkpoint import SEAL, RunFolder

BEGIN = (
    "config.yaml", "template.json", "data.json", "before.json", "plan.json", "environment.json", "measured.json",
    "tokenizer",
)  # fmt: skip
AGAIN = ("adapter", "answers.json", "result.json")  # of END: quickly made again from the last checkpoint
END = ("adapter", "answers.json", "result.json", "steps.jsonl", "checks.json")
MODEL = ("config.yaml", "template.json", "data.json", "tokenizer", "adapter")  # a run's model is made of these
FOLDERS = ("tokenizer", "adapter")
FREE = ("README.md",)  # the model card is the user's to edit
# settings that may change when a run goes on: places of files, where states wait, whether what may not fit is tried,
# how long processes wait for each other, who follows the run
PLACES = (
    "output", "model", "data", "eval_data", "adapter", "cache", "cache_size", "frozen_cache", "force",
    "parallel", "collective_timeout", "track", "track_project",
)  # fmt: skip
TENSORS = "the base's tensors"  # the sums of the base's files, among the inputs in data.json
Sum = dict[str, int | str]  # bytes and SHA-256 of a file


@dataclass(frozen=True)
class Seal:
    """The content of seal.json.

    identity: of the run. finished: the run was. files: the sum of each sealed file. replacing: the new sums of files
    that are being replaced (`or` in the file).
    """

    identity: dict[str, str]
    finished: bool
    files: dict[str, Sum]
    replacing: dict[str, Sum] = field(default_factory=dict)


def read(run: RunFolder) -> Seal | None:
    """The seal; None: the run has none.

    Raises:
        RunFolderError: it is damaged.
    """
    path = run.path / SEAL
    if not path.exists():
        return None
    found = read_summed(path)
    if found is None or not {"identity", "finished", "files"} <= set(found):
        raise RunFolderError(f"{path}: damaged, so nothing of this run can be checked", fix=_fix(run))
    return Seal(found["identity"], bool(found["finished"]), found["files"], found.get("or", {}))


def _fix(run: RunFolder, *, again: bool = False) -> str:
    resumed = f"fitune train --resume --output {shlex.quote(str(run.path))}"
    made = f"or remove it, and {resumed} makes it again; " if again else ""
    return f"restore it from a copy; {made}if it was changed on purpose: fitune reseal {shlex.quote(str(run.path))}"


def begin(run: RunFolder) -> None:
    """Seal what a run begins with; from now on its checkpoints hold its identity."""
    run.identity = identity_of(run, uuid.uuid4().hex)
    _write(run, finished=False, names=BEGIN)


def end(run: RunFolder) -> None:
    """Seal all of a finished run.

    Raises:
        RunFolderError: what it began with, or its log, was changed in the meantime.
    """
    run.check_log()
    check(run, BEGIN)
    run.identity = run.identity or identity_of(run, uuid.uuid4().hex)
    _write(run, finished=True, names=(*BEGIN, *END))


def was_finished(run: RunFolder) -> bool:
    """Does the seal say that the run was finished?"""
    seal = read(run)
    return seal is not None and seal.finished


def complete(run: RunFolder) -> bool:
    """Are all files of a finished run there? Where one that the seal names is missing, the run counts as unfinished,
    and is sealed as such."""
    seal = read(run)
    if seal is None or not seal.finished:
        return False
    if all((run.path / name).is_file() for name in seal.files):
        return True
    reopen(run)
    return False


def reopen(run: RunFolder) -> None:
    """Seal only what the run began with: what it made is to be made again."""
    _write(run, finished=False, names=BEGIN)


def _write(run: RunFolder, *, finished: bool, names: Sequence[str]) -> None:
    files: dict[str, Sum] = {}
    with disk(run.path):
        for name, path in _files(run, names):
            sync(path)
            files[name] = sums.summed(path)
    _store(run, Seal(run.identity or {}, finished, files))


def _store(run: RunFolder, seal: Seal) -> None:
    values = {"identity": seal.identity, "finished": seal.finished, "files": seal.files}
    write_json(run.path / SEAL, with_own_sum({**values, "or": seal.replacing} if seal.replacing else values))


def replace(run: RunFolder, name: str, text: str) -> None:
    """Write a sealed file anew. In between the seal names both, so that a kill leaves a seal that fits.

    Args:
        run: the run; where it has no seal, the file is just written.
        name: of the file.
        text: its new content.
    """
    seal, content = read(run), text.encode()
    if seal is None or name not in seal.files:
        write_atomic(run.path / name, text)
        return
    entry: Sum = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    _store(run, dataclasses.replace(seal, replacing={name: entry}))
    write_atomic(run.path / name, text)
    _store(run, dataclasses.replace(seal, files={**seal.files, name: entry}, replacing={}))


def _files(run: RunFolder, names: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """The files that are there, by their names in the run folder."""
    for name in names:
        path = run.path / name
        if name not in FOLDERS:
            if path.is_file():
                yield name, path
        elif path.is_dir():
            for file in sorted(path.rglob("*")):
                inside = file.relative_to(path)
                hidden = any(part.startswith(".") for part in inside.parts)
                if file.is_file() and not hidden and inside.as_posix() not in FREE:
                    yield f"{name}/{inside.as_posix()}", file


def identity_of(run: RunFolder, own: str) -> dict[str, str]:
    """The identity of a run, from the files of its folder.

    Args:
        run: with its settings, data and template written.
        own: an id that no other run has.
    """
    data = run.read("data")
    return {
        "id": own,
        "settings": key(settings(run.read_config())),
        "data": key(list(data["sha256"].values())),
        "template": key(run.read("template")),
        "base": key(data.get("inputs", {}).get(TENSORS)),
    }


def settings(config: RunConfig) -> dict[str, object]:
    """The settings that decide what a run computes."""
    return {name: value for name, value in config.model_dump(mode="json").items() if name not in PLACES}


def changes(run: RunFolder, seal: Seal, names: Sequence[str]) -> dict[str, str]:
    """The files that differ from the seal: the name of each, and how it differs.

    Args:
        run: the run.
        seal: its seal.
        names: the files and folders that are compared.
    """
    sealed = {name: one for name, one in seal.files.items() if name.partition("/")[0] in names}
    there = dict(_files(run, [name for name in names if seal.finished or name not in END]))
    either = seal.replacing
    found = {name: _how(run.path / name, one) for name, one in sealed.items()}
    found = {name: how for name, how in found.items() if name not in either or _how(run.path / name, either[name])}
    found |= {name: "is there and was not sealed" for name in there if name not in sealed}
    return {name: how for name, how in sorted(found.items()) if how}


def _how(path: Path, entry: Sum) -> str:
    try:
        if not path.is_file():
            return "is no file" if path.exists() else "is missing"
        if (size := path.stat().st_size) != entry["bytes"]:
            return f"has {size:,} bytes, had {entry['bytes']:,}"
        return "" if sums.matches(path, entry) else "has other bytes"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def check(run: RunFolder, names: Sequence[str] = MODEL, *, missing: Sequence[str] = ()) -> Finding | None:
    """Check what a command is about to read. Sets the run's identity.

    Args:
        run: the run.
        names: the files and folders that it reads.
        missing: files that may be missing: they are made again, or the command does without.

    Returns:
        A warning where the run has no seal: it was made before there were seals.

    Raises:
        RunFolderError: files differ from the seal; the message names all of them.
    """
    seal = read(run)
    if seal is None:
        return run_seal(run)
    run.identity = seal.identity
    wrong = {
        name: how
        for name, how in changes(run, seal, names).items()
        if not (how == "is missing" and name.partition("/")[0] in missing)
    }
    if wrong:
        raise RunFolderError(
            f"{run.path}: not as the run left it: {', '.join(list(wrong)[:5])}{' ...' if len(wrong) > 5 else ''}",
            received="; ".join(f"{name} {how}" for name, how in list(wrong.items())[:10]),
            expected=f"the files that {SEAL} has the checksums of",
            fix=_fix(run, again=all(name.partition("/")[0] in AGAIN for name in wrong)),
        )
    return None


def check_adapter(folder: Path) -> None:
    """Check an adapter folder that is given by itself, where its run has a seal.

    Raises:
        RunFolderError: a file in it differs from the seal.
    """
    if folder.name == "adapter" and (folder.resolve().parent / SEAL).is_file():
        check(RunFolder(folder.resolve().parent), ("adapter",))


def run_seal(run: RunFolder) -> Finding:
    """Warns that a run was made before runs were sealed, so that nothing of it can be checked.

    Raises:
        RunFolderError: a checkpoint says that the run was sealed: its seal was lost.
    """
    if carried(run) is not None:
        raise RunFolderError(
            f"{run.path}: no {SEAL}, so nothing of this run can be checked",
            received="its checkpoints say that it was sealed",
            fix=_fix(run),
        )
    text = f"{run.path}: no {SEAL}: made before runs were sealed, so nothing of it can be checked"
    return Finding("run-seal", "warn", text, f"fitune reseal {run.path} seals it as it is now")


def carried(run: RunFolder) -> dict[str, str] | None:
    """The identity that the newest checkpoint holds."""
    found = [read_summed(path / MANIFEST) or {} for path in sorted(run.checkpoints.glob("step-*"), reverse=True)]
    return next((one["run"] for one in found if one.get("run")), None)


def reseal(run: RunFolder) -> list[str]:
    """Accept the files of a run as they are now: changed on purpose, or with a seal that was lost.

    Args:
        run: no process works in it.

    Returns:
        The files that differed from the seal, and how.

    Raises:
        RunFolderError: a file cannot be read, or a run without a seal is not finished.
    """
    try:
        seal = read(run)
    except RunFolderError:
        seal = None
    if seal is None:
        return _seal_anew(run)
    every = (*BEGIN, *END)
    wrong = changes(run, seal, every)
    now, identity = identity_of(run, seal.identity["id"]), seal.identity
    parts = {"config.yaml": ["settings"], "template.json": ["template"], "data.json": ["data", "base"]}
    changed = [part for name, some in parts.items() if name in wrong for part in some]
    run.identity = {**identity, **{part: now[part] for part in changed}}
    _all(run, finished=seal.finished)
    return [f"{name} {how}" for name, how in wrong.items()]


def _seal_anew(run: RunFolder) -> list[str]:
    """A run whose seal was lost gets the identity that its checkpoints hold."""
    finished = _is_there(run)
    identity = carried(run)
    if identity is None and not finished:
        raise RunFolderError(
            f"{run.path}: made before runs were sealed, and not finished",
            fix=f"finish it, which seals it: fitune train --resume --output {shlex.quote(str(run.path))}",
        )
    run.identity = identity or identity_of(run, uuid.uuid4().hex)
    _all(run, finished=finished)
    return [f"{SEAL} was not there, or damaged"]


def _is_there(run: RunFolder) -> bool:
    return run.has("result") and run.adapter.is_dir()


def _all(run: RunFolder, *, finished: bool) -> None:
    """Seal the files that are there; a run without a result is not finished: --resume makes it again."""
    finished = finished and _is_there(run)
    _write(run, finished=finished, names=(*BEGIN, *END) if finished else BEGIN)
