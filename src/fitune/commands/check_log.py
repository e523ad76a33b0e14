"""The checks that are made while a run goes on.

In: findings. Out: checks.json of the run folder, which the report shows; what is not fine is reported at once, and what
refuses the run is raised.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from fitune.checks.findings import raise_refused
from fitune.core.errors import RunFolderError
from fitune.core.events import Watcher
from fitune.core.records import Finding
from fitune.engine.checkpoint import RunFolder


@dataclass(frozen=True)
class CheckLog:
    """The checks of a run that goes on.

    Args:
        run: its folder.
        watch: findings other than "ok" are reported to it.
    """

    run: RunFolder
    watch: Watcher

    def add(self, finding: Finding, *, quiet: bool = False) -> None:
        """Keep a finding for the report.

        Args:
            finding: the finding.
            quiet: do not report it, whatever its level.

        Raises:
            TrainingError: it refuses the run.
            RunFolderError: checks.json is not what fitune writes.
        """
        self.run.write("checks", [*self._so_far(), asdict(finding)])
        if finding.level != "ok" and not quiet:
            self.watch.findings([finding])
        raise_refused([finding])

    def _so_far(self) -> list[dict[str, object]]:
        """The findings so far. Their file grows while the run goes on, so it is sealed only at the end."""
        path = self.run.path / "checks.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
            if isinstance(found, list) and all({"rule", "level", "text"} <= set(one) for one in found):
                return found
            received = "something else"
        except (OSError, ValueError, TypeError) as error:
            received = " ".join(str(error).split())[:200]
        raise RunFolderError(
            f"{path}: broken", received=received, expected="a list of checks", fix="remove it: only the report reads it"
        )
