"""HTML pages that need nothing from elsewhere.

In: a page's name and its values. Out: the page. Every text is escaped; a missing value is an error, not a gap.
"""

from __future__ import annotations

import re
from functools import cache

import jinja2
from markupsafe import Markup, escape

from fitune.views import looks

ADDRESS = re.compile(r"(?P<paper>arXiv:(?P<id>\d{4}\.\d{4,5}))|(?P<url>https?://[^\s<>\"'()]*[^\s<>\"'().,;:])")


def linked(text: object) -> Markup:
    """The text, escaped, with its addresses and arXiv numbers as links."""
    parts, end = [], 0
    whole = str(text)
    for found in ADDRESS.finditer(whole):
        target = f"https://arxiv.org/abs/{found['id']}" if found["paper"] else found["url"]
        parts += [escape(whole[end : found.start()]), Markup('<a href="{}">{}</a>').format(target, found[0])]
        end = found.end()
    return Markup("").join([*parts, escape(whole[end:])])


def render(page: str, **values: object) -> str:
    """The page `pages/<page>.html.jinja` with these values; all extend base.html.jinja."""
    return _environment().get_template(f"{page}.html.jinja").render(**values)


@cache
def _environment() -> jinja2.Environment:
    """Made once: compiling a page takes longer than filling it in."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("fitune.views", "pages"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    made.filters["linked"] = linked
    made.globals["colours"] = Markup(looks.of_system())  # noqa: S704  # ours
    return made
