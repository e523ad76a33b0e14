"""HTML pages that need nothing from elsewhere.

In: a page's name and its values. Out: the page. Every text is escaped; a missing value is an error, not a gap.
"""

from __future__ import annotations

from typing import Any

import jinja2


def render(page: str, **values: Any) -> str:
    """The page `pages/<page>.html.jinja` with these values; all extend base.html.jinja."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fitune", "pages"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template(f"{page}.html.jinja").render(**values)
