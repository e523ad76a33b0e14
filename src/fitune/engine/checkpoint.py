"""The run folder: all file names of a run are here, and every write is atomic.

    RUN/
      config.yaml  environment.json  template.json  plan.json  data.json  before.json  at the start
      tokenizer/                     the tokenizer's files
      steps.jsonl                    one StepRecord a line
      checks.json                    checks that were made during the run
      checkpoints/step-000120/       trainable, optimizer and RNG tensors, state.json, MANIFEST.json
      adapter/                       the result, PEFT's format or ours (models/adapters/), and what others need with it
      plan.html  measured.json       the memory that was planned, and that the largest step took
      answers.json  result.json  report.html       at the end
      seal.json                      checksums of these files, and the run's identity (integrity.py)
      run.lock                       while a process works in the folder (locks.py)

A checkpoint is a sealed folder (see files.py) whose manifest holds the run's identity, its step, and a digest of the
lines of steps.jsonl up to it; resume takes the newest that is complete and fits (resuming.py).
Files are safetensors and JSON; nothing is ever pickled or unpickled.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fitune.core import runfiles
from fitune.core.config import RunConfig, build
from fitune.core.errors import FituneError, RunFolderError
from fitune.core.files import TEMPORARY, as_json, disk, expand, is_whole, seal, sync, write_atomic, write_json
from fitune.core.records import StepRecord
from fitune.core.untrusted import read_json, read_yaml
from fitune.engine import optim
from fitune.models.weights import safe
from fitune.models.weights.safe import Late

SEAL = "seal.json"


@dataclass(frozen=True)
class Loaded:
    """A checkpoint as read: what `save` was given."""

    step: int
    trainable: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    optimizer_scalars: dict[str, object]
    rng: dict[str, Tensor]
    state: dict[str, object]


class RunFolder:
    """A run's folder. The module's docstring lists its files."""

    def __init__(self, path: str | Path) -> None:
        self.path = expand(path)
        self.identity: dict[str, str] | None = None  # of the run, by its seal; each checkpoint holds it
        self._log = hashlib.sha256()  # of the lines of steps.jsonl that this process knows

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The result: PEFT's format, or fitune's where PEFT has none (models/adapters/)."""
        return self.path / "adapter"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer's files."""
        return self.path / "tokenizer"

    @property
    def steps(self) -> Path:
        """One JSON line per optimizer step."""
        return self.path / "steps.jsonl"

    @property
    def plan_page(self) -> Path:
        """The page that shows the planned memory, phase by phase."""
        return self.path / "plan.html"

    @property
    def report(self) -> Path:
        """The page that shows the run."""
        return self.path / "report.html"

    # ---- creation and small files ----

    def create(self) -> None:
        """Make the folder; one that a killed run left behind is used again."""
        with disk(self.path):
            self.checkpoints.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, value: object) -> None:
        """Write a JSON file of the run, by its name without `.json`."""
        write_json(self.path / f"{name}.json", value)

    def read(self, name: str) -> Any:
        """A JSON file of the run, as JSON has it; core.parse makes a record of it.

        Raises:
            RunFolderError: it is not there, or is broken.
        """
        path = self.path / f"{name}.json"
        try:
            return runfiles.check(path, read_json(path, RunFolderError, object))
        except FileNotFoundError:
            raise RunFolderError(
                f"{self.path}: no {name}.json", expected="a run folder that fitune train wrote", fix="check the path"
            ) from None

    def has(self, name: str) -> bool:
        """Is that JSON file there?"""
        return (self.path / f"{name}.json").is_file()

    def has_settings(self) -> bool:
        """Were the settings written?"""
        return (self.path / "config.yaml").is_file()

    def write_config(self, config: RunConfig) -> None:
        """The resolved config, every default written out."""
        write_atomic(self.path / "config.yaml", config_text(config))

    def read_config(self) -> RunConfig:
        """The config that the run was started with.

        Raises:
            RunFolderError: this is no run folder.
        """
        path = self.path / "config.yaml"
        if not path.exists():
            raise RunFolderError(
                f"{self.path}: not a run folder (no config.yaml)", fix="give the folder that --output named"
            )
        values = read_yaml(path, RunFolderError)
        if not values:
            raise RunFolderError(f"{path}: empty", expected="the settings of the run", fix=runfiles.FIX)
        try:
            return build(values)
        except FituneError as error:
            raise RunFolderError(f"{path}: broken", received=str(error), fix=runfiles.FIX) from None

    # ---- steps ----

    def append_step(self, record: StepRecord) -> None:
        """One more line of steps.jsonl."""
        line = (as_json(record.as_dict()) + "\n").encode()
        with disk(self.path), self.steps.open("ab") as file:
            file.write(line)
        self._log.update(line)

    def read_steps(self) -> list[StepRecord]:
        """The steps so far; a last line that was cut off by a crash is left out."""
        return [record for _, record in self._lines()]

    def _lines(self) -> list[tuple[bytes, StepRecord]]:
        """The complete lines of steps.jsonl, and their records."""
        found = []
        for line in self.steps.read_bytes().splitlines(keepends=True) if self.steps.is_file() else ():
            with suppress(ValueError, TypeError, AttributeError):
                found.append((line, StepRecord.from_dict(json.loads(line))))
        return [one for one in found if one[0].endswith(b"\n")]

    def truncate_steps(self, last: int) -> None:
        """Keep the lines of the first `last` steps, which the checkpoint that a run goes on from has vouched for; a
        line behind them goes, whatever step it names."""
        kept = b"".join(line for line, _ in self._lines()[:last])
        self._log = hashlib.sha256(kept)
        write_atomic(self.steps, kept.decode())

    def log_problem(self, step: int, digest: str | None) -> str:
        """What is wrong with steps.jsonl up to a step; empty, where it is as it was when the checkpoint was made.

        Args:
            step: of the checkpoint.
            digest: of the lines up to it, from its manifest; None: older checkpoints have none.
        """
        content = self.steps.read_bytes() if self.steps.is_file() else b""
        lines = [line for line in content.splitlines(keepends=True) if line.endswith(b"\n")]
        if len(lines) < step:
            return f"{self.steps.name} has {len(lines)} lines"
        same = digest is None or hashlib.sha256(b"".join(lines[:step])).hexdigest() == digest
        return "" if same else f"{self.steps.name} has other lines than when it was made"

    def check_log(self) -> None:
        """Raises RunFolderError where steps.jsonl is not what this process wrote; called before it is sealed."""
        if hashlib.sha256(self.steps.read_bytes()).digest() != self._log.digest():
            raise RunFolderError(
                f"{self.steps}: was changed during the run",
                fix=f"fitune train --resume --output {self.path} goes on from a checkpoint before the change",
            )

    # ---- checkpoints ----

    def save(
        self,
        step: int,
        parameters: Mapping[str, Tensor] | Mapping[str, Late],
        optimizer: torch.optim.Optimizer | tuple[Mapping[str, Late], Mapping[str, object]],
        state: Mapping[str, object],
    ) -> Path:
        """Write a checkpoint after `step` optimizer steps, completely or not at all.

        Args:
            step: the number of the last one.
            parameters: what is trained; or how each is made whole, when its turn comes.
            optimizer: of these; or its states, made whole likewise, and other values, as `optim.state_tensors` names
                them.
            state: of the run; JSON.

        Raises:
            RunFolderError: the disk is full, or the folder cannot be written; earlier checkpoints stay.
        """
        final = self.checkpoint(step)
        temporary = self.checkpoints / f"{TEMPORARY}{final.name}"
        there = {name: one for name, one in parameters.items() if isinstance(one, Tensor)}
        tensors, scalars = optimizer if isinstance(optimizer, tuple) else optim.state_tensors(optimizer, there)
        with disk(self.checkpoints):
            self._clean()
            temporary.mkdir()
            try:
                _write(temporary / "trainable.safetensors", parameters)
                _write(temporary / "optimizer.safetensors", tensors)
                save_file(rng_state(), temporary / "rng.safetensors")
                text = as_json({"step": step, "optimizer": scalars, **state})
                (temporary / "state.json").write_text(text, encoding="utf-8")
                if self.steps.is_file():
                    sync(self.steps)  # else a crash may leave a checkpoint whose steps are not in it
                seal(temporary, step=step, run=self.identity, log=self._log.hexdigest())
                if final.exists():  # a resumed run makes this step again
                    shutil.rmtree(final)
                temporary.replace(final)
                sync(self.checkpoints)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
        return final

    def _clean(self) -> None:
        """Remove what a killed save left."""
        for leftover in self.checkpoints.glob(f"{TEMPORARY}*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint after so many steps."""
        return self.checkpoints / f"step-{step:06d}"

    def newest_name(self) -> str:
        """The newest checkpoint, for a message."""
        found = sorted(self.checkpoints.glob("step-*"))
        return str(found[-1]) if found else "none yet"

    def whole_checkpoints(self) -> list[Path]:
        """Checkpoints whose files match their manifest, the newest first."""
        return [path for path in sorted(self.checkpoints.glob("step-*"), reverse=True) if is_whole(path)]

    def prune(self, keep_last: int, best: int | None, step: int) -> None:
        """Remove all checkpoints but the newest `keep_last` and the best one.

        Args:
            keep_last: how many.
            best: step of the best one.
            step: of the newest. A later one is left over from before the run was resumed, and will be written again.
        """
        last = self.checkpoint(step).name
        steps = sorted((path for path in self.checkpoints.glob("step-*") if path.name <= last), reverse=True)
        for path in steps[keep_last:]:
            if path != self.checkpoint(best or 0):
                shutil.rmtree(path, ignore_errors=True)

    def load(self, path: Path) -> Loaded:
        """A checkpoint's content.

        Raises:
            RunFolderError: a file of it is missing or broken.
        """
        try:
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
            return Loaded(
                step=state.pop("step"),
                trainable=load_file(path / "trainable.safetensors"),
                optimizer=load_file(path / "optimizer.safetensors"),
                optimizer_scalars=state.pop("optimizer"),
                rng=load_file(path / "rng.safetensors"),
                state=state,
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            received = " ".join(str(error).split())[:200]
            raise RunFolderError(
                f"{path}: broken", received=received, fix="remove it, and go on with --resume"
            ) from None

    def save_adapter(self, save: Callable[[Path], None]) -> None:
        """Write the adapter, completely or not at all.

        Args:
            save: writes it into the folder that it is given.
        """
        with disk(self.path):
            temporary = self.path / f"{TEMPORARY}adapter"
            shutil.rmtree(temporary, ignore_errors=True)
            save(temporary)
            for path in temporary.iterdir():
                sync(path)
            shutil.rmtree(self.adapter, ignore_errors=True)
            temporary.replace(self.adapter)
            sync(self.path)


def _write(file: Path, tensors: Mapping[str, Tensor] | Mapping[str, Late]) -> None:
    late = {name: one for name, one in tensors.items() if isinstance(one, Late)}
    if late:
        safe.write(file, late)
        return
    save_file({name: p.detach().cpu().contiguous() for name, p in tensors.items() if isinstance(p, Tensor)}, file)


def config_text(config: RunConfig) -> str:
    """Every setting as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), allow_unicode=True, sort_keys=False)


def rng_state() -> dict[str, Tensor]:
    """The random number generators that training draws from: the CPU's, and that of the GPU in use."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_rng(state: Mapping[str, Tensor]) -> bool:
    """Put back what `rng_state` gave; False: this machine has no GPU for that of a GPU, or the other way round."""
    torch.set_rng_state(state["cpu"])
    here = torch.cuda.is_initialized()
    # checkpoints once kept the states of all GPUs, by number
    theirs = state.get("cuda", state.get(f"cuda{torch.cuda.current_device()}" if here else ""))
    if here and theirs is not None:
        torch.cuda.set_rng_state(theirs)
    return bool(here == any(name.startswith("cuda") for name in state))
