"""Write the bundled general checks: plain questions about what the bundled base knows.

    python scripts/bundled/make_general.py        # writes src/fitune/bundled/data/general.jsonl

Rows `{"messages": [...], "kind": ...}`: in each language as many questions of each category, in wordings that
pre-training never showed, each with its one plain answer. `fitune eval RUN --verdict` asks them before and after
tuning.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import world
from make_data import Row, row

EACH = 16  # questions of a category in each language


def rows() -> list[Row]:
    """The questions, by category and language."""
    asked = world.held_out_questions(per_language=EACH, seed=1)
    return [row(one.category, question, one.plain) for one, question in asked]


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parents[2] / "src" / "fitune" / "bundled" / "data"
    parser.add_argument("--output", type=Path, default=default, help="folder for the file")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    made = rows()
    assert len({one["messages"][0]["content"] for one in made}) == len(made)
    text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in made)
    (args.output / "general.jsonl").write_text(text, encoding="utf-8")
    print("general", len(made))


if __name__ == "__main__":
    main()
