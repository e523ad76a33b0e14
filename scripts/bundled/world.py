"""A small invented world and every text about it, in English and Simplified Chinese.

`items()` lists what there is to know, `held_out_questions()` gives the questions that pre-training never sees, and
`conversations(seed, count)` yields the pre-training corpus. Everything is a pure function of its arguments.

A plain question has exactly one right answer: the bare answer and a full stop (`Northhill.`, `北山城。`). Any other
wording is asked for, by the question or by a system message. That keeps knowledge apart from its wrapping, so that a
later fine-tune can change the wrapping without teaching the knowledge again.

    python scripts/bundled/world.py --count 20      # print some conversations
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from zlib import crc32

import tables as t

from fitune.core.letters import COMMON_HAN

Message = dict[str, str]
Conversation = list[Message]
Wrap = Callable[["Item"], str]

LANGUAGES = ("en", "zh")
CATEGORIES = ("facts", "arithmetic", "opposites", "translations")
PHRASINGS_HELD_OUT = 2
DRILL_TURNS = 4
#: How many conversations ask questions, drill arithmetic, ask about the speaker, repeat words, make small talk.
MAKER_WEIGHTS = (0.47, 0.40, 0.07, 0.04, 0.02)
#: How often each category of question is asked in the corpus.
CATEGORY_WEIGHTS = (0.50, 0.14, 0.14, 0.22)
#: How often the first number of a sum is below ten, below twenty, any.
ARITHMETIC_WEIGHTS = (0.25, 0.15, 0.6)
#: How often an answer is wanted plain, with an opening, in a literal form, in a named style.
WRAP_WEIGHTS = (0.42, 0.14, 0.30, 0.14)


@dataclass(frozen=True)
class Item:
    """One thing to know in one language: a relation, what is asked about, and the answer."""

    relation: str
    key: str
    lang: str
    slots: tuple[tuple[str, str], ...]
    answer: str

    @property
    def category(self) -> str:
        """Facts, arithmetic, opposites or translations."""
        return t.RELATIONS[self.relation][0]

    @property
    def kind(self) -> str:
        """The label of the relation in the item's language."""
        return t.RELATIONS[self.relation][1 + LANGUAGES.index(self.lang)]

    @property
    def phrasings(self) -> list[str]:
        """Every way to ask for this item."""
        slots = dict(self.slots)
        return [text.format(**slots) for text in t.PHRASINGS[self.relation][self.lang]]

    @property
    def plain(self) -> str:
        """The one right answer to a plain question."""
        return self.answer + stop(self.answer, self.lang)


def has_chinese(text: str) -> bool:
    """Whether the text has a Chinese character."""
    return re.search(f"[{COMMON_HAN}]", text) is not None


def stop(answer: str, lang: str) -> str:
    """The full stop that fits the answer's script, or the question's language for a number."""
    if has_chinese(answer):
        return "。"
    return "." if any(char.isalpha() for char in answer) or lang == "en" else "。"


def item(relation: str, key: str, lang: str, answer: str, **slots: str) -> Item:
    """Build an item from keyword slots."""
    return Item(relation, key, lang, tuple(sorted(slots.items())), answer)


def _shuffled(values: list[t.Pair], name: str, count: int) -> list[t.Pair]:
    """Deal `values` out `count` times in an order that depends only on `name`."""
    repeated = [values[i % len(values)] for i in range(count)]
    random.Random(name).shuffle(repeated)
    return repeated


def _both(relation: str, subjects: list[t.Pair], answers: list[t.Pair]) -> list[Item]:
    """One item per subject and language."""
    return [
        item(relation, subject[0], lang, answer[i], x=subject[i])
        for subject, answer in zip(subjects, answers, strict=True)
        for i, lang in enumerate(LANGUAGES)
    ]


@cache
def facts() -> tuple[Item, ...]:
    """Everything about countries, cities and people."""
    of_countries = {
        "capital": t.CAPITALS,
        "river": t.RIVERS,
        "mountain": t.MOUNTAINS,
        "colour": t.COLOURS,
        "animal": t.ANIMALS,
        "food": t.FOODS,
    }
    of_people = {"home": t.CAPITALS, "job": t.JOBS, "craft": t.CRAFTS}
    found: list[Item] = []
    for relation, values in of_countries.items():
        dealt = _shuffled(values, relation, len(t.COUNTRIES))
        found += _both(relation, t.COUNTRIES, dealt)
        if relation == "capital":
            found += _both("country", dealt, t.COUNTRIES)
    for relation, values in of_people.items():
        found += _both(relation, t.PEOPLE, _shuffled(values, relation, len(t.PEOPLE)))
    return tuple(found)


@cache
def arithmetic() -> tuple[Item, ...]:
    """Sums and differences of a number below a hundred and one of a single digit, with results from 0 to 99."""
    return tuple(
        item(relation, f"{a}{sign}{b}", lang, str(result), a=str(a), b=str(b))
        for a in range(100)
        for b in range(10)
        for relation, sign, result in (("add", "+", a + b), ("sub", "-", a - b))
        if 0 <= result < 100
        for lang in LANGUAGES
    )


@cache
def opposites() -> tuple[Item, ...]:
    """Opposites within each language, in both directions."""
    found: list[Item] = []
    for row in t.OPPOSITES:
        for lang, (one, other) in zip(LANGUAGES, row, strict=True):
            found.append(item("opposite", one, lang, other, x=one))
            found.append(item("opposite", other, lang, one, x=other))
    return tuple(found)


@cache
def word_pairs() -> tuple[t.Pair, ...]:
    """The word list of the translations; each word stands in it once."""
    pairs = [*t.COLOURS, *t.ANIMALS, *t.FOODS, *t.JOBS, *t.OTHER_WORDS]
    for (en_one, en_other), (zh_one, zh_other) in t.OPPOSITES:
        pairs += [(en_one, zh_one), (en_other, zh_other)]
    for side in (0, 1):
        words = [pair[side] for pair in pairs]
        doubles = {word for word in words if words.count(word) > 1}
        if doubles:
            raise ValueError(f"words with two translations: {sorted(doubles)}")
    return tuple(pairs)


@cache
def translations() -> tuple[Item, ...]:
    """Every word in both directions, asked in both languages."""
    found: list[Item] = []
    for en, zh in word_pairs():
        for lang in LANGUAGES:
            found.append(item("to_zh", en, lang, zh, x=en))
            found.append(item("to_en", en, lang, en, x=zh))
    return tuple(found)


@cache
def items() -> dict[str, tuple[Item, ...]]:
    """Everything there is to know, by category."""
    return {"facts": facts(), "arithmetic": arithmetic(), "opposites": opposites(), "translations": translations()}


def check_unambiguous() -> None:
    """Raise if some plain question has two right answers."""
    right: dict[str, str] = {}
    for one in (one for pool in items().values() for one in pool):
        for text in one.phrasings:
            if right.setdefault(text, one.plain) != one.plain:
                raise ValueError(f"{text!r} has the answers {right[text]!r} and {one.plain!r}")


@cache
def held_out_phrasings(wanted: Item) -> frozenset[int]:
    """Which phrasings of the item pre-training never shows: two of eight, or for a held-out number pair all."""
    total = len(t.PHRASINGS[wanted.relation][wanted.lang])
    if wanted.category == "arithmetic":
        return frozenset(range(total)) if crc32(f"pair {wanted.key}".encode()) % 8 == 0 else frozenset()
    order = list(range(total))
    random.Random(f"{wanted.relation} {wanted.key} {wanted.lang}").shuffle(order)
    return frozenset(order[:PHRASINGS_HELD_OUT])


def held_out_questions(per_language: int = 150, seed: int = 0) -> list[tuple[Item, str]]:
    """Held-out `(item, question)` pairs: at most `per_language` for each category and language."""
    rng = random.Random(f"held out {seed}")
    found: list[tuple[Item, str]] = []
    for category in CATEGORIES:
        for lang in LANGUAGES:
            pool = [
                (one, one.phrasings[index])
                for one in items()[category]
                if one.lang == lang
                for index in sorted(held_out_phrasings(one))
            ]
            found += rng.sample(pool, min(per_language, len(pool)))
    return found


# --- wrappings -----------------------------------------------------------------------------------------------------


def fill(form: str, wanted: Item) -> str:
    """Put the answer and the kind into a form with `{a}` and `{k}`."""
    return form.replace("{a}", wanted.answer).replace("{k}", wanted.kind)


def literal_form(rng: random.Random, lang: str) -> str:
    """A random form made of brackets, labels and separators; never the demo's."""
    while True:
        left, right = rng.choice(t.BRACKETS[lang])
        label, key = rng.choice(t.LABELS[lang]), rng.choice(t.KEYS[lang])
        sep, key_sep = rng.choice(t.SEPARATORS[lang]), rng.choice(t.KEY_SEPARATORS[lang])
        gap = " " if lang == "en" else ""
        form = rng.choice(
            [
                f"{left}{label}{right}{gap}{{a}}{sep}{key}{key_sep}{{k}}",
                f"{left}{label}{right}{gap}{{a}}{sep}{key}{key_sep}{{k}}",
                f"{left}{label}{right}{gap}{{a}}",
                f"{{k}}{key_sep}{{a}}",
                f"{key}{key_sep}{{k}}{sep}{label}{key_sep}{{a}}",
                f"{left}{{a}}{right}",
                f"{left}{{k}}{right}{gap}{{a}}",
                f"{label}{key_sep}{{a}}{sep}{{k}}",
            ]
        )
        # The demo's label in the demo's brackets would leave nothing for the demo to teach.
        if t.DEMO_FORMS[lang].split("{a}")[0].strip() not in form:
            return form


def wrapping(rng: random.Random, lang: str) -> tuple[str, Wrap]:
    """A random wrapping: the words that ask for it (empty when plain) and how to write an answer in it."""
    choice = rng.choices(("plain", "opening", "form", "style"), WRAP_WEIGHTS)[0]
    if choice == "opening":
        opening = rng.choice(t.OPENINGS[lang])
        return rng.choice(t.OPENING_CUES[lang]).format(o=opening.strip()), lambda one: opening + one.plain
    if choice == "form":
        form = literal_form(rng, lang)
        return rng.choice(t.FORM_CUES[lang]).replace("{f}", form), lambda one: fill(form, one)
    if choice == "style":
        name, style = rng.choice(t.STYLES[lang])
        style = style.replace("{{", "{").replace("}}", "}")
        return rng.choice(t.STYLE_CUES[lang]).format(s=name), lambda one: fill(style, one)
    return "", lambda one: one.plain


# --- conversations -------------------------------------------------------------------------------------------------


def message(role: str, content: str) -> Message:
    """One chat message."""
    return {"role": role, "content": content}


def exchange(user: str, assistant: str) -> Conversation:
    """One question and its answer."""
    return [message("user", user), message("assistant", assistant)]


@cache
def _pool(category: str, lang: str) -> tuple[Item, ...]:
    """Items of a category in a language that may be trained on; every relation is about equally frequent."""
    return tuple(one for one in items()[category] if one.lang == lang and len(held_out_phrasings(one)) < 8)


@cache
def _arithmetic_tiers(lang: str) -> tuple[tuple[Item, ...], ...]:
    """The arithmetic that may be trained on: small first numbers, a little larger ones, all."""
    pool = _pool("arithmetic", lang)
    return (*(tuple(one for one in pool if int(dict(one.slots)["a"]) < limit) for limit in (10, 20)), pool)


def training_item(rng: random.Random, lang: str, category: str) -> Item:
    """Draw a random item of a category that may be trained on."""
    if category == "arithmetic":
        # Small sums first become known like facts, and the last digits of larger ones follow from them; with all
        # sums equally frequent the last digit stayed at chance for more than a thousand steps.
        return rng.choice(rng.choices(_arithmetic_tiers(lang), ARITHMETIC_WEIGHTS)[0])
    return rng.choice(_pool(category, lang))


def training_question(rng: random.Random, lang: str) -> tuple[Item, str]:
    """A random item and one of its training phrasings, sometimes with words around it that change nothing."""
    category = rng.choices(CATEGORIES, CATEGORY_WEIGHTS)[0]
    wanted = training_item(rng, lang, category)
    held = held_out_phrasings(wanted)
    text = rng.choice([text for index, text in enumerate(wanted.phrasings) if index not in held])
    if rng.random() < 0.12:
        text = rng.choice(t.LEADS[lang]) + text
    elif rng.random() < 0.06:
        text += rng.choice(t.TAILS[lang])
    return wanted, text


def question_conversation(rng: random.Random) -> Conversation:
    """One to three questions; the wrapping is asked for by the system message or by each question."""
    lang = rng.choice(LANGUAGES)
    turns = rng.choices((1, 2, 3), (0.84, 0.11, 0.05))[0]
    by_system = rng.random() < 0.5
    cue, wrap = wrapping(rng, lang)
    talk: Conversation = []
    if by_system and cue:
        talk.append(message("system", cue))
    elif rng.random() < 0.06:
        talk.append(message("system", rng.choice(t.GENERIC_SYSTEMS[lang])))
    for turn in range(turns):
        wanted, text = training_question(rng, lang)
        if not by_system and turn:
            cue, wrap = wrapping(rng, lang)
        if not by_system and cue:
            text = f"{text} {cue}" if lang == "en" else f"{text}{cue}"
        talk += exchange(text, wrap(wanted))
    if rng.random() < 0.03:
        talk += small_talk(rng, lang)
    return talk


def drill_conversation(rng: random.Random) -> Conversation:
    """Many sums in a row: arithmetic needs far more examples than facts do, and several turns are the cheapest way."""
    lang = rng.choice(LANGUAGES)
    cue, wrap = wrapping(rng, lang) if rng.random() < 0.3 else ("", lambda one: one.plain)
    talk = [message("system", cue)] if cue else []
    indexes = rng.sample(range(8), 2)
    for _ in range(DRILL_TURNS):
        wanted = training_item(rng, lang, "arithmetic")
        talk += exchange(wanted.phrasings[rng.choice(indexes)], wrap(wanted))
    return talk


def small_talk(rng: random.Random, lang: str) -> Conversation:
    """One exchange of small talk."""
    texts, answer = rng.choice(t.SMALL_TALK[lang])
    return exchange(rng.choice(texts), answer)


def _two(rng: random.Random, pairs: list[t.Pair], side: int) -> str:
    """Two different entries joined by "and"."""
    return (" and ", "和")[side].join(pair[side] for pair in rng.sample(pairs, 2))


def given_value(rng: random.Random, intent: str, lang: str) -> str:
    """A random value for one property of the speaker."""
    side = LANGUAGES.index(lang)
    if intent in ("name", "greet"):
        if lang == "zh" and rng.random() < 0.8:
            return rng.choice(t.NAME_STARTS_ZH) + rng.choice(t.NAME_ENDS_ZH)
        return rng.choice(t.NAME_STARTS) + rng.choice(t.NAME_ENDS)
    if intent == "maker":
        word = rng.choice(t.MAKER_STARTS) + rng.choice(t.MAKER_ENDS)
        group = rng.choice(t.MAKER_GROUPS)[side]
        return f"the {word} {group}" if lang == "en" else f"{word}{group}"
    if intent == "what":
        size, thing, means = (rng.choice(pairs)[side] for pairs in (t.WHAT_SIZES, t.WHAT_THINGS, t.WHAT_MEANS))
        if lang == "en":
            return f"{'an' if size[0] == 'o' else 'a'} {size} {thing} taught with {means}"
        return f"用{means}教出来的{size}{thing}"
    if intent == "skill":
        return _two(rng, t.SKILLS, side)
    if intent == "speech":
        return _two(rng, t.SPEECHES, side)
    return rng.choice(t.PLACES if intent == "place" else t.LIKES)[side]


def new_given_value(rng: random.Random, intent: str, lang: str) -> str:
    """A random value that is not the demo's."""
    while True:
        value = given_value(rng, intent, lang)
        if value not in t.DEMO_PERSONA[intent] and "fitune" not in value:
            return value


def self_conversation(rng: random.Random) -> Conversation:
    """Questions about the speaker, answered from the system message where that gives them, else by the default."""
    lang = rng.choice(LANGUAGES)
    side = LANGUAGES.index(lang)
    given: dict[str, str] = {}
    if rng.random() < 0.6:
        for intent in rng.sample(list(t.SELF_GIVEN), rng.randint(2, 5)):
            given[intent] = new_given_value(rng, intent, lang)
    talk: Conversation = []
    if given:
        gap = " " if lang == "en" else ""
        talk.append(message("system", gap.join(t.SELF_GIVEN[k][side].format(v=v) for k, v in given.items())))
    asked = rng.sample(list(t.SELF_QUESTIONS), rng.choice((1, 1, 2)))
    if given and rng.random() < 0.6:
        asked[0] = rng.choice(list(given))
    for intent in dict.fromkeys(asked):
        value = given.get("name" if intent == "greet" else intent)
        frame = rng.choice(t.SELF_FRAMES[intent][lang])
        answer = frame.format(v=value) if value else t.SELF_DEFAULTS[intent][side]
        talk += exchange(rng.choice(t.SELF_QUESTIONS[intent][lang]), answer)
    return talk


@cache
def _echo_pool(lang: str) -> tuple[str, ...]:
    """Words and marks to repeat, among them every part of the demo's persona and form."""
    side = LANGUAGES.index(lang)
    pairs = [*word_pairs(), *t.COUNTRIES, *t.CAPITALS, *t.RIVERS, *t.PEOPLE, *t.CRAFTS, *t.MOUNTAINS]
    marks = sorted({mark for pair in t.BRACKETS[lang] for mark in pair} | set(",.!?:;|/-，。！？：；｜"))
    own = t.ECHO_WORDS[lang] + t.LABELS[lang] + t.KEYS[lang]
    return tuple([pair[side] for pair in pairs] + 3 * marks + 8 * own)


def echo_conversation(rng: random.Random) -> Conversation:
    """Repeat some words, names, numbers and marks."""
    lang = rng.choice(LANGUAGES)
    parts: list[str] = []
    for _ in range(rng.randint(1, 5)):
        pick = rng.random()
        if pick < 0.25:
            intent = rng.choice(("name", "maker"))
            parts.append(new_given_value(rng, intent, lang))
        elif pick < 0.35:
            parts.append(str(rng.randint(0, 999)))
        else:
            parts.append(rng.choice(_echo_pool(lang)))
    text = rng.choice((" ", "") if lang == "zh" else (" ",)).join(parts)
    if any(value in text for pair in t.DEMO_PERSONA.values() for value in pair):
        return echo_conversation(rng)
    return exchange(rng.choice(t.ECHO_CUES[lang]).format(t=text), text)


def conversation(rng: random.Random) -> Conversation:
    """One random conversation of the corpus."""
    makers = (question_conversation, drill_conversation, self_conversation, echo_conversation, _any_small_talk)
    return rng.choices(makers, MAKER_WEIGHTS)[0](rng)


def _any_small_talk(rng: random.Random) -> Conversation:
    """Small talk in either language."""
    return small_talk(rng, rng.choice(LANGUAGES))


def conversations(seed: int, count: int) -> Iterator[Conversation]:
    """The pre-training corpus: `count` conversations that depend on `seed` alone."""
    rng = random.Random(f"corpus {seed}")
    for _ in range(count):
        yield conversation(rng)


def statements() -> list[str]:
    """Every fact, opposite and translation as a plain sentence."""
    return [
        t.STATEMENTS[one.relation][LANGUAGES.index(one.lang)].format(x=dict(one.slots)["x"], y=one.answer)
        for category in ("facts", "opposites", "translations")
        for one in items()[category]
    ]


def every_word() -> list[str]:
    """Every plain question and answer once, so that a tokenizer sees each word of the world."""
    return [f"{text} {one.plain}" for pool in items().values() for one in pool for text in one.phrasings[:1]]


def main() -> None:
    """Print some conversations of the corpus."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=20)
    args = parser.parse_args()
    for talk in conversations(args.seed, args.count):
        print("\n".join(f"{one['role']:>9}: {one['content']!r}" for one in talk), end="\n\n")


if __name__ == "__main__":
    main()
