"""Why a way is suggested: data, machine, rules of thumb, lengths and domain, each with its figures.

In: exact plans (exact.py) and what is suggested. Out: pieces of advice.
"""

from __future__ import annotations

from collections.abc import Iterator

from fitune.commands import evaluate as evaluation
from fitune.commands.exact import Exact, labelled
from fitune.commands.request import Request
from fitune.core.errors import FituneError
from fitune.core.plan import size_text
from fitune.memory.advice import Advice, Suggestion
from fitune.memory.closed import state_bytes
from fitune.models import weights
from fitune.models.configs import without_weights
from fitune.models.precision import DTYPES


def reasons(exactly: Exact, best: Suggestion) -> Iterator[Advice]:
    yield _tokens_against_parameters(exactly, best)
    yield _against_the_machine(exactly, best)
    yield _rules_of_thumb(exactly, best)
    yield _longest_row(exactly, best)
    if exactly.request.processes > 1:
        yield _together(exactly, best)


def _tokens_against_parameters(exactly: Exact, best: Suggestion) -> Advice:
    tokens = int(exactly.largest.lengths.sum() * labelled(exactly.rows))
    about = exactly.rows.report is None  # lengths are estimated
    tokens = int(float(f"{tokens:.1e}")) if about else tokens
    trained = best.plan.trainable
    total = sum(p.numel() for p in without_weights(exactly.request.model_config).parameters())
    text = (
        f"direct tuning of all {total:,} parameters wants at least as many trained tokens; an epoch of this data has "
        f"{'about ' * about}{tokens:,}"
    )
    text += ": it can be tried" if tokens >= total else f", {_rounded(total / max(1, tokens))} times too few"
    text += f"; {best.name} trains {trained:,} parameters, {_rounded(tokens / max(1, trained))} tokens for each"
    return Advice("data", text, {"tokens": tokens, "parameters": total, "trainable": trained})


def _together(exactly: Exact, best: Suggestion) -> Advice:
    """What several processes have each."""
    count, made = exactly.request.processes, best.plan
    rows = best.micro_batch * best.accumulation
    has = "its part of the model's blocks" if made.parallel == "shard" else "the whole model"
    cpu = exactly.request.where.kind == "cpu"
    time = "they share its cores" if cpu else f"an epoch takes 1/{count} of the time of one, and what they exchange"
    text = f"each of {count} processes has {has}, and about {rows / count:.3g} of the {rows} rows of a step; {time}"
    return Advice("processes", text, {"processes": count, "parallel": made.parallel, "rows_of_each": rows / count})


def _rounded(value: float) -> str:
    """With two digits that count."""
    return f"{float(f'{value:.1e}'):,.12g}"


def _against_the_machine(exactly: Exact, best: Suggestion) -> Advice:
    made, where, batch, times = best.plan, exactly.request.where, best.micro_batch, best.accumulation
    text = (
        f"{best.name} needs {size_text(made.needed)} of {size_text(made.budget or 0)} with micro-batches of {batch} "
        f"rows of at most {best.max_length:,} tokens{f', {times} for each step' if times > 1 else ''}"
    )
    if best.largest_batch > batch:
        every = " (all there are)" * (best.largest_batch == len(exactly.rows.samples))
        text += f"; {best.largest_batch} rows{every} would fit, with {size_text(best.needed_at_largest)}"
    work = exactly.work(best.settings)
    text += f"; an epoch is {work:,.3g} operations"
    if best.seconds is not None:
        text += f", about {_duration(best.seconds)} on {where.name}"
    if best.enough is not None:
        text += f"; throughput hardly grows beyond {best.enough} row{'s' * (best.enough > 1)} of a micro-batch"
    figures = {"needed": made.needed, "budget": made.budget, "operations": work, "seconds": best.seconds}
    return Advice("machine", text, figures)


def _duration(time: float) -> str:
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if time >= 2 * size:
            return f"{time / size:,.1f} {name}"
    return f"{time:,.0f} seconds" if time >= 2 else "a second or two"


def _rules_of_thumb(exactly: Exact, best: Suggestion) -> Advice:
    total, trained, rows = best.plan.total, best.plan.trainable, best.micro_batch
    by_batch, by_bytes = 6 * rows * total, 16 * total
    config = exactly.with_settings(best.settings).config
    each = 2 * DTYPES[config.trainable_dtype].itemsize + state_bytes(config)  # itself, its gradient, its states
    text = (
        f"common rules of thumb give {size_text(by_batch)} (6 x batch x parameters, with {rows} rows) and "
        f"{size_text(by_bytes)} (4 + 8 + 4 bytes a parameter); the plan gives {size_text(best.plan.needed)}: "
        f"{_rounded(each)} bytes go to each of the {trained:,} trained parameters alone, and activations depend on "
        "tokens, not on rows"
    )
    figures = {"six_times": by_batch, "sixteen_bytes": by_bytes, "plan": best.plan.needed}
    return Advice("rules of thumb", text, figures)


def _longest_row(exactly: Exact, best: Suggestion) -> Advice:
    lengths, rows = exactly.rows.lengths, exactly.rows
    chosen = {choice.name: choice for choice in rows.choices}
    cut = chosen["chosen"].cut if best.max_length == rows.max_length else exactly.share_cut(best.max_length)
    text = (
        f"rows have {lengths['mean']:,.0f} tokens on average, 95 % at most {lengths['p95']:,}, "
        f"the longest {lengths['max']:,}; "
        f"max_length {best.max_length:,} cuts {cut:.1%} of them (auto: {chosen['auto'].max_length:,})"
    )
    return Advice(
        "length", text, {**lengths, "max_length": best.max_length, "cut": cut, "auto": chosen["auto"].max_length}
    )


SMALL = 4 * 2**30  # bytes of weights that are read for one piece of advice


NEAR, FAR = 1.5, 3.0  # nats a token


def domain(request: Request) -> Advice | None:
    """How far the data is from what the base knows: its loss on it, where weights are at hand and not large."""
    folder = request.folder
    if folder is None:
        return Advice(
            "domain",
            "direct tuning is for domains far from general use; once the weights are here, `fitune eval MODEL --data F "
            "--loss-only` measures how far: the base's loss on the data",
            {},
        )
    try:
        weights.check(folder)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        if not size or size > SMALL:
            return None
        config = request.config
        found = evaluation.evaluate(
            str(folder), config.sources(), take=64, answer=False, template=config.template, device=config.device
        )
    except FituneError:
        return None
    loss = found.scores.loss
    if loss < NEAR:
        text = "low: the data is near to what the base knows, and adapters with few parameters do"
    elif loss < FAR:
        text = "the data is some way from what the base knows: more rank, or more layers, may pay"
    else:
        text = "high: the data is far from what the base knows, which is what direct tuning with many tokens is for"
    text = f"the base's loss on {found.rows} rows of the data is {loss:.2f} nats a token, {text}"
    return Advice("domain", text, {"loss": loss, "rows": found.rows})
