"""Each family that llama.cpp has, exported and compared, 200 prompts x 64 tokens: the tables of docs/export.md.

    python scripts/gguf_families.py                     # prints them from results/gguf_families.json
    python scripts/gguf_families.py --write             # compares all families, writes the results and both pages
    python scripts/gguf_families.py --write gpt2 bloom  # these alone, the others as they were

In: tiny models of the tests (tests/support/taught.py), taught until they are sure of their answers. Out: a row of each
family in results/gguf_families.json, and a line of Markdown. Needs llama-cpp-python (the extra `verify`). A difference
ends the script.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.taught import TAUGHT, Row, compared, lines, read, record  # noqa: E402  # the path of the tests comes first

RESULTS = ROOT / "results" / "gguf_families.json"
PAGES = {"": ROOT / "docs" / "export.md", ".zh-CN": ROOT / "docs" / "export.zh-CN.md"}
BEGIN, END = "<!-- scripts/gguf_families.py -->", "<!-- end -->"


def measure(kinds: Sequence[str]) -> None:
    """These families, one after the other; each is written when it is done."""
    found: dict[str, Row] = {row.family: row for row in read(RESULTS)} if RESULTS.is_file() else {}
    for kind in kinds:
        with tempfile.TemporaryDirectory() as place:
            found[kind] = compared(kind, Path(place))
        print(found[kind], flush=True)
        rows = [found[name] for name in TAUGHT if name in found]
        RESULTS.write_text(json.dumps(record(rows), indent=1) + "\n", encoding="utf-8")


def replaced(text: str, table: str) -> str:
    """A page with the table as it is now."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


def main(kinds: Sequence[str], *, write: bool) -> None:
    """Print the tables, or measure and write them."""
    if write:
        measure(kinds or TAUGHT)
    for language, page in PAGES.items():
        table = "\n".join(lines(read(RESULTS), language))
        if write:
            page.write_text(replaced(page.read_text(encoding="utf-8"), table), encoding="utf-8")
        else:
            print(table)


if __name__ == "__main__":
    main([name for name in sys.argv[1:] if name != "--write"], write="--write" in sys.argv)
