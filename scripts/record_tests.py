"""JUnit files as a small JSON record: `python scripts/record_tests.py build/test-full.xml results/test-full.json`.

Of some test files alone, perhaps run one after the other, `--command` says so in the record:
`FITUNE_TESTS=full pytest -m "" tests/memory/test_trace.py --junitxml build/trace.xml`.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import xml.etree.ElementTree as ET
from collections import Counter
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "tokenizers")


def main(junits: list[str], output: str, command: str) -> None:
    """Count what passed, failed and was skipped (with the reasons), and name commit, versions and date."""
    cases = [case for junit in junits for case in ET.parse(junit).getroot().iter("testcase")]
    counts: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    files: dict[str, Counter[str]] = {}
    for case in cases:
        kinds = {child.tag for child in case}
        kind = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        counts[kind] += 1
        files.setdefault(case.get("classname", ""), Counter())[kind] += 1
        for child in case.iter("skipped"):
            skipped[child.get("message", "")] += 1
    git = ["git", "log", "-1", "--format=%H"]
    record = {
        "commit": subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip(),
        "date": datetime.now(UTC).date().isoformat(),
        "command": command,
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        **{kind: counts[kind] for kind in ("passed", "failed", "skipped")},
        "skip_reasons": dict(skipped),
        "files": {name: dict(counts) for name, counts in sorted(files.items())},
    }
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped -> {output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("junits", nargs="+")
    parser.add_argument("output")
    parser.add_argument("--command", default="make test-full")
    given = parser.parse_args()
    main(given.junits, given.output, given.command)
