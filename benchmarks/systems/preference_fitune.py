"""Preferences in fitune: `python preference_fitune.py SETTINGS.json`.

In: a model, an adapter to compare at, a file of rows, an objective. The rows are read as `fitune train` reads them, in
the order of its first steps, and written beside as ids, so that another system gets the same. Out, of each batch: the
loss, the rewards, the gradient of every trained tensor, and the operations that they took; and of one batch the most
memory that its gradients take, with that of tuning on answers of as many tokens and labels.

The reference is the base model; the adapter has random A and B, so that model and reference differ from the first batch
on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import meter as meters

WHOLE = "orpo-whole"  # ORPO on prompts of one token, a pair in a batch: there TRL's own loss has the same terms


def config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The run's settings."""
    objective = settings["objective"].split("-")[0]
    return {
        "model": settings["model"], "data": [settings["raw"]], "output": f"{settings['work']}/run", "method": "lora",
        "lora": {"rank": settings["rank"], "alpha": settings["alpha"], "targets": settings["targets"]},
        "objective": objective, objective: settings["options"], "precision": "fp32", "device": "cpu", "val_share": 0,
        "batch_size": settings["batch"], "max_steps": settings["steps"], "seed": settings["seed"], "cache": "none",
    }  # fmt: skip


def pair_of(unit: Any) -> dict[str, Any]:
    """A row as ids, for another system."""
    sides = {"chosen": unit.chosen, "rejected": unit.rejected}
    start = unit.chosen.prompt_length
    found = {name: side.ids[side.prompt_length :].tolist() for name, side in sides.items()}
    return {"prompt": unit.chosen.ids[:start].tolist(), **found, "desirable": unit.desirable}


def shortened(sample: Any) -> Any:
    """A sample whose prompt is its last token alone."""
    from dataclasses import replace

    return replace(sample.part(slice(sample.prompt_length - 1, None)), prompt_length=1, shared=1)


def answers_of(batch: Any) -> Any:
    """Tuning on answers of as many tokens and labels: the same documents, but that nothing is shared or compared."""
    from dataclasses import replace

    return replace(batch, answers=None, shared=None)


def main() -> None:
    """Compute all of it."""
    settings = meters.settings()
    import torch
    from safetensors.torch import save_file

    from fitune.commands import planned_rows, reference
    from fitune.commands.request import to_train
    from fitune.core.config import build
    from fitune.core.events import Silent
    from fitune.data.batches import Loader
    from fitune.data.pairs import Pairs
    from fitune.engine import objectives
    from fitune.engine.rewards import rewards_of
    from fitune.engine.step import SFT, make_gradients
    from fitune.memory.measure import most_allocated
    from fitune.models import adapters
    from fitune.models.load import load_model
    from fitune.models.parts import trainable

    request = to_train(build(config(settings)))
    rows = planned_rows.read(request, Path(settings["model"]), Silent(), to_train=True)
    units: Any = rows.rows.samples
    loader = planned_rows.make_loader(request.config, units, "flat")
    order = [row for step in loader.epoch_steps(0)[: settings["steps"]] for micro in step for row in micro.tolist()]
    units = Pairs([side for row in order for side in (units[row].chosen, units[row].rejected)],
                  desirable=None if units.desirable is None else units.desirable[order],
                  common=None if units.common is None else units.common[order])  # fmt: skip
    batch = settings["batch"]
    if settings["objective"] == WHOLE:
        units, batch = Pairs([shortened(side) for side in units.samples]), 1
    model = adapters.attach(load_model(Path(settings["model"]), precision="fp32"), request.config)
    taken = {}
    if objectives.needs_reference(request.config):
        compared = reference.Reference(model, request.config, "flat", {}, Silent())

        def known() -> None:
            nonlocal units
            units = compared.added(units)

        taken["reference_flops"] = meters.flops_of(known)
    adapters.load_into(model, Path(settings["adapter"]))
    objective, found, gradients = objectives.of(request.config), [], {}
    batches = [micro for _, micro in Loader(units, batch, 1, 0).steps(0, len(units) // batch)]
    for number, micro in enumerate(batches):
        made: list[Any] = []

        def work(micro: Any = micro, made: list[Any] = made) -> None:
            made.append(make_gradients(model, micro, "flat", objective=objective))

        flops = meters.flops_of(work)
        rewards = rewards_of(made[0].seen.tolist())
        for name, parameter in trainable(model).items():
            if parameter.grad is not None:
                gradients[f"{number}.{name}"] = parameter.grad.clone()
        model.zero_grad(set_to_none=True)
        found.append(
            {"loss": made[0].loss, "chosen": rewards.chosen, "rejected": rewards.rejected, "flops": flops,
             "tokens": made[0].tokens, "rows": [pair_of(units[row]) for row in micro[0].rows]}
        )  # fmt: skip
    save_file(gradients, str(Path(settings["work"]) / "gradients.safetensors"))
    largest = max((micro for micro in batches), key=lambda micro: len(micro[0].ids))
    for name, some, how in (("peak", largest, objective), ("sft_peak", [answers_of(largest[0])], SFT)):
        taken[name] = most_allocated(partial(make_gradients, model, some, "flat", objective=how))
        model.zero_grad(set_to_none=True)
    result = {"batches": found, **taken, "versions": meters.versions(), "threads": torch.get_num_threads()}
    Path(settings["result"]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
