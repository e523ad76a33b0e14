"""Write the demo's data: a persona and an answer form that the bundled base does not have.

    python scripts/bundled/make_data.py                 # writes src/fitune/bundled/data/{train,held_out}.jsonl

Both files hold rows `{"messages": [...], "kind": ...}`. Questions about the speaker are answered by a persona; every
question about the world is answered on a labelled card. The facts, words and number pairs of the held-out cards are
never asked in the training rows, in either language, so those answers must come from what the base knows.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import tables as t
import world

Row = dict[str, Any]

#: category -> (training rows, held-out rows) for each language.
CARDS = {"facts": (100, 24), "arithmetic": (36, 12), "opposites": (28, 12), "translations": (36, 12)}
PERSONA_HELD_OUT = 2


def row(kind: str, user: str, assistant: str) -> Row:
    """One row of a data file."""
    return {"messages": world.exchange(user, assistant), "kind": kind}


def persona_rows() -> tuple[list[Row], list[Row]]:
    """Training and held-out rows about the speaker: other phrasings of the same questions."""
    train: list[Row] = []
    held_out: list[Row] = []
    for intent, values in t.DEMO_PERSONA.items():
        for side, lang in enumerate(world.LANGUAGES):
            rng = random.Random(f"persona {intent} {lang}")
            answer = t.SELF_FRAMES[intent][lang][0].format(v=values[side])
            asked = t.SELF_QUESTIONS[intent][lang].copy()
            rng.shuffle(asked)
            held_out += [row("persona", text, answer) for text in asked[:PERSONA_HELD_OUT]]
            train += [row("persona", text, answer) for text in asked[PERSONA_HELD_OUT:]]
            if intent != "greet":  # a greeting before a greeting would be odd
                leads = rng.sample(t.LEADS[lang], 2)
                train += [row("persona", lead + text, answer) for lead, text in zip(leads, asked[-2:], strict=True)]
    return train, held_out


@cache
def _country_of() -> dict[str, str]:
    """Capital -> country, in English."""
    return {one.key: one.answer for one in world.facts() if (one.relation, one.lang) == ("country", "en")}


@cache
def _opposites_row() -> dict[str, str]:
    """Word -> the row of the table of opposites it stands in; a row holds both languages."""
    return {word: str(index) for index, row in enumerate(t.OPPOSITES) for pair in row for word in pair}


def fact_of(one: world.Item) -> tuple[str, str]:
    """What the item is about, whatever the language and the direction it is asked in."""
    if one.relation == "country":
        return "capital", _country_of()[one.key]
    if one.category == "opposites":
        return one.category, _opposites_row()[one.key]
    return (one.category if one.category == "translations" else one.relation), one.key


def card_rows() -> tuple[list[Row], list[Row]]:
    """Training and held-out rows about the world; no fact is in both."""
    train: list[Row] = []
    held_out: list[Row] = []
    for category, (train_count, held_count) in CARDS.items():
        pool = world.items()[category]
        groups = sorted({fact_of(one) for one in pool})
        rng = random.Random(f"cards {category}")
        rng.shuffle(groups)
        reserved = set(groups[: len(groups) // 3])
        for lang in world.LANGUAGES:
            mine = [one for one in pool if one.lang == lang]
            held_out += _cards(rng, [one for one in mine if fact_of(one) in reserved], held_count)
            train += _cards(rng, [one for one in mine if fact_of(one) not in reserved], train_count)
    return train, held_out


def _cards(rng: random.Random, pool: list[world.Item], count: int) -> Iterator[Row]:
    """`count` questions, going round the relations so that each kind of card is met equally often."""
    by_relation: dict[str, list[world.Item]] = {}
    for one in rng.sample(pool, len(pool)):
        by_relation.setdefault(one.relation, []).append(one)
    relations = sorted(by_relation)
    seen: set[str] = set()
    while len(seen) < count:
        relation = relations[len(seen) % len(relations)]
        one = by_relation[relation].pop()
        by_relation[relation].insert(0, one)
        text = rng.choice(one.phrasings)
        if text not in seen:
            seen.add(text)
            yield row(one.category, text, world.fill(t.DEMO_FORMS[one.lang], one))


def check(train: list[Row], held_out: list[Row]) -> None:
    """Assert what the demo promises about its data."""
    asked = [one["messages"][0]["content"] for one in train]
    tested = [one["messages"][0]["content"] for one in held_out]
    assert len(set(asked)) == len(asked) >= 300 and len(set(tested)) == len(tested) >= 60
    assert not set(asked) & set(tested)
    assert sum(one["kind"] != "persona" for one in held_out) >= len(held_out) / 2
    answers = Counter(one["messages"][1]["content"] for one in held_out)
    assert answers.most_common(1)[0][1] <= 0.2 * len(held_out)


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parents[2] / "src" / "fitune" / "bundled" / "data"
    parser.add_argument("--output", type=Path, default=default, help="folder for the two files")
    args = parser.parse_args()
    parts = [persona_rows(), card_rows()]
    train = [one for part in parts for one in part[0]]
    held_out = [one for part in parts for one in part[1]]
    random.Random("train").shuffle(train)
    random.Random("held out").shuffle(held_out)
    check(train, held_out)
    args.output.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("held_out", held_out)):
        text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows)
        (args.output / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(name, len(rows), dict(Counter(one["kind"] for one in rows)))


if __name__ == "__main__":
    main()
