"""What the reference model gives the answers of preferences: computed once before the first step, and kept.

In: a model as it is before training, rows of preferences. Out: the same rows with the log-probabilities of their
answers by the reference: the base model, or what an adapter that is gone on from had made of it. They lie in the cache
of prepared data under a key of all that decides them: weights, tokens, precision, machine, code. So later epochs, runs
with other settings of the objective, and resumed runs read them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from fitune.core.config import RunConfig
from fitune.core.events import Ticker, Watcher
from fitune.core.records import Batch, Layout, Units
from fitune.data.batches import flat
from fitune.data.cache import code_version, key
from fitune.data.pairs import Pairs
from fitune.data.pipeline import cache_of
from fitune.engine import environment
from fitune.engine.objectives.base import log_probabilities
from fitune.engine.out_of_memory import in_fewer
from fitune.engine.parallel import ALONE, World
from fitune.models import adapters
from fitune.models.interfaces import CausalLM
from fitune.models.switches import evaluating

FILE, NAME = "reference.safetensors", "log_probabilities"
# settings that decide the bits of a log-probability, beside the weights and the tokens
SETTINGS = {"precision", "storage_dtype", "quant", "layout", "loss_rows", "batch_size", "adapter", "method"}


@dataclass(frozen=True)
class Reference:
    """The model before training, and what names it.

    Args:
        model: with its method on it.
        config: resolved.
        layout: how documents go through it.
        inputs: digests of its weights and of what else decides it.
        watch: what is done is reported to it.
        world: the processes of a run whose model is in shards: all compute, unless each has it already.
    """

    model: CausalLM
    config: RunConfig
    layout: Layout
    inputs: Mapping[str, object]
    watch: Watcher
    world: World = ALONE

    def added(self, units: Units, met: NDArray[np.int64] | None = None) -> Units:
        """Rows with the reference's log-probabilities; rows of samples as they are.

        Args:
            units: all rows.
            met: numbers of those that the run meets, ascending; None: all.
        """
        if not isinstance(units, Pairs) or not len(units):
            return units
        numbers = np.arange(len(units)) if met is None else met
        found = np.full((len(units), 2), np.nan, np.float32)
        cache = cache_of(self.config, self.watch)
        name = self._key(units, numbers)
        made: NDArray[np.float32] | None = None
        if not self.world.alone:  # a model in shards needs all of them, and each may have a cache of its own
            there = self.world.gathered(cache.newest("reference", name) is not None, "the reference")
            made = None if all(there) else self._computed(units, numbers, self.config.batch_size)
        folder = cache.entry("reference", name, lambda path: self._write(path, units, numbers, made))
        if folder.name in cache.found:
            self.watch.message(f"reference: log-probabilities of {len(numbers):,} rows from the cache")
        found[numbers] = load_file(folder / FILE)[NAME]
        return units.with_reference(found)

    def _key(self, units: Pairs, numbers: NDArray[np.int64]) -> str:
        tokens = hashlib.sha256()
        for n in numbers.tolist():
            for sample in (units.samples[2 * n], units.samples[2 * n + 1]):
                tokens.update(sample.ids.tobytes() + sample.mask.tobytes())
        settings = self.config.model_dump(mode="json", include=SETTINGS)
        machine = {k: v for k, v in environment.describe(next(self.model.parameters()).device).items() if k in MACHINE}
        rooms = [Path(environment.__file__).parent, Path(adapters.__file__).parents[1]]
        code = [code_version(room) for room in rooms]
        return key(tokens.hexdigest(), settings, self.layout, units.common is None, dict(self.inputs), machine, code)

    def _write(self, folder: Path, units: Pairs, numbers: NDArray[np.int64], made: NDArray[np.float32] | None) -> None:
        """made: what all processes have computed; None: this one does."""
        if made is None:
            made = in_fewer(
                lambda rows: self._computed(units, numbers, rows),
                self.config.batch_size,
                "rows for the reference",
                self.watch.message,
            )
        save_file({NAME: made}, folder / FILE)

    def _computed(self, units: Pairs, numbers: NDArray[np.int64], rows: int) -> NDArray[np.float32]:
        """(R, 2): so many rows at a time. The base model, where no adapter is gone on from."""
        ticker = Ticker(self.watch, "reference", len(numbers))
        made: list[NDArray[np.float32]] = []
        base = nullcontext() if self.config.adapter is not None else adapters.disabled(self.model)
        with evaluating(self.model), base:
            for start in range(0, len(numbers), rows):
                batch = flat(units, numbers[start : start + rows])
                sums = [log_probabilities(self.model, one, self.layout).cpu().numpy() for one in _batches(batch)]
                made.append(sums[0].reshape(-1, 2) if len(sums) == 1 else np.stack(sums, axis=1))
                ticker(min(start + rows, len(numbers)))
        ticker.end()
        return np.concatenate(made)


MACHINE = ("packages", "device", "machine", "threads")


def _batches(batch: Batch) -> Iterator[Batch]:
    """A batch of pairs; of labelled answers also that of the answers to other prompts."""
    yield batch
    if batch.answers is not None and batch.answers.mismatched is not None:
        yield batch.answers.mismatched


def met(steps: Sequence[Sequence[NDArray[np.int64]]], total: int) -> NDArray[np.int64]:
    """The rows that a run of so many steps meets, ascending.

    Args:
        steps: of its first epoch.
        total: optimizer steps of the run.
    """
    return np.unique(np.concatenate([rows for step in steps[:total] for rows in step]))
