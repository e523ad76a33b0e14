"""The colours of all that is drawn, and the style of drawings: one place for pages, notebooks and `fitune ui`.

Out: CSS. Each place where a drawing stands has its own way to be dark: a page asks the system, `fitune ui` has a
switch, and a notebook's cell brings a white ground along.
"""

from __future__ import annotations

from importlib.resources import files

from fitune.views.plan import GREYS, LOOKS

LIGHT = {
    "--fg": "#1c2330", "--bg": "#fbfbfa", "--soft": "#5d6572", "--card": "#fff",
    "--edge": "#d5d8dd", "--line1": "#2f6fdb", "--line2": "#d9622b",
    "--good": "#1d7f4c", "--bad": "#b3382c", "--warn": "#8a6005", "--on": "#fff",
    **{look.variable: look.on_white for look in (*LOOKS.values(), *GREYS.values())},
}  # fmt: skip
DARK = {
    "--fg": "#e7e9ee", "--bg": "#14171c", "--soft": "#a3abb8", "--card": "#1c2027",
    "--edge": "#3a404b", "--line1": "#6ea3ff", "--line2": "#ff9560",
    "--good": "#5fd097", "--bad": "#ff8578", "--warn": "#e0b45a", "--on": "#14171c",
    **{look.variable: look.colour for look in (*LOOKS.values(), *GREYS.values())},
}  # fmt: skip


def _rule(selector: str, colours: dict[str, str]) -> str:
    return f"{selector}{{{';'.join(f'{name}:{colour}' for name, colour in colours.items())}}}"


def drawings() -> str:
    """The rules of drawings, below an element of the class `fitune`."""
    return files("fitune.views.pages").joinpath("drawings.css").read_text(encoding="utf-8")


def of_system() -> str:
    """Colours and drawings for a page that is as dark as the system wants."""
    dark = f"@media(prefers-color-scheme:dark){{{_rule(':root', DARK)}}}"
    return f":root{{color-scheme:light dark}}{_rule(':root', LIGHT)}{dark}{drawings()}"


def of_switch() -> str:
    """The same for a page that is dark where its root has `data-theme=dark`."""
    dark = _rule(":root[data-theme=dark]", {"color-scheme": "dark", **DARK})
    return f"{_rule(':root', {'color-scheme': 'light', **LIGHT})}{dark}{drawings()}"


def of_cell() -> str:
    """The same for a notebook's cell, which lies on white."""
    return _rule(".fitune", {**LIGHT, "--bg": "#fff"}) + drawings()
