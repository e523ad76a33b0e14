"""A trace of a deep model from two traces of shallow ones, event for event.

In: a piece of work whose model is many blocks that are alike. Out: the trace that the whole model would give, or None
where the two shallow traces do not say it for sure. Two models are traced, of which the second has one more block (or
one more period, where kinds of blocks alternate). Its trace must be the first one's with stretches inserted that repeat
what stands right before them: the added block on its way forward, backward, in the update. Such stretches are repeated
until the model is as deep as it is. What counts with depth (numbers of modules, a list of all norms) goes on as it does
from the first to the second. Nothing is estimated: a trace made so is that of the whole model, as
tests/memory/test_depth.py compares them, and where anything does not fit the whole model is traced.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence, Set
from copy import deepcopy
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig

from fitune.memory.storage import TRAINABLE, WEIGHTS, Block
from fitune.memory.trace import Tracer
from fitune.models import families
from fitune.models.interfaces import causal_lm

# traces the model of a config whose blocks are those of these numbers
Run = Callable[[PretrainedConfig, Sequence[int]], tuple[list[object], Tracer]]
KEPT = 3  # periods of like blocks in the first of the shallow models: the first and the last may differ from the others
LONGEST = 6  # blocks of a period
WORTH = 0.7  # of the blocks, at most, that the two shallow models may have together
Base = tuple[str, str, str, str, str]  # phase, region, module without numbers, operation, category
NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a part of a module's name


@dataclass(frozen=True)
class Cut:
    """Which blocks are left out: `out` of them from number `at` on; `period`: how many come back at a time."""

    at: int
    out: int
    period: int


def kinds(model: nn.Module, beside: Sequence[object]) -> list[object]:
    """What decides how each block of a model works: its modules, their settings and the shapes of their parameters.

    Args:
        model: with its method.
        beside: of each block what else decides it.
    """
    inner = causal_lm(model)
    return [(_kind(b), one) for b, one in zip(families.of(inner).block_list(inner), beside, strict=True)]


def _kind(block: nn.Module) -> object:
    found = []
    for name, module in block.named_modules():
        plain = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, (bool, int, float, str)) and not re.search("layer_(idx|number|id)|block_idx", key)
        }
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        shapes = [(key, t.dtype, tuple(t.shape), t.requires_grad) for key, t in tensors]
        found.append((name, type(module), sorted(plain.items()), shapes))
    return found


def cut(blocks: Sequence[object], fewest: int = KEPT) -> Cut | None:
    """The cut that leaves the fewest blocks; None: they are not enough alike to be worth it.

    Args:
        blocks: of what kind each is (`kinds`).
        fewest: periods that stay.
    """
    total = len(blocks)
    for period in range(1, LONGEST + 1):
        same = [blocks[n] == blocks[n - period] for n in range(period, total)]
        start, length = _longest_run(same)
        out = (length + period - fewest * period) // period * period
        shallow = total - out
        if out >= 2 * period and 2 * shallow + period <= WORTH * total:
            return Cut(start + fewest * period, out, period)
    return None


def _longest_run(same: Sequence[bool]) -> tuple[int, int]:
    """(start, length) of the longest stretch of what is true."""
    best, start = (0, 0), 0
    for at, one in enumerate([*same, False]):
        if not one:
            best = max(best, (start, at - start), key=lambda run: run[1])
            start = at + 1
    return best


def shallow(model_config: PretrainedConfig, total: int, at: int, out: int) -> PretrainedConfig:
    """The config of a model without `out` of its blocks from number `at` on; lists with an entry for each block too."""
    found = deepcopy(model_config)
    for name, value in list(vars(found).items()):
        if isinstance(value, (list, tuple)) and len(value) == total:
            setattr(found, name, type(value)([*value[:at], *value[at + out :]]))
    found.num_hidden_layers = total - out
    return found


def traced(model: nn.Module, blocks: list[object], model_config: PretrainedConfig, run: Run) -> Tracer | None:
    """The trace of a deep model.

    Args:
        model: all of it, on meta, with its method.
        blocks: of what kind each is (`kinds`).
        model_config: its transformers config.
        run: traces the model of a config; the kinds of its blocks, and the trace.
    """
    found = cut(blocks)
    if found is None or model_config.num_hidden_layers != len(blocks):
        return None
    traces: list[Tracer] = []
    for out in (found.out, found.out - found.period):
        stay = [*range(found.at), *range(found.at + out, len(blocks))]
        left, trace = run(shallow(model_config, len(blocks), found.at, out), stay)
        if left != [blocks[number] for number in stay]:
            return None
        traces.append(trace)
    low, high = traces
    times = found.out // found.period - 1
    deep = deepened(low, high, times)
    if deep is None or not _weighs(deep, model):
        return None
    for name in ("host_most", "once", "again"):
        more = getattr(high, name) - getattr(low, name)
        setattr(deep, name, getattr(high, name) + times * more)
    return deep


def _weighs(trace: Tracer, model: nn.Module) -> bool:
    """Has a trace the weights of the whole model, and no others?"""
    storages: dict[int, tuple[int, bool]] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        storage = tensor.untyped_storage()
        storages.setdefault(storage._cdata, (storage.nbytes(), tensor.requires_grad))
    real = [sum(size for size, trains in storages.values() if trains == kind) for kind in (False, True)]
    mine = [
        sum(b.bytes for b in trace.blocks if b.category == kind and b.freed is None) for kind in (WEIGHTS, TRAINABLE)
    ]
    return real == mine


# ---- traces as sequences of symbols ----


@dataclass(slots=True)
class _Mark:
    """An entry of a trace. symbol: what it is, the same for all that are alike; number, bytes: what may grow with
    depth; block: what is allocated; course: a change of phase; freed: which of the live blocks of its symbol ends."""

    symbol: int
    number: int = 0
    bytes: int = 0
    block: Block | None = None
    course: tuple[str, str] | None = None
    freed: tuple[int, bool, int] | None = None  # symbol, from the newest (else from the oldest), how far from there


def deepened(low: Tracer, high: Tracer, times: int) -> Tracer | None:
    """The trace of a model that is deeper than `high` by as much as that is deeper than `low`, `times` over."""
    symbols: dict[object, int] = {}
    sizes = [{(_base(b), b.bytes) for b in one.blocks} for one in (low, high)]
    varying = sizes[0] ^ sizes[1]
    first, second = (_marks(one, symbols, varying) for one in (low, high))
    inserted = _inserted([mark.symbol for mark in first], [mark.symbol for mark in second])
    if inserted is None:
        return None
    marks = _repeated(first, second, inserted, times)
    return None if marks is None else _trace(marks, high)


def _base(block: Block) -> Base:
    return block.phase, block.region, NUMBER.sub("#", block.module, count=1), block.op, block.category


def _marks(trace: Tracer, symbols: dict[object, int], varying: Set[tuple[Base, int]]) -> list[_Mark]:
    """A trace as marks."""

    def symbol(key: object) -> int:
        return symbols.setdefault(key, len(symbols))

    marks: list[_Mark] = []
    live: dict[int, list[int]] = defaultdict(list)  # of a symbol: the blocks that are there, the oldest first
    born: dict[int, int] = {}
    course = iter([*trace.course, (len(trace.events) + 1, "", "")])
    at, *names = next(course)
    for event in range(len(trace.events) + 1):
        while at <= event:
            marks.append(_Mark(symbol(("course", *names)), course=(names[0], names[1])))
            at, *names = next(course)
        if event == len(trace.events):
            break
        number, size = trace.events[event]
        if number not in born:
            block = trace.blocks[number]
            base, module = _base(block), NUMBER.search(block.module)
            key = symbol((base, None if (base, block.bytes) in varying else block.bytes))
            marks.append(_Mark(key, int(module[0]) if module else 0, size, block))
            born[number] = key
            live[key].append(number)
            continue
        key = born[number]
        there = live[key]
        oldest = there.index(number)
        newest = len(there) - 1 - oldest
        freed = (key, True, newest) if newest <= oldest else (key, False, oldest)
        del there[oldest]
        marks.append(_Mark(symbol(("freed", *freed)), freed=freed))
    return marks


def _inserted(low: Sequence[int], high: Sequence[int]) -> list[tuple[int, int, int]] | None:
    """Where stretches of `high` that are not in `low` repeat what stands before them: (place in low, place in high,
    length); None: that is not how they differ."""
    found: list[tuple[int, int, int]] = []
    i = j = since = 0
    while True:
        while i < len(low) and j < len(high) and low[i] == high[j]:
            i, j = i + 1, j + 1
        left = (len(high) - j) - (len(low) - i)
        if i == len(low) and left == 0:
            return found
        after = low[i] if i < len(low) else -1
        for size in range(1, min(left, i - since) + 1):
            behind = high[j + size] if j + size < len(high) else -1
            if behind == after and high[j - size : j] == high[j : j + size]:
                found.append((i, j, size))
                since, j = i, j + size
                break
        else:
            return None


def _repeated(
    low: Sequence[_Mark], high: Sequence[_Mark], inserted: Sequence[tuple[int, int, int]], times: int
) -> list[_Mark] | None:
    """The marks of `high` with what was inserted `times` more, numbers and bytes going on."""
    grown: list[_Mark] = []
    i = j = 0
    for place, there, size in [*inserted, (len(low), len(high), 0)]:
        for one, other in zip(low[i:place], high[j:there], strict=True):
            grown.append(_moved(other, times, (other.number - one.number, other.bytes - one.bytes)))
        i, j = place, there + size
        for copy in range(times + 1):
            for n in range(size):
                mine, before, low_one = high[there + n], high[there - size + n], low[place - size + n]
                pre = (before.number - low_one.number, before.bytes - low_one.bytes)
                step = (mine.number - before.number, mine.bytes - before.bytes)
                grown.append(_moved(_moved(mine, times, pre), copy, step))
    return grown if all(mark.bytes >= 0 and mark.number >= 0 for mark in grown) else None


def _moved(mark: _Mark, times: int, each: tuple[int, int]) -> _Mark:
    number, size = mark.number + times * each[0], mark.bytes + times * each[1]
    return _Mark(mark.symbol, number, size, mark.block, mark.course, mark.freed)


def _trace(marks: Sequence[_Mark], like: Tracer) -> Tracer | None:
    """The trace that marks stand for."""
    trace = Tracer(like.target)
    live: dict[int, list[int]] = defaultdict(list)
    for mark in marks:
        if mark.course is not None:
            trace.at(*mark.course)
        elif mark.block is not None:
            old, number = mark.block, len(trace.blocks)
            module = NUMBER.sub(str(mark.number), old.module, count=1)
            trace.blocks.append(
                Block(mark.bytes, old.phase, old.region, module, old.op, len(trace.events), category=old.category)
            )
            trace.events.append((number, mark.bytes))
            live[mark.symbol].append(number)
        else:
            assert mark.freed is not None
            key, newest, rank = mark.freed
            if rank >= len(live[key]):
                return None
            trace._release(live[key].pop(-1 - rank if newest else rank))
    return trace


__all__ = ["Cut", "cut", "deepened", "kinds", "shallow", "traced"]
