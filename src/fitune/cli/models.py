"""Verbs that make a model out of a model, as they are typed: merge, download, convert, export, quantize.

In: what was typed. Out: a folder, a line or two in the terminal, one JSON object. Nothing here loads torch before it is
needed.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Optional

from cyclopts import Parameter

from fitune.checks import early
from fitune.cli.flags import Json, Moved, check_page, console_for, print_json
from fitune.core import imports, locks, options
from fitune.core.units import MIB


@dataclass(frozen=True)
class QuantizedBase:
    """What becomes of a run whose base model was quantized."""

    onto: Annotated[
        str | None,
        Parameter(
            help="For a quantized base model: weights to merge into, `original` (those before quantization) or a model "
            "folder; the difference is measured."
        ),
    ] = None
    requantize: Annotated[
        bool,
        Parameter(negative="", help="Quantize the merged model as the base model was, and measure the difference."),
    ] = False


def merge(
    run: Annotated[str, Parameter(help="Run folder of a finished run.")],
    *,
    output: Annotated[Path, Parameter(help="Folder of the merged model; must be new or empty.")],
    dtype: Annotated[
        str, Parameter(help="Dtype of the weights: auto (the base model's), fp32, bf16 or fp16.")
    ] = "auto",
    force: Annotated[
        bool, Parameter(negative="", help="Write it even where merging changes the logits too much.")
    ] = False,
    quantized: Annotated[Optional[QuantizedBase], Parameter(name="*")] = None,  # noqa: UP045
    model: Moved = None,
    json: Json = False,
) -> None:
    """Merge what was trained into the base model: transformers loads the result without fitune or PEFT."""
    quantized = quantized or QuantizedBase()
    onto, requantize = quantized.onto, quantized.requantize
    weights = onto if onto != "original" else None
    early.together(lambda: early.run(run), lambda: early.new_folder(output), *early.each(early.folder, weights, model))
    with imports.for_good():
        from fitune.commands.merge import merge as run_merge

    console = console_for(json)
    done = run_merge(run, output, dtype=dtype, force=force, onto=onto, requantize=requantize, model=model)
    if done.in_full:
        console.write_line(done.in_full, style="yellow")
    if done.drift is not None:
        console.write_line(f"drift {done.drift.text()}", style="yellow")
    console.write_line(
        f"{done.folder}: {done.dtype}; relative error of the logits {done.merge_error:.1e} by merging, "
        f"{done.rounding_error:.1e} as written"
    )
    for line in done.handed.lines() if done.handed is not None else ():
        console.write_line(line)
    console.write_line(f"talk to it   fitune chat {shlex.quote(done.folder)}")
    if json:
        print_json(done.as_dict())


def reseal(run: Annotated[str, Parameter(help="Run folder.")], *, json: Json = False) -> None:
    """Accept changes that you made to a run's files on purpose: their checksums are written anew."""
    early.resumed(run)
    with imports.for_good():
        from fitune.engine.checkpoint import RunFolder
        from fitune.engine.integrity import reseal as run_reseal

    console, folder = console_for(json), RunFolder(run)
    with locks.held(folder.path, console.print):
        found = run_reseal(folder)
    for line in found or ["nothing was changed"]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(f"{run}: sealed as it is now", highlight=False, markup=False, soft_wrap=True)
    if json:
        print_json({"run": str(run), "changed": found})


def download(
    model: Annotated[str, Parameter(help="org/name on the hub, ms:org/name on ModelScope, or a catalog name.")],
    *,
    json: Json = False,
) -> None:
    """Download a model into the cache, or the files that are missing; name@revision pins a revision."""
    os.environ.pop("TQDM_DISABLE", None)  # a transfer is what one wants to see the bar of
    with imports.for_good():
        from fitune.core import catalog
        from fitune.models.hub import download as fetch
        from fitune.views.transfers import transfer_bar

    console = console_for(json)
    entry = catalog.get(model)
    with transfer_bar(console) as on_bytes:
        done = fetch(entry.id if entry is not None else model, on_bytes=on_bytes)
    console.write_line(
        f"{done.id} at {done.revision}: {done.files} files, {done.bytes / MIB:,.1f} MiB, in {done.folder}"
    )
    if json:
        print_json(done.as_dict())


def convert(
    model: Annotated[str, Parameter(help="Folder with old .bin weights.")],
    *,
    output: Annotated[Path, Parameter(help="Folder with safetensors; must be new or empty.")],
    json: Json = False,
) -> None:
    """Write old .bin weights as safetensors, without unpickling them."""
    early.together(lambda: early.model(model), lambda: early.new_folder(output))
    with imports.for_good():
        from fitune.commands.convert import convert as run_convert

    done = run_convert(model, output)
    text = f"{done.folder}: {done.tensors} tensors in {done.files} file{'s' if done.files > 1 else ''}"
    console_for(json).write_line(text)
    if json:
        print_json(done.as_dict())


def convert_config(
    config: Annotated[Path, Parameter(help="YAML or JSON of LLaMA-Factory, ms-swift or TRL.")],
    *,
    output: Annotated[Path | None, Parameter(help="Write the settings to this new file. [default: print them]")] = None,
    json: Json = False,
) -> None:
    """Turn another tool's config into settings for `fitune train --config`, and list what has no place here."""
    check_page(output, "--output")
    with imports.for_good():
        from fitune.commands.convert_config import convert_config as run_convert
        from fitune.core.files import write_atomic

    done = run_convert(config)
    console = console_for(json)
    if output is None:
        console.print(done.as_yaml(), markup=False, highlight=False, soft_wrap=True)
    else:
        write_atomic(output, done.as_yaml())
        console.write_line(f"settings {output}")
    if json:
        print_json({"settings": done.settings, "left_out": done.left_out, "defaults": done.defaults})


@dataclass(frozen=True)
class Gguf:
    """What a GGUF is to be."""

    type: Annotated[
        Literal["auto", "f32", "f16", "bf16", "q8_0", "q4_0"],
        Parameter(help="gguf, ollama: type of the numbers; auto: as the model is stored."),
    ] = "auto"
    verify: Annotated[
        bool,
        Parameter(negative="", help="gguf, ollama: compare llama.cpp on the file with fitune's chat, token by token."),
    ] = False


def export(
    model: Annotated[str, Parameter(help="Model folder, such as `fitune merge` writes; for gguf and vllm a run.")],
    *,
    output: Annotated[Path, Parameter(help="What is written: a new folder, for gguf a new file.")],
    to: Annotated[
        Literal["original", "gguf", "gguf-lora", "ollama", "vllm"],
        Parameter(
            help="Layout; original: as ChatGLM2 and 3 were published; gguf: a file for llama.cpp; gguf-lora: a run's "
            "adapter as one; ollama: a folder with a Modelfile; vllm: for vLLM."
        ),
    ] = "original",
    gguf: Annotated[Optional[Gguf], Parameter(name="*")] = None,  # noqa: UP045
    merged: Annotated[
        bool, Parameter(negative="", help="vllm: write the merged model, even where vLLM takes the adapter.")
    ] = False,
    base: Annotated[
        str | None, Parameter(name="--model", help="Where a run's base model is now, if it was moved.")
    ] = None,
    json: Json = False,
) -> None:
    """Write a run or a model for other programs."""
    gguf = gguf or Gguf()
    there = {"original": early.model, "gguf": early.run_or_model, "ollama": early.run_or_model}.get(to, early.run)
    early.together(lambda: there(model), lambda: early.new_folder(output), *early.each(early.folder, base))
    with imports.for_good():
        from fitune.commands.export import Exported
        from fitune.commands.export import export as run_export

    console = console_for(json)
    done = run_export(model, output, to=to, type_=gguf.type, verify=gguf.verify, merged=merged, base=base)
    if isinstance(done, Exported):
        console.write_line(f"{done.folder}: {done.tensors} tensors in {done.files} file{'s' if done.files > 1 else ''}")
    else:
        for line in done.lines():
            console.write_line(line)
    if json:
        print_json(done.as_dict())


def quantize(
    model: Annotated[str, Parameter(help="Model folder or hub id.")],
    *,
    quant: Annotated[Literal["int8", "nf4", "fp4"], Parameter(help="Quantization format.")] = "nf4",
    double: Annotated[bool, Parameter(help="With 4 bits: quantize the scales too: 0.4 bits a weight less.")] = True,
    output: Annotated[Path, Parameter(help="Folder of the quantized model; must be new or empty.")],
    json: Json = False,
) -> None:
    """Write a model with quantized linear layers, and show the error of each layer."""
    early.together(lambda: early.model(model), lambda: early.new_folder(output))
    with imports.for_good():
        from fitune.commands.quantize import quantize as run_quantize
        from fitune.views.terminal import quantized_table

    console = console_for(json)
    chosen = options.quant_options(quant).model_copy(update={"double": double})
    done = run_quantize(model, output, quant=chosen)
    console.print(quantized_table(done))
    if done.in_full:
        console.write_line(done.in_full, style="yellow")
    console.write_line(
        f"{done.folder}: {done.bytes_before / MIB:,.1f} MiB of weights before, {done.bytes_after / MIB:,.1f} now; "
        f"picture {Path(done.folder) / 'quantization.html'}"
    )
    if json:
        print_json(done.as_dict())
