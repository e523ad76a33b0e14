"""`fitune plan --verify`: a few steps for real, beside their plan.

In: a config. Out: bytes predicted and measured, by category and by phase. Nothing is written.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch

from fitune.commands.prepare import Job, prepare
from fitune.commands.request import to_train
from fitune.core.config import RunConfig
from fitune.core.events import Silent, Watcher
from fitune.core.plan import Compared
from fitune.memory import plan as plans
from fitune.memory import trace
from fitune.memory.counted import count
from fitune.memory.measure import most_allocated
from fitune.memory.usage import Usage, usage
from fitune.models.kernels.target import of
from fitune.models.parts import trainable


@dataclass(frozen=True)
class Verified:
    """Predicted beside measured, in bytes. rows: by category at the peak, phases: the most of each, and the whole.

    allocated: what torch's own profiler (on a GPU its allocator) counted, beside the trace's predicted peak.
    """

    rows: list[Compared]
    phases: list[Compared]
    predicted: int
    allocated: int

    @property
    def error(self) -> float:
        """As a share of what was allocated."""
        return self.predicted / max(1, self.allocated) - 1

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "rows": [asdict(row) for row in self.rows],
            "phases": [asdict(phase) for phase in self.phases],
            "predicted": self.predicted,
            "allocated": self.allocated,
            "error": self.error,
        }


def verify(config: RunConfig, watch: Watcher | None = None) -> Verified:
    """Run three steps, an evaluation and a checkpoint's copies for real, and compare with their plan.

    Args:
        config: as for `train`; nothing is written.
        watch: receives what is found.

    Raises:
        FituneError: as `train` does.
    """
    job = prepare(to_train(config), watch or Silent())
    work = _three(job)
    target = of(job.tuned.device)
    seen = usage(plans.traced(work, target), without="start")  # the job has its method already
    measured, allocated = _really(job, work)
    phases = {moment.phase: moment.bytes for moment in measured.phases}
    parts = dict.fromkeys([*seen.peak.parts, *measured.peak.parts])
    return Verified(
        rows=[Compared(name, seen.peak.parts.get(name, 0), measured.peak.parts.get(name, 0)) for name in parts],
        phases=[Compared(m.phase, m.bytes, phases.get(m.phase, 0)) for m in seen.phases],
        predicted=seen.peak.bytes,
        allocated=allocated,
    )


def _three(job: Job) -> plans.Work:
    """Three steps: the first, the one with the largest micro-batch, and the first again."""
    first, *rest = job.work.steps
    without_answers = job.work.config.model_copy(update={"sample_prompts": 0})  # they are not compared
    return replace(job.work, config=without_answers, steps=[first, rest[-1] if rest else first, first])


def _really(job: Job, work: plans.Work) -> tuple[Usage, int]:
    """What a trace of real tensors sees, and, the work done once more, the most bytes that torch counts itself."""
    model, cuda = job.tuned.model, job.tuned.device.type == "cuda"
    tracer = trace.Tracer(of(job.tuned.device), real=True)
    tracer.at("load")
    there = count(model, tracer)
    tracer.at("")
    plans.go(model, work, tracer, on_gpu=cuda)
    tracer.close()
    for parameter in trainable(model).values():  # an optimizer in the backward pass would go on
        (getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).clear()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        plans.go(model, work, trace.Blind(), on_gpu=True)
        return usage(tracer), torch.cuda.max_memory_allocated()
    return usage(tracer), most_allocated(lambda: plans.go(model, work, trace.Blind()), there)
