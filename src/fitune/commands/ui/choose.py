"""Task one of the page: choose a model and data, and see the rows as they will be trained.

In: what lies in the folders of the page. Out: models, files, and rows token by token with what the checks found: the
same as `fitune inspect`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from huggingface_hub.constants import HF_HUB_CACHE
from pydantic import Field

from fitune.checks import early
from fitune.commands import inspect
from fitune.commands.demo import bundled
from fitune.commands.ui.paths import Roots
from fitune.commands.ui.settings import Wanted, command, flags
from fitune.core import catalog
from fitune.core.config import build
from fitune.views import cells

MOST_ROWS = 12  # that are shown token by token
# settings of `fitune inspect`, of those that the page sets
OF_DATA = ("objective", "format", "map", "take", "skip_bad", "system_role", "max_length", "length_policy", "train_on")
DEEP = 2  # folders below the working folder in which models are looked for


class Rows(Wanted):
    """Rows that are to be seen. labels: in the page's language, what opens the ids and labels of a row."""

    samples: int = Field(default=4, ge=1, le=MOST_ROWS)
    labels: str = Field(default="with ids and labels", max_length=80)


def models(roots: Roots) -> list[dict[str, object]]:
    """Models that can be chosen: folders, what lies in the hub's cache, the bundled one, the catalog."""
    found = [_entry(roots.shown(folder), "folder") for folder in _folders(roots.work)]
    found += [_entry(name, "cache") for name in _cached()]
    found.append(_entry(bundled_model(), "bundled"))
    found += [{"name": one.name, "kind": "catalog", "parameters": one.parameters} for one in catalog.entries().values()]
    return found


def _entry(name: str, kind: str) -> dict[str, object]:
    return {"name": name, "kind": kind, "parameters": None}


def _folders(work: Path) -> Iterator[Path]:
    for depth in range(1, DEEP + 1):
        for file in sorted(work.glob("/".join(["[!.]*"] * depth + ["config.json"]))):
            if not file.is_symlink():
                yield file.parent


def _cached() -> Iterator[str]:
    """Ids of models in the hub's cache of which there is more than a config.json."""
    for folder in sorted(Path(HF_HUB_CACHE).glob("models--*")):
        if any(folder.glob("snapshots/*/*.safetensors")):
            yield folder.name.removeprefix("models--").replace("--", "/", 1)


def bundled_model() -> str:
    """The model that comes with fitune."""
    return str(bundled() / "model")


def samples_of_package() -> list[str]:
    """The data that comes with fitune, to try it with."""
    return [str(bundled() / "data" / name) for name in ("train.jsonl", "held_out.jsonl", "pairs.jsonl")]


def rows(wanted: Rows, roots: Roots) -> dict[str, object]:
    """Rows, lengths, labels and findings, as `fitune inspect` has them.

    Raises:
        FituneError: data or a tokenizer that cannot be read at all.
    """
    early.together(lambda: early.folder(wanted.model), *early.each(early.data, *wanted.data))
    config = build({**wanted.settings, "model": wanted.model, "data": wanted.data})
    seen = inspect.inspect(config, samples=wanted.samples)
    return {
        "rows": seen.rows, "bad": seen.bad, "notes": seen.notes, "by_format": seen.by_format, "template": seen.template,
        "languages": seen.languages, "lengths": seen.lengths, "histogram": seen.histogram,
        "max_length": seen.max_length, "label_share": seen.label_share,
        "findings": [asdict(one) for one in seen.findings],
        "samples": [{**asdict(one), "drawn": cells.sample(one.tokens, wanted.labels)} for one in seen.samples],
        "command": inspected(wanted),
    }  # fmt: skip


def inspected(wanted: Wanted) -> str:
    """The command that shows the same in a terminal."""
    of_data = {name: value for name, value in wanted.settings.items() if name in OF_DATA}
    return command("inspect", *wanted.data, "--model", wanted.model, *flags(of_data))
