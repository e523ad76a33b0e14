"""What memory savers would give, and what makes a plan fit that does not, by exact plans.

In: exact plans of a question (exact.py). Out: savers with their bytes, the best for their cost first; help for a miss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fitune.commands.exact import Exact, below_all, largest_batch, parts, shorter_lengths
from fitune.commands.plan import Answer
from fitune.commands.request import check_quantized
from fitune.core.as_flags import flags
from fitune.core.blocks import AUTO
from fitune.core.config import RunConfig
from fitune.core.errors import FituneError
from fitune.core.events import Silent, Watcher
from fitune.core.plan import size_text
from fitune.memory import plan as plans
from fitune.memory import search
from fitune.memory.advice import Saver

HELPS = 6  # savers that are named where a plan does not fit


def savers(exactly: Exact, settings: Mapping[str, object], *, watch: Watcher | None = None) -> list[Saver]:
    """What each memory saver would give beside settings, the best for its cost first; each is planned exactly."""
    watch, found = watch or Silent(), []
    changes = list(_changes(exactly, exactly.with_settings(settings).config))
    for done, (change, cost) in enumerate(changes):
        watch.progress("planning memory savers", done, len(changes))
        one = _saver(exactly, settings, change, cost)
        if one is not None and one.saves > 0:
            found.append(one)
    watch.progress("planning memory savers", len(changes), len(changes))
    return sorted(found, key=lambda one: -one.worth)


def _saver(exactly: Exact, settings: Mapping[str, object], change: dict[str, object], cost: str) -> Saver | None:
    made = _planned(exactly, {**settings, **change})
    if made is None:
        return None
    time = exactly.time({**settings, **change}) / exactly.time(settings)
    cut = exactly.share_cut(made.max_length or exactly.rows.max_length)
    return Saver(flags(change), change, exactly.plan(settings).needed - made.needed, round(time, 3), cut, cost, made)


def _planned(exactly: Exact, settings: Mapping[str, object]) -> plans.Plan | None:
    """The plan of settings; None: they cannot go together."""
    try:
        check_quantized(exactly.with_settings(settings))
        return exactly.plan(settings)
    except FituneError:
        return None


SAME = "the objective stays the same"
FEWER_ROWS = 64  # label rows whose logits are there at once; a GPU has 512 or more by default


def _changes(exactly: Exact, config: RunConfig) -> Iterator[tuple[dict[str, object], str]]:
    if not config.checkpointing:
        yield {"checkpointing": True}, "blocks are computed again in the backward pass"
    if config.quant.name == "none":
        yield {"quant": {"name": "int8"}}, "8-bit weights are made plain for each product"
    if config.quant.name in ("none", "int8"):
        yield (
            {"quant": {"name": "nf4"}},
            f"4-bit weights kept {search.measured()['gain_kept']['nf4']:.0%} of the gain of the bundled 2M model",
        )
    if exactly.request.where.kind == "cuda" and config.loss_rows == "auto":
        yield {"loss_rows": FEWER_ROWS}, "the output head is read more often"
    if config.batch_size > 1 and not config.optimizer_in_backward:
        yield smaller_batches(config, config.batch_size // 2), SAME
    for shorter in shorter_lengths(exactly):
        if shorter < exactly.longest(config):
            yield {"max_length": shorter}, f"cuts {exactly.share_cut(shorter):.1%} of the rows"
    if config.optimizer == "adamw":
        yield {"optimizer": "adamw-8bit"}, "states in 8 bits"
    if config.precision == "fp32":
        yield {"precision": "bf16"}, "less exact; slow on a CPU without bf16"
    if config.method in ("full", "lora", "adapter"):
        yield {"method": "freeze"}, "trains the last two blocks alone"


def smaller_batches(config: RunConfig, rows: int) -> dict[str, object]:
    """Micro-batches of at most so many rows, and as many of them as keep the rows of a step."""
    wanted = config.accumulation * config.batch_size
    batch = parts(wanted, rows)[0]
    return {"batch_size": batch, "accumulation": wanted // batch}


@dataclass(frozen=True)
class Help:
    """What would make a plan fit that does not. missing: bytes; savers: each alone; together: those that do it, with
    what is needed then; None: all of them are not enough. never: why nothing can."""

    missing: int
    savers: list[Saver]
    together: dict[str, Any] | None
    never: str = ""

    @property
    def text(self) -> str:
        """For people."""
        text = f"misses by {size_text(self.missing)}"
        if self.never:
            return f"{text}: {self.never}"
        each = ", ".join(f"`{one.flag}` saves {size_text(one.saves)} ({one.cost})" for one in self.savers[:HELPS])
        text += f": {each or 'no saver helps here'}"
        if self.together is not None:
            return f"{text}; with `{self.together['flags']}` it needs {size_text(self.together['needed'])} and fits"
        if not self.savers:
            return text
        return f"{text}; all together are not enough: without --method, fitune plan looks through every way"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "missing": self.missing,
            "savers": [one.as_dict() for one in self.savers],
            "together": self.together,
            "text": self.text,
        }


def what_helps(missed: Answer) -> Help:
    """What would make a plan fit that does not: each change with the bytes that it saves, and which of them do it."""
    request = missed.request
    exactly = Exact(request, missed.rows, missed.given, missed.plan)
    now = exactly.plan({})
    missing = -(now.spare or 0)
    never = below_all(request.where)
    if never is not None:
        return Help(missing, [], None, " ".join(str(never).split()))
    found = savers(exactly, {})
    return Help(missing, found, _together(exactly, found, missing))


def _together(exactly: Exact, found: Sequence[Saver], missing: int) -> dict[str, object] | None:
    """The mildest change that is enough: more and smaller micro-batches, where some rows fit; else the best saver that
    is enough alone; else the best ones one after the other, with micro-batches of one row, until they are."""
    config = exactly.request.config
    smaller = config.batch_size > 1 and not config.optimizer_in_backward and config.batch_tokens is None
    if smaller:
        rows, tried = config.batch_size // 2, set[int]()
        while rows not in tried:  # the more micro-batches, the more gradients lie beside
            tried.add(rows)
            change = smaller_batches(config, rows)
            most = largest_batch(exactly, {**change, "max_length": exactly.longest(config)}, rows)
            if most == 0:
                break
            rows = min(config.batch_size - 1, most)
            if (found_ := _enough(exactly, smaller_batches(config, rows))) is not None:
                return found_
    alone = next((one for one in found if one.saves >= missing), None)
    if alone is not None:
        return _enough(exactly, alone.settings)
    taken: dict[tuple[str, ...], dict[str, object]] = {}  # by what they set: of two lengths the shorter one in the end
    if smaller:
        taken["batch_size", "accumulation"] = smaller_batches(config, 1)
    for one in found:
        key = tuple(one.settings)
        if "method" in one.settings or key == ("batch_size", "accumulation"):
            continue
        taken[key] = one.settings
        enough = _enough(exactly, {name: value for change in taken.values() for name, value in change.items()})
        if enough is not None:
            return enough
    return None


def _enough(exactly: Exact, changes: dict[str, object]) -> dict[str, object] | None:
    if changes.get("checkpointing") is True:
        changes = {**changes, "checkpointing": AUTO}  # no more blocks than it takes
    made = _planned(exactly, changes)
    if made is None or not made.fits:
        return None
    return {"settings": changes, "flags": flags(changes), "needed": made.needed}
