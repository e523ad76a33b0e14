"""The pictures of the page in the documentation, as a browser draws it.

    pytest tests/commands/test_ui_pictures.py -m full --pictures docs

In: the bundled model and data. Out: PNG files in the folder that the option names, without it in a temporary one.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fitune.commands import ui
from fitune.commands.demo import SETTINGS, bundled
from fitune.commands.train import train
from fitune.core.config import build
from support import page as pages

pytestmark = [pages.needs_browser, pytest.mark.full]
MOST = 150_000  # bytes of a picture
NAMES = ("ui-rows.png", "ui-plan.png", "ui-train.png", "ui-phone.png")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    work = tmp_path_factory.mktemp("work")
    shutil.copytree(bundled() / "model", work / "model")
    shutil.copyfile(bundled() / "data" / "train.jsonl", work / "my.jsonl")
    given: dict[str, object] = {**SETTINGS, "model": str(work / "model"), "data": [str(work / "my.jsonl")]}
    train(build({**given, "output": str(work / "runs" / "mine"), "max_steps": 150, "eval_every": 15}))
    with pages.inside(work), ui.running(ui.roots_of()) as found:
        yield found


def drawn(browser: Any, address: str, width: int, **how: Any) -> Any:
    page = browser.new_context(viewport={"width": width, "height": 640}, **how).new_page()
    page.goto(address)
    page.wait_for_selector("html[data-ready]")
    return page


def plan(page: Any) -> None:
    page.fill("#model", "llama-3.1-8b")
    page.dispatch_event("#model", "change")
    page.click("[data-task=plan]")
    page.select_option("#set-gpu", "rtx-4090")
    page.select_option("#set-quant", "nf4")
    page.wait_for_selector("#bar[data-how=trace]")


def test_pictures_of_the_page(address: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    given = request.config.getoption("pictures")
    folder = request.config.invocation_params.dir / given if given else tmp_path
    with pages.browser() as browser:
        page = drawn(browser, address, 1000, locale="en-US")
        page.fill("#model", "model")
        page.dispatch_event("#model", "change")
        page.fill("#data-path", "my.jsonl")
        page.press("#data-path", "Enter")
        page.click("#show-rows")
        page.wait_for_selector(".tokens .t")
        page.screenshot(path=folder / NAMES[0], clip={"x": 0, "y": 0, "width": 1000, "height": 880}, full_page=True)
        plan(page)
        page.screenshot(path=folder / NAMES[1], full_page=True)
        page.evaluate("location.hash = 'train/mine'")
        page.wait_for_selector("#curve-loss polyline")
        page.locator("#live").screenshot(path=folder / NAMES[2])
        phone = drawn(browser, address, 400, locale="zh-CN", color_scheme="dark")
        plan(phone)
        phone.screenshot(path=folder / NAMES[3], full_page=True)
    for name in NAMES:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
        assert (folder / name).stat().st_size < MOST, name


@pytest.mark.parametrize("page", ["ui.md", "ui.zh-CN.md"])
def test_the_documentation_shows_these_pictures(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    for name in NAMES:
        assert f"]({name})" in text
        assert (ROOT / "docs" / name).stat().st_size < MOST
