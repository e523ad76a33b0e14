"""What becomes of findings: those that refuse the run are raised together.

In: Findings. Out: nothing, or one error.
"""

from __future__ import annotations

from collections.abc import Sequence

from fitune.core.errors import Collector, TrainingError
from fitune.core.records import Finding


def raise_refused(findings: Sequence[Finding]) -> None:
    """Raise what was refused, all at once.

    Raises:
        TrainingError, Problems: one for each finding whose level is `refuse`.
    """
    problems = Collector()
    for finding in findings:
        if finding.level == "refuse":
            problems.problems.append(TrainingError(f"{finding.rule}: {finding.text}", fix=finding.fix))
    problems.raise_any()
