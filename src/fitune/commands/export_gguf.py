"""fitune export --to gguf: a run or a model as one file for llama.cpp, and the proof that it answers there as here.

In: a run, or a model folder. Out: a GGUF, read back byte for byte; with `verify` compared with fitune's chat by
llama.cpp itself. A run is merged first, in float32, into a folder beside the file that is gone afterwards. The file
takes its name only when it is whole and nothing about it was refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from fitune.commands.merge import Merged, merge
from fitune.commands.same_answers import Compared, Sizes, compare, rounded
from fitune.core.errors import ModelError, RunFolderError
from fitune.core.files import check_new, disk, expand, sync
from fitune.core.scratch import Scratch
from fitune.data import tokenizer
from fitune.data.encode import Encoder
from fitune.engine.loading import load, template_of
from fitune.models import weights
from fitune.models.configs import quantized_as, read_config
from fitune.models.handover import stops_of
from fitune.models.handover.conversations import CONVERSATIONS
from fitune.models.handover.gguf import Draft, draft, llamacpp, readback
from fitune.models.handover.proof import written
from fitune.models.load import Tuned
from fitune.models.locate import locate

TYPES = ("auto", "f32", "f16", "bf16", "q8_0", "q4_0")
STORED = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


@dataclass(frozen=True)
class ExportedGguf:
    """What was written.

    Args:
        file: the file.
        architecture: llama.cpp's name of the model.
        type: of its numbers.
        tensors, parameters, bytes: how many.
        context: the most tokens of a row.
        notes: what a user should know.
        merged: of a run, how it was merged.
        compared: with llama.cpp; None: it was not asked for, or the library is not there.
    """

    file: str
    architecture: str
    type: str
    tensors: int
    parameters: int
    bytes: int
    context: int
    notes: list[str] = field(default_factory=list)
    merged: Merged | None = None
    compared: Compared | None = None

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For the terminal."""
        first = (
            f"{self.file}: {self.architecture}, {self.type}, {self.tensors} tensors, {self.parameters:,} parameters, "
            f"{self.bytes:,} bytes"
        )
        lines = [first]
        if self.merged is not None:
            lines.append(
                f"merged first: relative error of the logits {self.merged.merge_error:.1e} by merging, "
                f"{self.merged.rounding_error:.1e} as written"
            )
        if self.compared is not None:
            lines.append(self.compared.text() if self.type == "f32" else f"in float32: {self.compared.text()}")
            lines.append(f"logits differ by at most {self.compared.logits:.1e} of the largest")
            lines += [f"equally probable: {text}" for text in self.compared.ties]
        return lines + self.notes


@dataclass(frozen=True)
class GgufOptions:
    """How a GGUF is written.

    Args:
        type: of the numbers: auto (as the model is stored; float32 for an adapter), f32, f16, bf16; of a model q8_0 and
            q4_0 too.
        verify: compare llama.cpp on the file with fitune's chat, where the library is installed.
        base: where a run's base model is now, if it was moved.
        sizes: how much is compared.
    """

    type: str = "auto"
    verify: bool = False
    base: str | Path | None = None
    sizes: Sizes | None = None

    def check_type(self, known: tuple[str, ...], of: str = "") -> None:
        """Raises ModelError where there is no such type."""
        if self.type not in known:
            raise ModelError(f"--type {self.type}{of}", expected=", ".join(known))


USUAL = GgufOptions()


def export_gguf(model: str | Path, output: str | Path, how: GgufOptions = USUAL) -> ExportedGguf:
    """Write a run or a model as a GGUF.

    Args:
        model: a run folder, a model folder, or a hub id.
        output: the file; it must not be there.
        how: the type of its numbers, and what is compared.

    Raises:
        ModelError: llama.cpp has no such model or tokenizer, or the file would answer otherwise.
        RunFolderError: the file is there already, or the disk is full.
    """
    target = expand(output)
    how.check_type(TYPES)
    check_target(target)
    with disk(target.parent, fix="free some space or choose another --output"):
        target.parent.mkdir(parents=True, exist_ok=True)
        with Scratch(target) as place, _plain(model, place, how.base) as (folder, merged, stored):
            work = _Work(folder, target, place, merged, stored if how.type == "auto" else how.type)
            done = work.write(str(model), how)
        sync(target.parent)
    return done


def check_target(target: Path) -> None:
    """Raises RunFolderError where something lies there already."""
    check_new(target)
    if target.is_dir():
        raise RunFolderError(
            f"{target}: is a folder", expected="a file to write", fix=f"--output {target / 'model.gguf'}"
        )


def refuse(target: Path, problems: list[str], why: str) -> None:
    """Raises ModelError where there are problems: the file is not written."""
    if problems:
        raise ModelError(
            f"{target}: was not written, for it {why}",
            received="; ".join(problems),
            fix="report it: fitune never writes a file that it knows to be wrong",
        )


@contextmanager
def _plain(model: str | Path, place: Path, base: str | Path | None) -> Iterator[tuple[Path, Merged | None, str]]:
    """A folder with the whole model in plain weights, how it was merged, and the type in which its base is stored."""
    path = expand(model)
    if (path / "config.yaml").is_file() and not (path / "config.json").is_file():
        merged = merge(path, place / "merged", dtype="fp32", model=base)
        yield place / "merged", merged, STORED[weights.stored_dtype(_base(path, base))]
        return
    folder = locate(str(model))
    if quantized_as(read_config(folder)).name == "none":
        yield folder, None, STORED[weights.stored_dtype(folder)]
        return
    raise ModelError(
        f"{folder}: is quantized", expected="plain weights, or a run", fix="export the model that it was quantized from"
    )


def _base(run: Path, base: str | Path | None) -> Path:
    from fitune.engine.checkpoint import RunFolder

    return Path(base) if base is not None else Path(RunFolder(run).read_config().model)


def drafted(folder: Path, name: str, encoder: Encoder | None = None) -> Draft:
    """What the file of a model folder will hold.

    Args:
        folder: of the model.
        name: what it is called.
        encoder: of a run, in place of the folder's own tokenizer and template.
    """
    if encoder is None:
        own = tokenizer.load(folder)
        encoder = Encoder(own, template_of(folder, "auto", own))
    loaded = encoder.tokenizer
    _, prompt = written(encoder, CONVERSATIONS[0][2])
    return draft(folder, name, loaded, stops_of(folder, encoder), prompt or [])


@dataclass(frozen=True)
class _Work:
    """One export: a model folder, the file to be, a folder of our own beside it."""

    folder: Path
    target: Path
    place: Path
    merged: Merged | None
    type: str

    def write(self, model: str, how: GgufOptions) -> ExportedGguf:
        """Write, read back, compare, and give the file its name. model: what it is compared with."""
        plan = drafted(self.folder, self.target.stem)
        file = self.place / "model.gguf"
        plan.write(file, self.type)
        refuse(self.target, readback.differences(file, plan, self.type), "is not what was to be written")
        notes = [*plan.notes, *(f"otherwise in llama.cpp: {text}" for text in plan.vocabulary.exceptions)]
        compared = None
        if how.verify and llamacpp.installed():
            tuned = load(model, model=how.base, device="cpu", precision="fp32")
            compared = self._compare(plan, file, tuned, how.sizes)
            notes += self._rounding(plan, file, tuned, how.sizes)
            notes += [f"noted: {text}" for text in compared.known if text not in plan.vocabulary.exceptions]
        elif how.verify:
            notes.append(f"read back whole; llama.cpp's library is not there to compare with: {llamacpp.INSTALL}")
        count, size = len(plan.pieces), file.stat().st_size
        file.replace(self.target)
        return ExportedGguf(
            str(self.target), plan.architecture.name, self.type, count, plan.parameters(), size, plan.context,
            notes, self.merged, compared,
        )  # fmt: skip

    def _rounding(self, plan: Draft, file: Path, tuned: Tuned, sizes: Sizes | None) -> list[str]:
        """What the type itself changes."""
        return [] if self.type == "f32" else [f"as {self.type}: {rounded(file, plan, tuned, sizes)} of the largest"]

    def _compare(self, plan: Draft, file: Path, tuned: Tuned, sizes: Sizes | None) -> Compared:
        """In float32, whatever the type of the file: in others numbers are rounded, so nothing need be equal."""
        if self.type != "f32":
            file = self.place / "float32.gguf"
            plan.write(file, "f32")
        found = compare(file, plan, tuned, sizes)
        refuse(self.target, found.problems, "would not answer as fitune's chat does")
        return found
