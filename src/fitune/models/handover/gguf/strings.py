"""Texts on which two tokenizers are compared: English, Chinese, code, emoji, spaces, control tokens in a text.

In: how many, the names of control tokens. Out: texts, the same ones each time. All are in Unicode's NFC and without ▁:
what becomes of such text is known by the kind of vocabulary, and said of it (`Vocabulary.exceptions`).
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Sequence


def _cut(border: str, text: str) -> list[str]:
    """Words, or whatever stands between the borders."""
    return text.split(border)


ENGLISH = _cut(
    " ",
    "the quick brown fox doesn't jump over 12 lazy dogs; it's raining, isn't it? They'll say I'd've gone. We're HERE, "
    "iPhone's camelCase CamelCASE naïve café Zürich Straße coöperate 3.14 1,000,000 $19.99 50% e-mail A/B U.S.A.",
)
CHINESE = _cut(
    " ",
    "你好 今天天气怎么样 北京是中国的首都 一加二等于三 请写一首诗 机器学习 模型 微调 “引号” 《书名》 ，。！？；： "
    "（括号） 龘靐齉 繁體中文 １２３ 日本語テスト ひらがな カタカナ 한국어 문장",
)
CODE = _cut(
    "|",
    "def f(x):|    return x * 2|\tif (a != b) {|}|for (int i = 0; i < n; ++i)|#include <stdio.h>|x += 0x1F;|// 注释|"
    '<div class="a">|</div>|SELECT * FROM t WHERE id=1;|{"k": [1, 2.5e-3, null]}|a->b::c()|path/to/file.py|'
    "https://example.org/?q=1&r=2#top|```python|```|print('\\n')|$HOME/.bashrc|lambda x: x**2|!=|===|...|--flag=value",
)
EMOJI = _cut(" ", "🙂 🎉 👍🏽 👩‍💻 🇨🇳 ❤️ 🤷‍♀️ 🧑‍🚀 ☕ ✓ → ∑ ∞ © € ½ ² Ω ≠")
SCRIPTS = _cut(
    "|", "Привет мир|Γειά σου|שלום|مرحبا بالعالم|नमस्ते|สวัสดี|გამარჯობა|Việt Nam|Łódź|ñandú|İstanbul|ﬁ|ǅ|𝔘𝔫𝔦|𠮷野家"
)
SPACES = _cut("|", " |  |   |\t|\n|\n\n|\r\n| \n|\n |\t\t|    |\u3000|\u00a0| \t |\n\n\n")
NUMBERS = _cut(" ", "0 7 42 123 2024 12345 1234567890 3.5 -1 1e-5 ٣٤ Ⅳ")
MARKS = _cut(" ", "' \" '' -- … ?! . , ( ) [x] <a> </s> <|x|> &amp; \\ / _ ~ ^")
JOINS = ("", "", " ", " ", " ", "\n", "  ")


def _has_marks(text: str) -> bool:
    return any(unicodedata.category(character).startswith("M") for character in text)


def strings(count: int, control: Sequence[str], own: Sequence[str] = (), *, marks: bool = True) -> list[str]:
    """Texts to compare tokenizers on.

    Args:
        count: how many.
        control: names of control tokens; one text in twenty has some in it.
        own: texts of the vocabulary's tokens, of which each third text is made.
        marks: may combining marks be in them?

    Example:
        >>> strings(2, ["<|end|>"])[0]
        'the'
    """
    draw = random.Random(20_000)  # noqa: S311  # the same texts each time
    every = (ENGLISH, ENGLISH, CHINESE, CHINESE, CODE, EMOJI, SCRIPTS, SPACES, NUMBERS, MARKS)
    pools = [[text for text in pool if marks or not _has_marks(text)] for pool in every]
    own = [text for text in own if marks or not _has_marks(text)]
    made = dict.fromkeys(unicodedata.normalize("NFC", text) for pool in pools for text in pool)
    while len(made) < count:
        pool = own if own and len(made) % 3 == 0 else draw.choice(pools)
        drawn = [draw.choice(pool if draw.random() < 0.6 else draw.choice(pools)) for _ in range(draw.randint(1, 12))]
        if control and len(made) % 20 == 0:
            drawn.insert(draw.randint(0, len(drawn)), draw.choice(control))
        text = drawn[0]
        for word in drawn[1:]:
            text += draw.choice(JOINS) + word
        made[unicodedata.normalize("NFC", text)] = None
    return list(made)[:count]
