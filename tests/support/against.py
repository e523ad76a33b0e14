"""The benchmark against other systems, loaded as modules, and its processes run in this one."""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = Path(__file__).parents[2] / "benchmarks"


def module(name: str) -> ModuleType:
    """A module of benchmarks/, or of its folder of drivers."""
    for folder in (FOLDER, FOLDER / "systems"):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    return importlib.import_module(name)


def bench(work: Path) -> Any:
    """A Bench whose drivers run here: no environment is made, and no process."""
    against = module("against")

    class Here(against.Bench):  # type: ignore[misc, name-defined]  # a module loaded by its path has no types
        uncounted = "transformers-sorted"  # its process fails where work is counted

        def run(self, driver: str, environment: str, settings: dict[str, Any], name: str) -> dict[str, Any]:
            if settings.get("count") and name.endswith(self.uncounted):
                raise against.Failed("exit code 1: planted")
            folder = self.work / name
            folder.mkdir(parents=True, exist_ok=True)
            given, result = folder / "settings.json", folder / "result.json"
            whole = {"work": str(folder), **settings, "result": str(result), "began": time.time()}
            given.write_text(json.dumps(whole), encoding="utf-8")
            arguments, sys.argv = sys.argv, [driver, str(given)]
            try:
                module(driver).main()
            finally:
                sys.argv = arguments
            return json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}

    return Here(work, {}, 1)
