"""`train --fit`: the settings that fit best beside those that were given, before a run begins.

In: settings as given, a device. Out: the checked config to train with, and the advice that it comes from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fitune.commands.advise import advise
from fitune.core.config import RunConfig, build, merge
from fitune.core.events import Watcher
from fitune.memory.advice import Advised

NOT_ASKED = ("model", "data", "output", "force")  # settings that an advice takes apart, or has no use for


@dataclass(frozen=True)
class Fitted:
    """The settings that fit best.

    config: to train with. outside: bytes beside the tensors, as their plan counts them. advised: the advice that they
    come from; its `here` is False where they are planned for another machine.
    """

    config: RunConfig
    outside: dict[str, int]
    advised: Advised


def fit(values: Mapping[str, Any], *, gpu: str | None = None, watch: Watcher | None = None, workers: int = 1) -> Fitted:
    """The best settings that fit beside those that are given; the rows of an optimizer step stay as many.

    Args:
        values: the fields of RunConfig, model and data among them.
        gpu: a size (24GB) or a GPU (rtx-4090). Default: this machine.
        watch: what is reported to.
        workers: processes that share each step.

    Raises:
        FituneError: a setting is wrong, or nothing fits.
    """
    checked = build(values)
    given = {name: value for name, value in values.items() if name not in NOT_ASKED}
    found = advise(checked.model, data=checked.data, gpu=gpu, watch=watch, only_best=True, workers=workers, **given)
    best = found.suggestions[0]
    return Fitted(build(merge(values, best.settings)), best.plan.outside, found)
