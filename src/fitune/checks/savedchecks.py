"""Rules about what a run saved: each a function named as in the report.

In: a checkpoint, a model and its adapter folder. Out: Findings. When a run goes on: partial-checkpoint,
resume-identity. At its end: saved-complete.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from torch import Tensor, nn

from fitune.core.errors import FituneError
from fitune.core.records import Batch, Finding, Layout
from fitune.engine.checkpoint import Loaded
from fitune.engine.step import hidden_states
from fitune.models import adapters
from fitune.models.methods import lora
from fitune.models.switches import evaluating
from fitune.models.weights import safe
from fitune.models.weights.safe import Late

AGAIN = "the checkpoints are complete: fitune train --resume --output RUN saves again"

# ---- when a run goes on ----


def partial_checkpoint(path: Path | None, reasons: Sequence[str]) -> Finding:
    """The run goes on from the newest checkpoint that is complete and fits the log.

    Args:
        path: of that one; None: there is none.
        reasons: why each newer one does not count.
    """
    if reasons:
        use = path.name if path else "the beginning"
        return Finding("partial-checkpoint", "fixed", f"{', '.join(reasons)}: going on from {use}")
    return Finding("partial-checkpoint", "ok", "the newest checkpoint is complete" if path else "no checkpoint yet")


def resume_identity(loaded: Loaded, parameters: Mapping[str, Tensor], steps: int) -> Finding:
    """A checkpoint has every trained tensor with its shape, the optimizer's states for them, the state of the random
    numbers, and no more steps than were logged."""
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    stored = {name: tuple(t.shape) for name, t in loaded.trainable.items()}
    wrong = sorted(name for name in {*shapes, *stored} if shapes.get(name) != stored.get(name))
    if wrong:
        return Finding(
            "resume-identity", "refuse", f"other trained tensors than those of this run: {wrong[:3]}", "start a new run"
        )
    without = [
        n for n in shapes if not any(k.startswith(f"{n}|") for k in (*loaded.optimizer, *loaded.optimizer_scalars))
    ]
    if without and loaded.step > 0:
        return Finding("resume-identity", "refuse", f"no optimizer state for {without[0]}", "start a new run")
    if "cpu" not in loaded.rng:
        return Finding("resume-identity", "refuse", "the random numbers' state is missing", "start a new run")
    if steps < loaded.step:
        text = f"{steps} steps are logged, the checkpoint is that of step {loaded.step}"
        return Finding("resume-identity", "refuse", text, "restore steps.jsonl, or start a new run")
    return Finding("resume-identity", "ok", f"step {loaded.step}: weights, optimizer, random numbers and order of rows")


# ---- at the end ----


@torch.no_grad()
def saved_complete(
    model: nn.Module, folder: Path, batch: Batch, layout: Layout, late: Mapping[str, Late] | None = None
) -> Finding:
    """The saved adapter, read back, is what was trained: names, shapes, values and hidden states are the same.

    Args:
        model: with its method.
        folder: of the adapter.
        batch, layout: whose hidden states are compared.
        late: of a model in parts, how each tensor is made whole; empty: what was saved is whole in it. Then the values
            alone are compared.
    """
    try:
        if late:
            return _same_values(folder / adapters.WEIGHTS, late)
        stored = adapters.stored(model, folder)
    except (OSError, ValueError, SafetensorError, FituneError) as error:
        text = f"what was saved cannot be read back: {' '.join(str(error).split())[:200]}"
        return Finding("saved-complete", "refuse", text, AGAIN)
    mine = _as_saved(model)
    shapes = [{name: tuple(t.shape) for name, t in some.items()} for some in (stored, mine)]
    wrong = sorted(name for name in {*stored, *mine} if shapes[0].get(name) != shapes[1].get(name))
    wrong += [name for name, value in mine.items() if name not in wrong and not torch.equal(stored[name], value.cpu())]
    if wrong:
        return Finding("saved-complete", "refuse", f"what was saved differs from what was trained: {wrong[:3]}", AGAIN)
    text = f"{len(stored)} tensors read back from {folder.name}, equal bit for bit"
    as_lora = isinstance(model, PeftModel) and lora.is_pissa(model)  # it was saved in another form
    if not as_lora and late is None:
        with evaluating(model):
            before = hidden_states(model, batch, layout)
            try:
                adapters.load_into(model, folder)
            except (OSError, ValueError, SafetensorError, FituneError) as error:
                text = f"what was saved cannot be loaded again: {' '.join(str(error).split())[:200]}"
                return Finding("saved-complete", "refuse", text, AGAIN)
            same = torch.equal(before, hidden_states(model, batch, layout))
        if not same:
            return Finding(
                "saved-complete", "refuse", "read back, it gives other hidden states", "save again: --resume"
            )
        text += "; they give the same hidden states"
    return Finding("saved-complete", "ok", text)


def _same_values(file: Path, late: Mapping[str, Late]) -> Finding:
    """Has the file the tensors that are made, one after the other?"""
    wrong = []
    with safe.opened(file) as stored:
        names = set(stored.keys())
        for name, one in safe.in_order(late):
            mine = one.make()
            if mine is None or name not in names or not torch.equal(stored.get_tensor(name), mine):
                wrong.append(name)
    wrong += sorted(names - set(late))
    if wrong:
        return Finding("saved-complete", "refuse", f"what was saved differs from what was trained: {wrong[:3]}", AGAIN)
    return Finding("saved-complete", "ok", f"{len(late)} tensors read back from {file.parent.name}, equal bit for bit")


def _as_saved(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that the adapter folder must hold."""
    if not isinstance(model, PeftModel):
        return adapters.trained(model)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    changed = lora.pissa_as_lora(model, state)
    return state if changed is None else changed[0]
