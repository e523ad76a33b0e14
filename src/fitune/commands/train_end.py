"""After the last step: the adapter, the answers, the result and the report.

In: a run whose steps are made. Out: its Result; the run folder is complete and sealed.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

from fitune.checks import guards, routercheck, savedchecks
from fitune.commands.active_run import ActiveRun
from fitune.core.clock import END
from fitune.core.parse import parse
from fitune.core.records import Conversation, Rewards
from fitune.core.results import Answered, Result
from fitune.core.units import MIB
from fitune.data.store import documents_of
from fitune.engine import integrity
from fitune.engine.generation import expected, read
from fitune.memory import device as devices
from fitune.models import adapters, handover
from fitune.models.interfaces import causal_lm
from fitune.models.load import Tuned
from fitune.views import model_card, report


def finish(active: ActiveRun, held_out_loss: float | None) -> Result:
    """Save the adapter, answer the prompts again, write result.json and the report, and seal the run.

    Args:
        active: the run.
        held_out_loss: of the weights as they are now, where it was measured.

    Raises:
        TrainingError: what was saved is not what was trained.
    """
    run, job = active.folder, active.job
    probe = guards.probe(documents_of(job.loader.samples))
    with nullcontext() if active.shards is None else active.shards.saving() as late:
        run.save_adapter(partial(adapters.save, job.tuned.model, late=late or None))
        active.checks.add(savedchecks.saved_complete(job.tuned.model, run.adapter, probe, job.layout, late))
    for found in routercheck.router_load(job.tuned.model, documents_of(job.loader.samples), job.layout):
        active.checks.add(found)
    _write_answers(active)
    handed = handover.of_run(run.adapter, causal_lm(job.tuned.model), job.tuned.tokenizer, job.tuned.template)
    active.clock.ends(END)
    result = _result(active, held_out_loss)
    run.write("result", result.as_dict())
    model_card.write(run.adapter, run.path.name, run, job.config, handed)
    for line in handed.warnings():
        active.watch.message(line)
    report.write(run)
    integrity.end(run)
    return result


def _write_answers(active: ActiveRun) -> None:
    """answers.json: the sample prompts with the answers before and after."""
    rows, before, after = active.sample_rows(), active.folder.read("before")["answers"], active.sample_answers()
    answered = [_answered(active.job.tuned, *one) for one in zip(rows, before, after, strict=True)]
    active.folder.write("answers", [one.as_dict() for one in answered])


def _answered(tuned: Tuned, row: Conversation, before: str, after: str) -> Answered:
    """The expected answer and both others without their thoughts; an answer that is nothing but a thought is kept."""
    first, then = (read(tuned, row.question(), text).content or text for text in (before, after))
    return Answered(row.prompt()[-1].content, expected(tuned, row).content, first, then)


def _result(active: ActiveRun, held_out_loss: float | None) -> Result:
    run, job = active.folder, active.job
    records, before = run.read_steps(), run.read("before")
    seconds = sum(record.seconds for record in records)
    rewards = before.get("held_out_rewards")
    finite = [record for record in records if record.applied] or records
    return Result(
        run=str(run.path),
        steps=len(records),
        first_loss=finite[0].loss,
        last_loss=finite[-1].loss,
        base_held_out_loss=before["base_held_out_loss"],
        held_out_loss_before=before["held_out_loss"],
        held_out_loss_after=held_out_loss,
        trainable_parameters=job.trainable,
        total_parameters=job.total,
        real_tokens_per_second=sum(record.tokens for record in records) / max(seconds, 1e-9),
        peak_memory_mib=devices.peak_taken_mib(job.tuned.device),
        expected_memory_mib=job.plan.needed / MIB,
        seconds=seconds,
        held_out_rewards_before=parse(Rewards, rewards, "before.json") if rewards else None,
        held_out_rewards_after=next(
            (r.held_out_rewards for r in reversed(records) if r.held_out_loss == held_out_loss), None
        ),
        history=tuple(records),
        phases=active.clock.phases,
    )
