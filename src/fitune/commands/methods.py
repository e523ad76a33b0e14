"""The methods side by side: what each trains, what that takes, whether it merges, where it works.

In: the config of a model. Out: a row per method. No weights are needed: the model is built without
storage.
"""

from __future__ import annotations

from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING

from fitune.core import catalog
from fitune.core.config import build
from fitune.core.errors import ConfigError, ModelError
from fitune.core.results import Overview
from fitune.models import families, methods
from fitune.models.configs import config_of, read_config, without_weights
from fitune.models.locate import locate
from fitune.models.methods import other

BYTES = 16  # of a trained parameter in float32: itself, its gradient, Adam's two states
EXAMPLE = "llama-3.2-1b"


def overview(model: str | None = None) -> list[Overview]:
    """A row per method, with its own default settings.

    Args:
        model: a name of the catalog; or a folder or hub id, of which only config.json is read; None: Llama-3.2-1B.
    """
    entry = catalog.get(model or EXAMPLE)
    config = config_of(entry.config) if entry is not None else read_config(locate(str(model), only=["config.json"]))
    base = without_weights(config)
    total = sum(p.numel() for p in base.parameters())
    rows = [_row(method, base, total, {}) for method in methods.TABLE.values()]
    at = next(n for n, row in enumerate(rows) if row.name == "bitfit")
    if rows[at].trainable is None:
        rows.insert(at + 1, _row(methods.TABLE["bitfit"], base, total, {"bitfit": {"add": True}}))
    return [*rows, _others()]


def _others() -> Overview:
    """All that PEFT has beside."""
    known = sorted(str(getattr(kind, "value", kind)) for kind in PEFT_TYPE_TO_CONFIG_MAPPING)
    kinds = ", ".join(kind for kind in known if kind not in (*other.NEEDS_MORE, *OURS))
    return Overview(
        "peft:TYPE", other.Other.trains, None, None, None, True, "as PEFT", other.Other.default_lr, other.Other.why_lr,
        f"types: {kinds}",
    )  # fmt: skip


OURS = ("LORA", "IA3", "PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")  # by names of their own


def _row(method: methods.Method, base: Any, total: int, settings: dict[str, dict[str, bool]]) -> Overview:
    config = build({"model": "m", "data": ["d"], "method": method.name, **settings})
    family = families.of(base)
    note, trainable = "", None
    try:
        trainable = method.count(base, family, config)
    except (ConfigError, ModelError) as error:
        note = error.what
    problem = method.merge_problem(base, family, config)
    return Overview(
        name=method.name if not settings else f"{method.name}, {', '.join(f'{k}.add' for k in settings)}",
        trains=method.trains,
        trainable=trainable,
        share=None if trainable is None else trainable / total,
        training_bytes=None if trainable is None else BYTES * trainable,
        merges=problem is None,
        families=method.families,
        default_lr=method.default_lr,
        why_lr=method.why_lr,
        note=note or (f"does not merge: {problem}" if problem else ""),
    )
