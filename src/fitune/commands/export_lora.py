"""fitune export --to gguf-lora: the adapter of a run alone, as llama.cpp puts it on a base model in a file of its own.

In: a finished run of method lora. Out: a GGUF with the adapter, read back byte for byte; with `verify` compared with
fitune's chat, on a file of the base model that is made for it and gone afterwards.
"""

from __future__ import annotations

from pathlib import Path

from fitune.commands.export_gguf import USUAL, ExportedGguf, GgufOptions, check_target, drafted, refuse
from fitune.commands.same_answers import Compared, Sizes, compare
from fitune.core.files import disk, expand, sync
from fitune.core.scratch import Scratch
from fitune.data import tokenizer
from fitune.data.encode import Encoder
from fitune.engine.checkpoint import RunFolder
from fitune.engine.loading import base_of, finished, load
from fitune.models.configs import quantized_as, read_config
from fitune.models.handover.gguf import Draft, architectures, hyper, llamacpp, lora, readback, stream, vocabulary

TYPES = ("auto", "f32", "f16", "bf16")


def export_lora(run: str | Path, output: str | Path, how: GgufOptions = USUAL) -> ExportedGguf:
    """Write the adapter of a run as a GGUF.

    Args:
        run: a finished run of method lora.
        output: the file; it must not be there.
        how: the type of its numbers, and what is compared: llama.cpp, with the adapter on its base model.

    Raises:
        ModelError: llama.cpp takes no such adapter, or it would answer otherwise.
        RunFolderError: the run is not finished, or the file is there already.
    """
    how.check_type(TYPES, " for an adapter")
    target, folder = expand(output), RunFolder(expand(run))
    check_target(target)
    config = finished(folder)
    model = Path(base_of(folder, config, how.base))
    found = read_config(model)
    name, metadata, pieces = lora.draft(folder.adapter, target.stem, found)
    architecture = architectures.of(found)
    known = vocabulary.of(tokenizer.load(folder.tokenizer), found.vocab_size)
    plan = Draft(architecture, metadata, pieces, known, hyper.context(found, architecture))
    kind = "f32" if how.type == "auto" else how.type
    packed = config.quant.name != "none" or quantized_as(found).name != "none"
    notes = [f"put it on {model} as a GGUF: fitune export {model} --to gguf --output BASE.gguf"]
    compared = None
    with disk(target.parent, fix="free some space or choose another --output"):
        target.parent.mkdir(parents=True, exist_ok=True)
        with Scratch(target) as place:
            file = place / "adapter.gguf"
            stream.write(file, name, metadata, pieces, kind)
            refuse(target, readback.differences(file, plan, kind), "is not what was to be written")
            if how.verify and packed:
                notes.append("not compared: the run was tuned on quantized weights, which llama.cpp has not")
            elif how.verify and llamacpp.installed():
                compared = _compare(folder, model, place, plan, how.sizes)
                refuse(target, compared.problems, "would not answer as fitune's chat does")
            elif how.verify:
                notes.append(f"read back whole; llama.cpp's library is not there to compare with: {llamacpp.INSTALL}")
            size = file.stat().st_size
            file.replace(target)
        sync(target.parent)
    return ExportedGguf(
        str(target), f"{name} adapter", kind, len(pieces), plan.parameters(), size, plan.context, notes, None, compared
    )


def _compare(run: RunFolder, model: Path, place: Path, plan: Draft, sizes: Sizes | None) -> Compared:
    """The adapter in float32 on its base model in float32, with the run's tokenizer and template."""
    adapter = place / "float32.gguf"
    stream.write(adapter, plan.architecture.name, plan.metadata, plan.pieces, "f32")
    tuned = load(run.path, model=model, device="cpu", precision="fp32")
    whole = drafted(model, "base", Encoder(tuned.tokenizer, tuned.template))
    whole.write(place / "base.gguf", "f32")
    return compare(place / "base.gguf", whole, tuned, sizes, adapter)
