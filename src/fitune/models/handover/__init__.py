"""What a model folder needs so that it answers elsewhere as it answered here: tokenizer, chat template, stop tokens.

In: a folder with a model, the run's tokenizer and template. Out: the same folder with the tokenizer, `chat_template`
where plain transformers makes the ids of training of it, and the ids that end an answer in generation_config.json. What
is written is compared with the run's encoder, conversation by conversation, as transformers loads it from the folder.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from fitune.core.files import write_atomic
from fitune.core.untrusted import read_json
from fitune.data.encode import Encoder
from fitune.data.templates import ChatTemplate, Template
from fitune.data.templates.as_jinja import KINDS
from fitune.data.templates.base import kept_date
from fitune.models import adapters
from fitune.models.handover import proof as proofs
from fitune.models.handover.proof import Proof
from fitune.models.weights import SAFE_INDEX, safe, stored_dtype

GENERATION = "generation_config.json"
TEMPLATE = "fitune_template.json"  # the template itself, for fitune
ANSWER_TOKENS = "fitune_answer_tokens.json"  # special tokens that answers produce: fitune shows these


@dataclass(frozen=True)
class Handover:
    """What was written.

    Args:
        template: the run's template by name.
        stops: the tokens that end an answer, the trained one first; ids beside them.
        written: is there a `chat_template` that is the run's.
        proof: of it, or of the best attempt.
        reason: why none was written.
        exceptions: texts that get other ids all the same.
        date: what to know of the date that the template writes.
        pieces: is there a PIECES file, with the ids of training.
        parts: does the template read texts as lists of parts alone.
    """

    template: str
    stops: list[str]
    stop_ids: list[int]
    written: bool
    proof: Proof
    reason: str = ""
    exceptions: list[str] = field(default_factory=list)
    pieces: bool = False
    date: str = ""
    parts: bool = False

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)

    def warnings(self) -> list[str]:
        """What a user should know at the end of a run: why there is no chat template, or what it refuses."""
        return self.lines() if not self.written or self.proof.without else []

    def lines(self) -> list[str]:
        """What a user should know, a line each."""
        stops, date = ", ".join(self.stops), [self.date] if self.date else []
        if not self.written:
            said = f"no chat_template written for {self.template}: {self.reason}"
            return [said, f"generation ends at {stops}", *date]
        same = f"the ids of training in {len(self.proof.same)} of {len(self.proof.same)} conversations"
        if self.proof.differing:
            tried = len(self.proof.same) + len(self.proof.differing)
            same = f"kept as it is; other ids than in training in {len(self.proof.differing)} of {tried} conversations"
        lines = [f"chat_template {self.template}: {same}; generation ends at {stops}"]
        if self.proof.without:
            refused = ", ".join(KINDS[kind] for kind in self.proof.without)
            lines.append(f"it refuses {refused}: as one text, their tokens would not be those of the training")
        return [*lines, *date]


def as_model(folder: Path, model: Any, file: str) -> bool:
    """Make a folder with all weights of a model, by transformers' names, a model folder; False: it cannot be one.

    Args:
        folder: gets config.json, generation_config.json and an index that names the file.
        model: a transformers model, all of it trained.
        file: the weights in the folder.
    """
    from transformers.conversion_mapping import extract_weight_conversions_for_model

    if not type(model).__module__.startswith("transformers.") or extract_weight_conversions_for_model(model):
        return False  # the published names, or layouts, are others
    with safe.opened(folder / file) as tensors:
        names = set(tensors.keys())
    places = {name: _here(tensor).data_ptr() for name, tensor in model.state_dict().items()}
    trained = {place for name, place in places.items() if name in names}
    if not trained.issuperset(places.values()):
        return False
    model.config.save_pretrained(str(folder))
    if model.generation_config is not None:
        write_atomic(folder / GENERATION, model.generation_config.to_json_string(use_diff=True))
    index = {
        "metadata": {"total_size": (folder / file).stat().st_size},
        "weight_map": dict.fromkeys(sorted(names), file),
    }
    write_atomic(folder / SAFE_INDEX, json.dumps(index, indent=2) + "\n")
    config = {**_read(folder / "config.json"), "dtype": str(stored_dtype(folder)).removeprefix("torch.")}
    write_atomic(folder / "config.json", json.dumps(config, ensure_ascii=False, indent=2) + "\n")
    return True


def _here(tensor: Tensor) -> Tensor:
    """What this process has of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def of_run(folder: Path, model: Any, tokenizer: Any, template: Template) -> Handover:
    """What a run trained, as others load it: a model folder where all was trained (method full), else an adapter.

    Args:
        folder: the run's adapter folder.
        model: the transformers model in it.
        tokenizer: the run's.
        template: the run's.
    """
    own = (folder / adapters.OWN_CONFIG).is_file()
    if own and adapters.read_own(folder).method == "full" and not (folder / adapters.NEW_IDS).is_file():
        as_model(folder, model, adapters.WEIGHTS)
    return hand_over(folder, tokenizer, template, getattr(model.generation_config, "eos_token_id", None))


def hand_over(folder: Path, tokenizer: Any, template: Template, stops_of_base: Any = None) -> Handover:
    """Write the tokenizer, the chat template and the stop tokens into a model's folder.

    Args:
        folder: holds config.json and weights already.
        tokenizer: the run's.
        template: the run's.
        stops_of_base: the base's eos_token_id, for a folder that does not say it.
    """
    encoder = Encoder(tokenizer, template)
    own = copy.copy(tokenizer)
    own.chat_template = None
    own.save_pretrained(str(folder))
    (folder / TEMPLATE).write_text(json.dumps(template.as_dict(), ensure_ascii=False), encoding="utf-8")
    ids = write_stops(folder, encoder.stop_ids, encoder.stop_id, stops_of_base)
    stops = [str(name) for name in tokenizer.convert_ids_to_tokens(ids)]
    plain = _as_others_load_it(folder)
    if isinstance(plain, str):
        return Handover(template.name, stops, ids, written=False, proof=Proof(), reason=plain, date=kept_date(template))
    jinja, proof, reason = proofs.best(encoder, plain)
    if jinja is not None:
        own.chat_template = jinja
        own.save_pretrained(str(folder))
    pieces = (jinja is None or bool(proof.without)) and proofs.write_pieces(folder, encoder, plain)
    exceptions = proofs.exceptions(jinja, plain, encoder) if jinja is not None else []
    parts = isinstance(template, ChatTemplate) and template.in_parts
    return Handover(
        template.name, stops, ids, jinja is not None, proof, reason, exceptions, pieces, kept_date(template), parts
    )


def write_answer_tokens(folder: Path, encoder: Encoder) -> None:
    """Keep the special tokens that a run's answers produce, where there are any."""
    if encoder.marks.answers:
        (folder / ANSWER_TOKENS).write_text(json.dumps(list(encoder.marks.answers)), encoding="utf-8")


def read_answer_tokens(folder: Path) -> list[str]:
    """The special tokens that the answers of a merged model produce."""
    file = folder / ANSWER_TOKENS
    return [str(name) for name in read_json(file, kind=list)] if file.is_file() else []


def write_stops(folder: Path, trained: Sequence[int], first: int, of_base: object = None) -> list[int]:
    """Put ids that end an answer into generation_config.json, before those of the base; all of them.

    The file is changed in place: published ones hold settings that transformers refuses to save again.
    """
    path = folder / GENERATION
    values = _read(path)
    config = _read(folder / "config.json")
    of_base = values.get("eos_token_id", config.get("eos_token_id", of_base))
    base = of_base if isinstance(of_base, list) else [of_base]
    ids = list(dict.fromkeys(i for i in (first, *trained, *base) if isinstance(i, int)))
    write_atomic(path, json.dumps({**values, "eos_token_id": ids}, ensure_ascii=False, indent=2) + "\n")
    return ids


def stops_of(folder: Path, encoder: Encoder) -> list[int]:
    """The ids that end an answer of a model folder, the trained one first: the run's, then those of its base."""
    base = _read(folder / GENERATION).get("eos_token_id")
    of_base = base if isinstance(base, list) else [base]
    return list(dict.fromkeys(i for i in (encoder.stop_id, *encoder.stop_ids, *of_base) if isinstance(i, int)))


def _read(path: Path) -> dict[str, Any]:
    return dict(read_json(path)) if path.is_file() else {}


def _as_others_load_it(folder: Path) -> Any:
    """The tokenizer as plain transformers loads it; a text: why it cannot."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises whatever its many readers raise
        return f"transformers has no class for this tokenizer ({' '.join(str(error).split())[:120]})"
