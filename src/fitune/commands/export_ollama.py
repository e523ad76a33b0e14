"""fitune export --to ollama: a folder with a GGUF and the Modelfile that `ollama create` makes a model of.

In: a run, or a model folder. Out: model.gguf, written and compared as `--to gguf` does, and Modelfile with the template
in Ollama's language, the stop tokens and the parameters of `fitune chat`.
"""

from __future__ import annotations

import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path

from gguf import GGUFReader, Keys

from fitune.commands.export_gguf import USUAL, ExportedGguf, GgufOptions, export_gguf
from fitune.core.errors import ModelError
from fitune.core.files import check_new, expand, whole_folder
from fitune.core.records import Conversation
from fitune.data import templates, tokenizer
from fitune.data.encode import Encoder
from fitune.data.tokenizer import special
from fitune.engine.checkpoint import RunFolder
from fitune.engine.drawing import Sampling
from fitune.engine.loading import template_of
from fitune.models.handover import ollama
from fitune.models.handover.proof import best, rendered
from fitune.models.locate import locate

FILE, MODELFILE = "model.gguf", "Modelfile"


def export_ollama(model: str | Path, output: str | Path, how: GgufOptions = USUAL) -> ExportedGguf:
    """Write a folder for `ollama create`.

    Args:
        model: a run folder, a model folder, or a hub id.
        output: a new or empty folder.
        how: as for `export_gguf`.

    Raises:
        ModelError: the template cannot be written in Ollama's language; else as for `export_gguf`.
        RunFolderError: the folder is not empty.
    """
    target = expand(output)
    check_new(target, whole=True)
    encoder = _encoder(model)
    made = ollama.frame(partial(_as_others, _jinja(encoder), encoder), list(special.added(encoder.tokenizer)))
    with whole_folder(target) as place:
        done = export_gguf(model, place / FILE, how)
        adds = _adds_bos(place / FILE)
        bos = encoder.tokenizer.bos_token
        if adds and bos:  # Ollama puts it in front by itself, and takes none away
            made = replace(made, begin=made.begin.removeprefix(bos), before_system=made.before_system.removeprefix(bos))
        stops = [str(name) for name in encoder.tokenizer.convert_ids_to_tokens(list(encoder.stop_ids))]
        usual = Sampling()
        parameters = {"temperature": usual.temperature, "num_predict": usual.max_new_tokens, "num_ctx": done.context}
        text = ollama.modelfile(FILE, made.go(), stops, parameters)
        (place / MODELFILE).write_text(text, encoding="utf-8", newline="\n")
    create = f"ollama create {shlex.quote(target.name.lower())} -f {shlex.quote(str(target / MODELFILE))}"
    return replace(done, file=str(target / FILE), notes=[*done.notes, create])


def _encoder(model: str | Path) -> Encoder:
    """Of a run, or of a model folder."""
    path = expand(model)
    run = RunFolder(path)
    if (path / "config.yaml").is_file() and not (path / "config.json").is_file():
        loaded = tokenizer.load(run.tokenizer)
        return Encoder(loaded, templates.from_dict(run.read("template"), loaded))
    folder = locate(str(model))
    loaded = tokenizer.load(folder)
    return Encoder(loaded, template_of(folder, "auto", loaded))


def _jinja(encoder: Encoder) -> str:
    """The chat template that a merged folder has."""
    jinja, _, reason = best(encoder, encoder.tokenizer)
    if isinstance(jinja, dict):
        jinja = jinja.get("default")
    if jinja is None:
        raise ModelError("this run's template is no chat template that others could render", received=reason)
    return jinja


def _as_others(jinja: str, encoder: Encoder, conversation: Conversation) -> str | None:
    found = rendered(jinja, encoder.tokenizer, conversation, encoder, tokenize=False)
    return None if found is None else str(found)


def _adds_bos(file: Path) -> bool:
    field = GGUFReader(file).get_field(Keys.Tokenizer.ADD_BOS)
    return field is not None and bool(field.contents())
