"""One model type after the other through training, resuming, saving, loading and merging: what the sweep records.

In: a model type of transformers, ways to tune it. Out: a Row, as results/families.json has it. A way that the package
refuses has the error's text; whatever else ends it, also an error of a library inside ours, counts as a failure.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal, cast

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import fitune
from fitune.commands.train import train
from fitune.core.config import build
from fitune.core.errors import FituneError
from fitune.core.records import Layout, Sample
from fitune.data.batches import flat
from fitune.engine.checkpoint import RunFolder
from fitune.engine.step import loss_sum
from fitune.models import adapters
from fitune.models.load import load_model
from support import every_type, tiny
from support.contract import apart
from support.stops import Crash, StopAt, crash

WAYS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "lora": {"rank": 4}},
    "full": {"method": "full"},
    "nf4": {"method": "lora", "lora": {"rank": 4}, "quant": "nf4"},
}
STEPS: dict[str, Any] = {
    "max_steps": 3, "save_every": 2, "batch_size": 4, "lr": 1e-2, "sample_prompts": 0, "precision": "fp32",
    "val_share": 0,
}  # fmt: skip
LIBRARY = ("cannot be loaded", "no model can be built")  # texts of ours around what a library raised
CLOSE = 1e-4  # of the largest logit: a saved or merged model beside the tuned one
LENGTHS, ROUNDS = (60, 9, 31, 5, 44, 17, 12, 26), 5  # tokens of rows that are timed; how often
IDS = torch.arange(5, 29)[None]
Outcome = Literal["trains", "refused", "failed"]


@dataclass
class Way:
    """What became of one way to tune a type. why: it did not train, or it did not all hold."""

    outcome: Outcome
    why: str = ""
    resumes: bool = False
    loads: bool = False
    merges: bool = False

    @property
    def whole(self) -> bool:
        """It trains, resumes bit for bit, and what was saved and merged answers as the tuned model."""
        return self.outcome == "trains" and self.resumes and self.loads and self.merges


@dataclass
class Row:
    """A type. kind: what it is, where it is no decoder of text. layout: how documents go through it. beside: seconds
    of plain transformers with PEFT, padded, over seconds here, for the same rows."""

    type: str
    kind: str
    layout: str = ""
    beside: float = 0.0
    parts: str = ""
    ways: dict[str, Way] = field(default_factory=dict)


def failed(kind: str, why: str) -> Row:
    """A type of which not even a model was made, or whose process ended."""
    return Row(kind, every_type.NO_DECODERS.get(kind, "decoder"), ways={"lora": Way("failed", why)})


def swept(kind: str, place: Path, ways: Sequence[str] = tuple(WAYS)) -> Row:
    """A type, tried in an empty folder."""
    row = Row(kind, every_type.NO_DECODERS.get(kind, "decoder"))
    try:
        folder = every_type.save(kind, place / "model")
    except Exception as error:  # the config class of a type that the table of small sizes does not know
        return failed(kind, f"no tiny model: {_text(error)}")
    data = tiny.write_rows(place / "rows.jsonl", 12)
    for name in ways:
        row.ways[name] = _tried(row, folder, data, place / name, name)
        if row.ways[name].outcome != "trains" and name == "lora":
            return row  # nothing else is to be learned from the other ways
    return row


def _tried(row: Row, folder: Path, data: Path, place: Path, name: str) -> Way:
    place.mkdir()
    settings = {"model": str(folder), "data": [str(data)], **STEPS, **WAYS[name]}
    try:
        train(build({**settings, "output": str(place / "run")}))
    except FituneError as error:
        library = any(text in str(error) for text in LIBRARY)
        return Way("failed" if library else "refused", _text(error))
    except Exception as error:  # what the sweep is to find
        return Way("failed", _text(error))
    way = Way("trains")
    found = {one["rule"]: one["text"] for one in RunFolder(place / "run").read("data")["findings"]}
    if name == "lora":
        row.beside = _beside(folder, _layout(found["packing-leak"]))
        row.layout, row.parts = _layout(found["packing-leak"]), found["family"]
    wrong = []
    for what, holds in (("resumes", _resumes), ("loads", _loads), ("merges", _merges)):
        try:
            setattr(way, what, not (why := holds(settings, place)))
        except Exception as error:  # recorded beside what held
            why = _text(error)
        wrong += [f"{what}: {why}"] if why else []
    way.why = "; ".join(wrong)
    return way


def _beside(folder: Path, layout: str) -> float:
    """How many times the seconds of a processor that plain transformers with PEFT takes for a pass over rows of unequal
    lengths, padded, go into ours; the median of rounds in which both take turns."""
    config = build({"model": str(folder), "data": ["d"], "precision": "fp32", **WAYS["lora"]})
    ours: Any = adapters.attach(load_model(folder), config)
    plain = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    wanted = ours.peft_config["default"].target_modules
    theirs = get_peft_model(plain, LoraConfig(r=4, target_modules=wanted))
    rows = [Sample(np.arange(5, 5 + length).astype(np.int32), np.arange(length) > length // 2) for length in LENGTHS]
    batch = flat(rows, range(len(rows)))
    ids, mask = torch.zeros(len(rows), max(LENGTHS), dtype=torch.long), torch.zeros(len(rows), max(LENGTHS)).long()
    for number, row in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = torch.from_numpy(row.ids).long(), 1
    labels = ids.masked_fill(mask == 0, -100)

    def seconds(work: Callable[[], torch.Tensor]) -> float:
        begun = time.process_time()
        work().backward()
        return time.process_time() - begun

    ways = (
        lambda: theirs(input_ids=ids, attention_mask=mask, labels=labels).loss,
        lambda: loss_sum(ours, batch, cast(Layout, layout)),
    )
    try:
        rounds = [[seconds(way) for way in ways] for _ in range(ROUNDS + 1)][1:]
    except (RuntimeError, ValueError, TypeError):  # plain transformers cannot do it: there is nothing to compare
        return 0.0
    return round(median(plain_ / own for plain_, own in rounds), 2)


def _layout(text: str) -> str:
    """By the leak probe's finding: `flat batches: ...`, or `...; running padded: ...`."""
    return text.partition("running ")[2].partition(":")[0] or text.partition(" batches")[0]


def _resumes(settings: dict[str, Any], place: Path) -> str:
    """A run that crashed behind its checkpoint ends with the bits of the unbroken one."""
    broken = build({**settings, "output": str(place / "broken")})
    try:
        train(broken, watch=StopAt(2, crash))
    except Crash:
        train(broken, resume=True)
    runs = [place / one / "adapter" for one in ("run", "broken")]
    bits = [sorted((file.name, file.read_bytes()) for file in run.glob("*.safetensors")) for run in runs]
    return "" if bits[0] == bits[1] and bits[0] else "other bits than the unbroken run"


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model.eval()(input_ids=IDS).logits
    return logits.float()


def _loads(settings: dict[str, Any], place: Path) -> str:
    """The run answers differently from its base, and the same whenever it is loaded."""
    tuned = _logits(fitune.load(place / "run").model)
    base = _logits(load_model(settings["model"], quant=settings.get("quant", "none")))
    again = _logits(fitune.load(place / "broken").model)
    if not apart(tuned, base, "fp32") > 1e-6:
        return "answers as its base"
    return "" if torch.equal(tuned, again) else "answers differently once more"


def _merges(settings: dict[str, Any], place: Path) -> str:
    """transformers alone loads what was merged, and it answers as the run."""
    fitune.merge(place / "run", place / "merged")
    tuned = _logits(fitune.load(place / "run").model)
    merged = AutoModelForCausalLM.from_pretrained(str(place / "merged"), dtype=torch.float32)
    found = apart(_logits(merged), tuned, "fp32")
    return "" if found <= CLOSE else f"logits are {found:.1e} apart"


def _text(error: Exception) -> str:
    name = "" if isinstance(error, FituneError) else f"{type(error).__name__}: "
    text = re.sub(rf"{re.escape(tempfile.gettempdir())}/\w+", "FOLDER", " ".join(str(error).split()))
    return f"{name}{text}"[:300]


def warm() -> None:
    """Import what every type needs, before processes are forked."""
    every_type.model_of("llama")(input_ids=IDS)


def line(row: dict[str, Any]) -> str:
    """A row as one line of text."""
    ways = [
        f"{name} {way['outcome']}" + (f" ({way['why']})" if way["why"] else "") for name, way in row["ways"].items()
    ]
    return f"{row['type']} [{row['kind']}] {row['layout']} {'; '.join(ways)}"


def merged(there: dict[str, Any] | None, row: dict[str, Any]) -> dict[str, Any]:
    """A row with the ways of one from before that were not tried now; what goes by lora stays where that was not."""
    if there is None:
        return row
    ways = {name: way for name in WAYS if (way := row["ways"].get(name) or there["ways"].get(name)) is not None}
    return {**(row if "lora" in row["ways"] else there), "ways": ways}


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of a results file, by type."""
    return {row["type"]: row for row in json.loads(path.read_text(encoding="utf-8"))["types"]}


def write(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Rows in transformers' order, with counts of decoders in front."""
    rows = [found[kind] for kind in every_type.TYPES if kind in found]
    decoders = [row for row in rows if row["kind"] == "decoder"]
    counts: dict[str, object] = {"types": len(rows), "decoders": len(decoders)}
    for name in WAYS:
        counts[name] = sum(row["ways"].get(name, {}).get("outcome") == "trains" for row in decoders)
    counts["failed"] = sum(way["outcome"] == "failed" for row in rows for way in row["ways"].values())
    head = {"transformers": transformers.__version__, "counts": counts}
    path.write_text(json.dumps({**head, "types": rows}, indent=1) + "\n", encoding="utf-8")


# ---- the table in docs/models.md ----


def table(found: dict[str, dict[str, Any]]) -> list[str]:
    """Rows of results as Markdown: decoders one by one, everything else by what it is."""
    decoders = [row for row in found.values() if row["kind"] == "decoder"]
    others = [row for row in found.values() if row["kind"] != "decoder"]
    trained = [row for row in decoders if row["ways"]["lora"]["outcome"] == "trains"]
    counts = ", ".join(_count(decoders, name) for name in WAYS)
    lines = [
        f"{len(found)} types, {len(decoders)} of them decoders of text; of these train: {counts}.",
        "",
        "| type | documents | " + " | ".join(WAYS) + " | beside |",
        "|---|---|" + "---|" * len(WAYS) + "---|",
    ]
    for row in trained:
        cells = [_cell(row["ways"].get(name)) for name in WAYS]
        beside = f"{row['beside']:.1f}" if row["beside"] else ""
        lines.append(f"| {row['type']} | {row['layout']} | {' | '.join(cells)} | {beside} |")
    lines += ["", "Not tuned:", ""]
    lines += [f"- {row['type']}: {_why(row)}" for row in decoders if row not in trained]
    for kind in dict.fromkeys(row["kind"] for row in others):
        names = ", ".join(row["type"] for row in others if row["kind"] == kind)
        lines.append(f"- {KINDS.get(kind, kind)}: {names}")
    return lines


KINDS = {
    "encoder": "encoders",
    "encoder-decoder": "encoder-decoders, and decoders of such",
    "audio": "models of sound",
    "more than text": "models that take more than text; of some the language model is tuned, see above",
    "draft model": "draft models",
}


def _count(decoders: list[dict[str, Any]], name: str) -> str:
    tried = [row for row in decoders if name in row["ways"]]
    return f"{name} {sum(_trains(row, name) for row in tried)} of {len(tried)} tried"


def _trains(row: dict[str, Any], name: str) -> bool:
    return bool(row["ways"].get(name, {}).get("outcome") == "trains")


def _cell(way: dict[str, Any] | None) -> str:
    if way is None:
        return ""
    if way["outcome"] != "trains":
        return way["outcome"]  # type: ignore[no-any-return]  # read from JSON
    missing = [name for name in ("resumes", "loads", "merges") if not way[name]]
    return "✓" if not missing else f"trains; not: {', '.join(missing)}"


def _why(row: dict[str, Any]) -> str:
    text = row["ways"]["lora"]["why"]
    return str(text).partition(", and fitune tunes")[0].removeprefix(f"model_type '{row['type']}' ")
