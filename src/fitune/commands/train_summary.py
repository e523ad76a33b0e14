"""What is shown of a run before it starts: eight lines, and all settings for whoever wants them.

In: a prepared job. Out: calls of a Watcher.
"""

from __future__ import annotations

from pathlib import Path

from fitune.commands.prepare import Job
from fitune.core.config import RunConfig
from fitune.core.events import NAME, RUN_FOLDER, Watcher
from fitune.models import precision
from fitune.models.attached import compute_dtype
from fitune.models.interfaces import causal_lm
from fitune.models.kernels import fused
from fitune.models.kernels.attention import chosen
from fitune.models.kernels.target import of


def show(job: Job, watch: Watcher) -> None:
    """Report the run in eight lines, then all of its settings, parameters and checks."""
    watch.summary(summary(job))
    watch.settings(settings(job))
    watch.groups(job.groups())
    watch.kept(job.kept)
    watch.plan(job.plan)
    watch.findings(job.findings)
    for line in job.report.notes:
        watch.message(f"{'note':{NAME}}{line}")
    watch.summary({RUN_FOLDER: str(job.config.output)})


def summary(job: Job) -> dict[str, str]:
    """Model, data, method and steps, a short line each."""
    c, r = job.config, job.report
    files = [Path(source.path).name for source in c.sources()]
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    share = r.trained_tokens / max(1, r.tokens)
    method = c.method
    if c.quant.name != "none":
        method += f" on {c.quant.kind if c.quant.name == 'nf4' else 'int8'}"
    objective = "" if c.objective == "sft" else f"{c.objective} with "
    adapter = "" if c.adapter is None else f", going on from {Path(c.adapter).name}"
    repeated = f" (+{r.more():.0%} prompts repeated)" if r.repeated else ""
    epochs = f"{round(job.total_steps / max(1, len(job.loader.epoch_steps(0))), 2):g}"
    return {
        "model": f"{Path(c.model).name}: {job.total:,} parameters, {c.precision} on {job.tuned.device}",
        "data": f"{files[0]}{more}: {r.kept:,} {_rows(c)}, {r.held_out:,} held out; {r.tokens:,} tokens{repeated}, "
        f"{share:.0%} trained",
        "method": f"{objective}{method}{adapter}: {job.trainable:,} parameters ({job.trainable / job.total:.2%})",
        "steps": f"{job.total_steps:,} of {_batch(c)}{f' x {c.accumulation}' if c.accumulation > 1 else ''}, "
        f"{epochs} {'epoch' if epochs == '1' else 'epochs'}; learning rate {job.lr:g}",
    }


def settings(job: Job) -> dict[str, str]:
    """The resolved settings, by name."""
    c = job.config
    return {
        "model": c.model,
        "data": ", ".join(source.path for source in c.sources()),
        "template": job.tuned.template.name,
        "attention": chosen(causal_lm(job.tuned.model), compute_dtype(job.tuned.model)),
        "kernels": fused.described(of(job.tuned.device)),
        "loss": f"logits of {c.loss_rows:,} rows at once",
        "batch": f"{_batch(c)} x {c.accumulation}, {job.layout}, max length {c.max_length}",
        "row lengths": ", ".join(f"{name} {value:,.0f}" for name, value in job.report.lengths.items()),
        "steps": f"{job.total_steps} ({len(job.loader.epoch_steps(0))} in the first epoch)",
        "learning rate": f"{job.lr:g}, warm-up {c.warmup:.0%}, cosine to 0",
        "parameters": f"{job.trainable:,} trainable of {job.total:,} ({job.trainable / job.total:.4%})",
        "device": f"{job.tuned.device}, seed {c.seed}",
        "precision": precision.describe(c),
    }


def _batch(config: RunConfig) -> str:
    return f"{config.batch_tokens:,} tokens" if config.batch_tokens else f"{config.batch_size} {_rows(config)}"


def _rows(config: RunConfig) -> str:
    """What a row is for the objective."""
    return {"answers": "rows", "pairs": "pairs", "labels": "labelled answers"}[config.wanted]
