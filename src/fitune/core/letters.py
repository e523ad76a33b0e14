"""Ranges of Unicode of each script, as they stand inside the brackets of a regular expression.

In: nothing. Out: texts such as HAN; `re.compile(f"[{HAN}]")` matches one Chinese character. They stand here once.
"""

from __future__ import annotations

COMMON_HAN = "\u4e00-\u9fff"  # the characters of nearly every Chinese text
HAN = "\u3400-\u9fff\uf900-\ufaff"  # with extension A and the compatibility characters
ALL_HAN = f"{HAN}\U00020000-\U0003ffff"  # with those beyond the basic plane
KANA = "\u3040-\u30ff"
HANGUL = "\uac00-\ud7af"
LATIN = "A-Za-z\u00c0-\u024f"
FULL_WIDTH = f"\u3000-\u30ff{HAN}{HANGUL}\uff00-\uffef"  # what takes about a token of its own, punctuation too
