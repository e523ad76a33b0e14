"""Write the bundled pairs of answers: a preference for answers that sound sure.

    python scripts/bundled/make_pairs.py        # writes src/fitune/bundled/data/pairs{,_held_out}.jsonl

Both files hold rows `{"prompt": ..., "chosen": ..., "rejected": ..., "kind": ...}`. Both answers of a row are right;
the chosen one begins as somebody who knows it, the rejected one as somebody who does not. The base was taught all of
these openings alike, and gives none unless it is asked for one. Questions of the held-out pairs are about facts that no
training pair asks about, in either language.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import tables as t
import world
from make_data import fact_of

PAIRS, HELD_OUT = 60, 20  # of each language
Row = dict[str, str]


def pairs(pool: list[world.Item], rng: random.Random, count: int) -> list[Row]:
    """As many rows, each about another question."""
    found: dict[str, Row] = {}
    for one in rng.sample(pool, len(pool)):
        text = rng.choice(one.phrasings)
        chosen, rejected = (rng.choice(openings[one.lang]) + one.plain for openings in (t.SURE, t.UNSURE))
        found.setdefault(text, {"prompt": text, "chosen": chosen, "rejected": rejected, "kind": one.category})
    return list(found.values())[:count]


def rows() -> tuple[list[Row], list[Row]]:
    """Training and held-out pairs; no fact is in both."""
    train: list[Row] = []
    held_out: list[Row] = []
    rng = random.Random("pairs")
    every = [one for category in world.CATEGORIES for one in world.items()[category]]
    groups = sorted({fact_of(one) for one in every})
    reserved = set(rng.sample(groups, len(groups) // 3))
    for lang in world.LANGUAGES:
        mine = [one for one in every if one.lang == lang]
        train += pairs([one for one in mine if fact_of(one) not in reserved], rng, PAIRS)
        held_out += pairs([one for one in mine if fact_of(one) in reserved], rng, HELD_OUT)
    rng.shuffle(train)
    return train, held_out


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parents[2] / "src" / "fitune" / "bundled" / "data"
    parser.add_argument("--output", type=Path, default=default, help="folder for the two files")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    train, held_out = rows()
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    for name, some in (("pairs", train), ("pairs_held_out", held_out)):
        text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in some)
        (args.output / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(name, len(some))


if __name__ == "__main__":
    main()
