"""The page of `fitune ui` in a real browser: by mouse and keyboard, in both languages, on a phone and a screen."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fitune.commands import ui
from fitune.commands.ui.processes import Processes
from support import page as pages
from support import page_runs, tiny

pytestmark = pages.needs_browser
ANSWER = 60_000  # milliseconds that an answer may take on a busy machine


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return page_runs.workplace(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def address(work: Path) -> Iterator[str]:
    with pages.inside(work), ui.running(ui.roots_of()) as found:
        yield found


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with pages.browser() as found:
        yield found


@pytest.fixture
def seen(address: str) -> Iterator[pages.Seen]:
    """What the page must not do, which in the end it did not."""
    found = pages.Seen(address)
    yield found
    assert (found.errors, found.elsewhere) == ([], [])


@pytest.fixture
def page(chromium: Any, seen: pages.Seen) -> Iterator[Any]:
    """The page as somebody opens it for the first time."""
    yield from opened(chromium, seen, locale="en-US")


@pytest.fixture
def chinese(chromium: Any, seen: pages.Seen) -> Iterator[Any]:
    yield from opened(chromium, seen, locale="zh-CN", color_scheme="dark")


def opened(chromium: Any, seen: pages.Seen, **how: Any) -> Iterator[Any]:
    context = chromium.new_context(viewport={"width": 1280, "height": 900}, **how)
    context.set_default_timeout(ANSWER)
    page = context.new_page()
    seen.watch(page)
    page.goto(seen.address)
    page.wait_for_selector("html[data-ready]")
    yield page
    context.close()


def task(page: Any, name: str) -> None:
    page.click(f"[data-task={name}]")


def choose(page: Any, model: str = "model", data: str = "rows.jsonl") -> None:
    """Name a model and data."""
    page.fill("#model", model)
    page.dispatch_event("#model", "change")
    page.fill("#data-path", data)
    page.press("#data-path", "Enter")


def fits(page: Any) -> None:
    """Nothing is cut off, and everything that can be used has a name for a screen reader."""
    for width in (400, 1280):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(pages.WIDER) == []
    assert page.evaluate(pages.NAMELESS) == []


def test_model_and_data_are_chosen_and_rows_shown_in_colours(page: Any, work: Path, tmp_path: Path) -> None:
    own = tiny.write_rows(tmp_path / "my own.jsonl", 3)
    page.fill("#model", "model")
    page.set_input_files("#file", str(own))
    page.wait_for_selector("#data li >> text=my own.jsonl")
    page.click("#show-rows")
    page.wait_for_selector(".tokens .t")
    assert page.locator(".sample").count() == 3
    colours = {
        page.eval_on_selector(f".tokens span{kind}", "e => getComputedStyle(e).backgroundColor")
        for kind in (".t", ":not(.t)")
    }
    assert len(colours) == 2
    assert page.locator(".tokens .b").count() >= 3
    page.click(".sample summary >> nth=0")  # the strip that notebooks draw
    assert page.locator(".sample >> nth=0 >> .tok").count() == page.locator(".sample >> nth=0 >> .tokens span").count()
    assert "-100" in page.text_content(".sample >> nth=0 >> .tok")
    command = page.text_content("#choose-command pre")
    assert re.fullmatch(r"fitune inspect 'runs/uploads/my own(-\d+)?.jsonl' --model model", command)
    assert "passed: bad-row" in page.text_content("#rows")
    fits(page)


@pytest.mark.full
def test_a_file_is_dropped_and_another_is_taken_from_its_folder(page: Any) -> None:
    drop = """() => { const given = new DataTransfer();
      given.items.add(new File(['{"prompt": "a", "completion": "b"}\\n'], 'dropped.jsonl'));
      document.getElementById('drop').dispatchEvent(new DragEvent('drop', {dataTransfer: given, bubbles: true})); }"""
    page.evaluate(drop)
    page.wait_for_selector("#data li >> text=dropped.jsonl")
    page.click("#browse-data")
    page.click("#browser-list >> text=✓ rows.jsonl")
    page.click("#browse-model")
    page.click("#browser-list >> text=✓ model")
    assert page.input_value("#model") == "model"
    assert page.locator("#data li").count() == 2
    page.click("#data li >> nth=0 >> button[aria-label^=Remove]")
    assert page.locator("#data li").count() == 1
    page.click("#data button[aria-label^='Hold out']")
    assert page.text_content("#data li span") == "rows.jsonl (held out)"


@pytest.mark.full
def test_a_mistake_is_shown_with_its_fix(page: Any, seen: pages.Seen) -> None:
    choose(page, data="rows.jsonl")
    page.fill("#data-path", "/etc/passwd")
    page.click("#add-data")
    with page.expect_response("**/api/rows") as answered:
        page.click("#show-rows")
    assert answered.value.status == 403
    page.wait_for_selector("#choose-message .message")
    assert "outside the folders of this page" in page.text_content("#choose-message")
    assert len(seen.errors) == 1
    assert "status of 403" in seen.errors.pop()  # the browser's own line about it


def test_the_bar_of_memory_follows_the_sliders(page: Any) -> None:
    choose(page)
    task(page, "plan")
    page.select_option("#set-gpu", "size")
    slide = "(e, at) => { e.value = at; e.dispatchEvent(new Event('input')); }"
    needed = []
    for batch in (1, 64):
        with page.expect_response("**/api/plan") as first:
            page.eval_on_selector("#set-batch_size", slide, batch - 1)
        assert first.value.json()["how"] == "closed form"  # the bar follows before the trace
        page.wait_for_selector("#bar[data-how=trace]")
        page.wait_for_selector(f"#plan-command pre >> text=--batch-size {batch}")
        needed.append(page.text_content("#bar tr:has-text('activations') td.n"))
        assert page.locator("#bar .bar .wide svg .part").count() > 3
    assert needed[0] != needed[1]
    assert page.text_content("#bar b") == "Fits:"
    assert page.text_content("#plan-command pre").startswith(
        "fitune plan model --data rows.jsonl --gpu 24GB --batch-size 64"
    )
    fits(page)


def test_a_run_is_begun_watched_and_paused(
    page: Any, seen: pages.Seen, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, signals = [], []
    monkeypatch.setattr(Processes, "start", lambda self, name, arguments: begun.append(list(arguments)))
    monkeypatch.setattr(os, "kill", lambda process, number: signals.append(process))
    choose(page)
    task(page, "train")
    page.fill("#train-max_steps", "30")
    page.fill("#train-name", "live")
    with page_runs.under_way(work, "other") as step:
        step(1, 3.0)
        page.fill("#train-more", "warmup=0.1 lora.alpha=32")
        page.dispatch_event("#train-more", "change")
        page.wait_for_selector("#train-command pre >> text=--warmup 0.1")
        shown = page.text_content("#train-command pre")
        page.click("#begin")
        page.wait_for_selector("#live-name")
        assert begun == [shlex.split(shown)[1:]]
        assert shown.endswith("--max-steps 30 --warmup 0.1 --lora.alpha 32 --output runs/live")
        page.wait_for_selector("#live-message .message >> text=nothing is there")  # no process, so no run
        assert "status of 404" in seen.errors.pop()
        page.evaluate("location.hash = 'train/other'")
        page.wait_for_selector("#live-state >> text=running")
        for number in range(2, 7):
            step(number, 3.0 / number)
        page.wait_for_selector("#live-numbers >> text=0.5000")  # it follows by itself
        for metric in ("loss", "lr", "speed"):
            assert page.locator(f"#curve-{metric} polyline").count() >= 1
        page.click("#act-pause")
        page.wait_for_selector("#live-command pre >> text=kill")
        fits(page)
    page.wait_for_selector("#act-resume:not([hidden])")
    assert signals == [os.getpid()]
    assert page.text_content("#live-state") == "stopped, can go on"
    shutil.rmtree(work / "runs" / "other")


def test_runs_stand_in_a_table_and_their_curves_in_one_picture(page: Any) -> None:
    task(page, "runs")
    page.wait_for_selector("#together polyline >> nth=1")
    assert page.locator("#runs-table tbody tr").count() == 2
    differences = page.locator("#differences tbody tr")
    assert differences.count() == 1
    assert differences.text_content().startswith("lr")
    page.select_option("#metric", "held_out")
    page.wait_for_selector("#together circle")
    page.uncheck("#runs-table input >> nth=0")
    page.wait_for_function("document.querySelectorAll('#together polyline').length === 1")
    fits(page)


@pytest.mark.full
def test_a_curve_zooms_and_shows_its_values(page: Any) -> None:
    task(page, "runs")
    page.wait_for_selector("#together polyline >> nth=1")
    box = page.locator("#together svg").bounding_box()
    points = "document.querySelector('#together polyline').points.length"
    whole = page.evaluate(points)
    page.mouse.move(box["x"] + box["width"] * 0.1, box["y"] + 50)
    page.wait_for_selector("#together .legend small >> text=step 1")
    page.mouse.move(box["x"] + box["width"] * 0.55, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.99, box["y"] + 60)
    page.mouse.up()
    assert page.evaluate(points) < whole
    page.click("#together button >> text=Whole")
    assert page.evaluate(points) == whole
    page.focus("#together svg")
    for key in ("ArrowRight", "+"):
        page.keyboard.press(key)
    assert page.evaluate(points) < whole
    page.keyboard.press("Escape")
    assert page.evaluate(points) == whole


def test_base_and_tuned_model_answer_side_by_side(page: Any) -> None:
    task(page, "chat")
    page.select_option("#chat-run", "first")
    page.fill("#longest", "8")
    page.evaluate(
        """() => { window.order = []; for (const side of ['base', 'tuned'])
          new MutationObserver(() => window.order.push(side)).observe(document.getElementById(`side-${side}`),
            { childList: true, characterData: true, subtree: true }); }"""
    )
    page.fill("#question", "one plus two")
    page.press("#question", "Enter")
    page.wait_for_selector("#ask:not([aria-busy])")
    order = page.evaluate("window.order.slice(2)")  # both questions are drawn before
    assert "".join(order) not in ("base" * order.count("base") + "tuned" * order.count("tuned"),
                                  "tuned" * order.count("tuned") + "base" * order.count("base"))  # fmt: skip
    sides = [page.text_content(f"#side-{side} .assistant") for side in ("base", "tuned")]
    assert sides[0]
    assert sides[0] != sides[1]
    assert page.text_content("#chat-command pre") == "fitune chat runs/first --compare"
    left, right = (page.locator(f"#side-{side}").bounding_box() for side in ("base", "tuned"))
    assert left["x"] + left["width"] <= right["x"]
    fits(page)


def test_an_adapter_is_downloaded_and_a_merge_begun(page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []
    monkeypatch.setattr(Processes, "start", lambda self, name, arguments: begun.append(list(arguments)))
    task(page, "export")
    page.select_option("#export-run", "first")
    with page.expect_download() as download:
        page.click("#export-adapter a")
    assert download.value.suggested_filename == "first-adapter.zip"
    assert zipfile.is_zipfile(download.value.path())
    page.click("#export-start")
    page.wait_for_selector("#export-command pre >> text=first-merge-1")
    assert begun == [["merge", "runs/first", "--output", "runs/exports/first-merge-1"]]
    fits(page)


@pytest.mark.full
def test_everything_goes_by_keyboard(page: Any) -> None:
    def tab_to(name: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.id") == name:
                return
        raise AssertionError(f"no Tab leads to {name}")

    tab_to("model")
    page.keyboard.type("model")
    tab_to("data-path")
    page.keyboard.type("rows.jsonl")
    page.keyboard.press("Enter")
    tab_to("show-rows")
    page.keyboard.press("Enter")
    page.wait_for_selector(".tokens .t")
    ring = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert ring == "solid"


def test_in_chinese_and_dark(chinese: Any) -> None:
    assert chinese.get_attribute("html", "lang") == "zh-CN"
    assert chinese.text_content("[data-task=choose]") == "模型与数据"
    background = "getComputedStyle(document.body).backgroundColor"
    assert chinese.evaluate(background) == "rgb(20, 23, 28)"
    choose(chinese)
    chinese.click("#show-rows")
    chinese.wait_for_selector(".tokens .t")
    assert "参与训练的词元" in chinese.text_content("#rows")
    fits(chinese)
    chinese.click("#theme")
    assert chinese.evaluate(background) == "rgb(251, 251, 250)"
    chinese.click("#language")
    assert "tokens trained" in chinese.text_content("#rows")  # what is there changes too


@pytest.mark.full
def test_what_fits_is_searched_and_used(page: Any) -> None:
    choose(page)
    task(page, "plan")
    page.select_option("#set-gpu", "size")
    page.click("#advise")
    page.click("#advice button >> nth=0", timeout=4 * ANSWER)
    page.wait_for_selector("#plan-command pre >> text=--method")
    assert page.text_content("#advice .command pre").startswith("fitune plan model --data rows.jsonl --gpu 24GB")
    page.wait_for_selector("#bar[data-how=trace]")
    fits(page)


def test_a_report_zooms_in_the_dark_and_without_a_server(chromium: Any, work: Path) -> None:
    address = (work / "runs" / "first" / "report.html").as_uri()
    context = chromium.new_context(color_scheme="dark", viewport={"width": 400, "height": 900})
    page, seen = context.new_page(), pages.Seen(address)
    seen.watch(page)
    page.goto(address)
    page.wait_for_selector(".curves polyline")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 28)"
    assert not page.is_visible(".drawn")
    box = page.locator(".curves svg").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] - 12, box["y"] + 60)
    values = page.locator(".curves .legend").first.text_content()
    assert re.search(rf"training [\d.]+ step {page_runs.STEPS} *held-out [\d.]+ step {page_runs.STEPS}", values)
    points = "document.querySelector('.curves polyline').points.length"
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + 60)
    page.mouse.up()
    assert page.evaluate(points) < page_runs.STEPS
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    assert (seen.errors, seen.elsewhere) == ([], [])
    context.close()


@pytest.mark.full
def test_a_report_is_drawn_where_no_script_runs(chromium: Any, work: Path) -> None:
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((work / "runs" / "first" / "report.html").as_uri())
    assert page.is_visible(".drawn svg >> nth=0")
    context.close()


def test_a_page_that_errs_or_calls_elsewhere_is_seen(chromium: Any, address: str) -> None:
    planted = chromium.new_page(bypass_csp=True)
    seen = pages.Seen(address)
    seen.watch(planted)
    planted.goto(address)
    planted.evaluate("() => { console.error('planted'); fetch('http://127.0.0.1:9/x').catch(() => 0); }")
    planted.evaluate("() => document.body.append(document.createElement('button'))")
    planted.wait_for_timeout(100)
    assert "planted" in seen.errors
    assert seen.elsewhere == ["http://127.0.0.1:9/x"]
    assert planted.evaluate(pages.NAMELESS) == ["<button></button>"]
    planted.close()
