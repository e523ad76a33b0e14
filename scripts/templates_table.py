"""Chat templates in situations: is what is trained what is served? The tables of docs/templates.md.

    python scripts/templates_table.py            # prints them
    python scripts/templates_table.py --write    # puts them into both pages

In: the kinds of templates and the situations of the tests (tests/support/served_kinds.py, served_rows.py). Out: a line
of Markdown for each kind. A cell compares the ids that are trained with those that transformers renders; one where they
differ ends the script.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.served_page import cells, lines  # noqa: E402  # the path of the tests comes first

PAGES = {"": ROOT / "docs" / "templates.md", ".zh-CN": ROOT / "docs" / "templates.zh-CN.md"}
BEGIN, END = "<!-- scripts/templates_table.py -->", "<!-- end -->"


def replaced(text: str, table: str) -> str:
    """A page with the tables as they are now."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


def main(*, write: bool) -> str:
    """Print the tables, or write them; what differs, a line each."""
    found = cells()
    for language, page in PAGES.items():
        table = "\n".join(lines(found, language))
        if write:
            page.write_text(replaced(page.read_text(encoding="utf-8"), table), encoding="utf-8")
        else:
            print(table)
    return "\n".join(f"{', '.join(key)}: {cell.why}" for key, cell in found.items() if cell.how == "differs")


if __name__ == "__main__":
    sys.exit(main(write="--write" in sys.argv) or 0)
