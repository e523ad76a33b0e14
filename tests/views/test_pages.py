"""Pages in a real browser, where there is one: they fit a phone and a screen, and stand alone; and their links."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fitune.commands import inspect as inspection
from fitune.commands.quantize import quantize
from fitune.commands.train import train
from fitune.core.config import build
from fitune.core.events import Silent
from fitune.core.options import quant_options
from fitune.core.records import StepRecord
from fitune.engine.checkpoint import RunFolder
from fitune.memory.advice import Advice, Advised, Saver, Suggestion
from fitune.memory.search import Candidate
from fitune.views import advice as adviceview
from fitune.views import plan_page, report, run_records
from fitune.views.charts import Bar, Series, bar_chart, line_chart, log_ticks, thinned
from fitune.views.differences import marked
from fitune.views.pages import linked
from fitune.views.stacked import Part, StackedBar, stacked_bars
from support import tiny
from support.plan_example import GIB, example, on_cpu

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), "")
NAMES = ("report", "plan", "plan-cpu", "advice", "inspect", "quantization")
MEASURE = """
addEventListener('load', () => { const found = {};
for (const frame of document.querySelectorAll('iframe')) { const d = frame.contentDocument, w = frame.clientWidth;
  const seen = [...d.querySelectorAll('*')].filter(e => e.getClientRects().length);
  const size = t => parseFloat(getComputedStyle(t).fontSize) * t.ownerSVGElement.getBoundingClientRect().width
    / t.ownerSVGElement.viewBox.baseVal.width;
  const texts = seen.filter(e => e.tagName === 'text');
  const out = t => { const a = t.getBoundingClientRect(), b = t.ownerSVGElement.getBoundingClientRect();
    return a.left < b.left - 1 || a.right > b.right + 1; };
  const cells = seen.filter(e => /^T[DH]$/.test(e.tagName) && !e.previousElementSibling && e.textContent.trim());
  const hidden = c => { const b = c.getBoundingClientRect(); return b.left < 0 || b.right > w || b.width < 60; };
  found[frame.id] = { page: d.documentElement.scrollWidth - w, charts: new Set(texts.map(t => t.ownerSVGElement)).size,
    letters: texts.length ? Math.min(...texts.map(size)) : 99, cut: texts.filter(out).map(t => t.textContent),
    cells: cells.length, first: cells.filter(hidden).map(c => c.textContent),
    numbers: seen.filter(e => e.matches('.numbers b') && e.scrollWidth > e.clientWidth).map(e => e.textContent) };
} document.getElementById('found').textContent = JSON.stringify(found); });
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> RunFolder:
    """A run that was tiny, with the records of a long one; its path and its answers are long too."""
    folder = tmp_path_factory.mktemp("一个很长的文件夹名" + "x" * 80)
    data = tiny.write_rows(folder / "rows.jsonl", 20)
    settings = {"model": str(model_folder), "data": [str(data)], "output": str(folder / "run"), "max_steps": 1}
    run = RunFolder(train(build({**settings, "sample_prompts": 1})).run)
    run.steps.write_text("")
    for step in range(1, 5001):
        loss, held_out = 10 * math.exp(-step / 900) + 0.01, 9.0 if step % 100 == 0 else None
        run.append_step(StepRecord(step, 1.0, 40.0 if step == 3 else loss, 1e-4, 1.0, 9, 9, 0.1, held_out))
    result = run.read("result")
    base = result["held_out_loss_before"]
    run.write("result", {**result, "total_parameters": 10**12, "trainable_parameters": 10**11, "steps": 5000})
    assert base == result["base_held_out_loss"]
    report.write(run)
    return run


def advice() -> str:
    plan = example()
    names = ("lora, nf4", "full with lion-8bit, checkpointing", "a name that is longer than any that has been seen yet")
    suggestion = Suggestion(
        name="", settings={}, changed={}, micro_batch=4, accumulation=2, plan=plan, largest_batch=96,
        needed_at_largest=GIB, max_length=512, quality=0.99, seconds=7300.0, enough=None,
    )  # fmt: skip
    candidate = Candidate(
        name="", settings={"quant": {"name": "nf4"}, "precision": "bf16", "checkpointing": "auto"}, batch_size=8,
        kept=4, max_length=512, needed=GIB,
        quality=0.99, trainable=3407872, flops_per_token=1e9, seconds=70.0, enough=None,
    )  # fmt: skip
    saver = Saver("--optimizer paged-adamw-8bit", {}, saves=GIB, time=1.1, cut=0.0, cost="8-bit states", plan=plan)
    text = (
        "a third more work, by Chen et al. 2016 (arXiv:1604.06174) and https://pytorch.org/docs/stable/checkpoint.html."
    )
    return adviceview.page(
        Advised(
            suggestions=[replace(suggestion, name=name) for name in names],
            candidates=[replace(candidate, name=f"{name} on nf4") for name in names],
            savers=[saver], advice=[Advice("checkpointing", text, {})], notes=["estimated"], where="24GB", here=False,
            budget=24 * GIB, combinations=1234, model="models/" + "llama" * 30,
            command="fitune train --model " + "x" * 300,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def pages(finished: RunFolder, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("pages")
    settings = {"model": str(model_folder), "data": [str(tiny.write_rows(folder / ("行" * 60 + ".jsonl"), 60))]}
    seen = inspection.inspect(build(settings), samples=2, tokenizers=[str(model_folder)], watch=Silent())
    quantize(model_folder, folder / "nf4", quant=quant_options("nf4"))
    found = {
        "report": finished.report.read_text(encoding="utf-8"),
        "plan": plan_page.page(example()),
        "plan-cpu": plan_page.page(on_cpu()),
        "advice": advice(),
        "inspect": inspection.page(replace(seen, template="t" * 200)),
        "quantization": (folder / "nf4" / "quantization.html").read_text(encoding="utf-8"),
    }
    assert tuple(found) == NAMES
    return found


def measured(pages: dict[str, str], folder: Path, width: int) -> dict[str, Any]:
    """What a browser makes of pages that are so many pixels wide."""
    frames = [
        f'<iframe id="{name}" style="width:{width}px;height:900px;border:0" srcdoc="{html.escape(page)}"></iframe>'
        for name, page in pages.items()
    ]
    wrapper = folder / "all.html"
    text = f'<meta charset="utf-8">{"".join(frames)}<pre id="found"></pre><script>{MEASURE}</script>'
    wrapper.write_text(text, encoding="utf-8")
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--user-data-dir={folder / 'profile'}",
    ]
    command += ["--window-size=1400,1000", "--dump-dom", wrapper.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    found = re.search(r'<pre id="found">(.+?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    values: dict[str, Any] = json.loads(html.unescape(found[1]))
    return values


@pytest.mark.skipif(not BROWSER, reason="no chromium here (apt-get install chromium)")
@pytest.mark.parametrize("width", [420, 1200])
def test_pages_fit(pages: dict[str, str], tmp_path: Path, width: int) -> None:
    found = measured(pages, tmp_path, width)
    assert sorted(found) == sorted(NAMES)
    for name, seen in found.items():
        assert seen["page"] <= 0, f"{name} is {seen['page']} pixels wider than {width}"
        assert seen["letters"] >= 10, f"{name}: letters of {seen['letters']:.1f} pixels in a chart"
        assert not seen["cut"], f"{name}: a chart cuts {seen['cut']}"
        assert not seen["first"], f"{name}: cannot be read: {seen['first']}"
        assert not seen["numbers"], f"{name}: wider than their card: {seen['numbers']}"
        assert seen["charts"] == {"report": 2, "plan": 2, "plan-cpu": 2, "advice": 2}.get(name, 1)
        assert seen["cells"]


@pytest.mark.skipif(not BROWSER, reason="no chromium here (apt-get install chromium)")
def test_a_page_that_does_not_fit_is_found(tmp_path: Path) -> None:
    wide = '<p style="white-space:nowrap">' + "x" * 400 + "</p>"
    chart = '<svg viewBox="0 0 4000 100" style="width:100%"><text x="3990" y="50">letters</text></svg>'
    table = '<div style="margin-left:-30px"><table><tr><td>first</td></tr></table></div>'
    card = '<div class="numbers"><b style="display:block;width:40px">1,234,567,890</b></div>'
    seen = measured({"bad": wide + chart + table + card}, tmp_path, 420)["bad"]
    assert seen["page"] > 0
    assert seen["letters"] < 10
    assert seen["cut"] == ["letters"]
    assert seen["first"] == ["first"]
    assert seen["numbers"] == ["1,234,567,890"]


def test_pages_stand_alone(pages: dict[str, str]) -> None:
    for name, page in pages.items():
        assert not re.search(r"<script[^>]*src|<link|<img|@import|url\(|src=", page), name
        scripts = re.findall(r"<script[^>]*>(.*?)</script>", page, re.DOTALL)
        assert len(scripts) == (name == "report")
        for script in scripts:  # it draws, and asks nobody for anything
            assert not re.search(r"\b(fetch|import|XMLHttpRequest|WebSocket|EventSource|sendBeacon|eval)\b", script)
            assert set(re.findall(r"https?://[^'\"]+", script)) == {"http://www.w3.org/2000/svg"}
        for target in re.findall(r'href="([^"]+)"', page):
            assert target.startswith("https://") or not re.match(r"[a-z]+:|/", target), f"{name}: {target}"


def test_links_are_links(pages: dict[str, str], finished: RunFolder) -> None:
    page = pages["report"]
    names = re.findall(r'href="(?!http)([^"]+)"', page)
    assert {"plan.html", "config.yaml", "steps.jsonl", "adapter"} <= set(names)
    for name in names:
        assert (finished.path / name).exists(), name
    assert '<a href="https://arxiv.org/abs/2106.09685">arXiv:2106.09685</a>' in page  # the method's paper
    assert '<a href="https://pytorch.org/docs/stable/checkpoint.html">' in pages["advice"]
    assert '<a href="https://arxiv.org/abs/1604.06174">arXiv:1604.06174</a>' in pages["advice"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("see arXiv:2305.14314.", 'see <a href="https://arxiv.org/abs/2305.14314">arXiv:2305.14314</a>.'),
        ("(https://a.b/c?d=1&e=2)", '(<a href="https://a.b/c?d=1&amp;e=2">https://a.b/c?d=1&amp;e=2</a>)'),
        ("<b>javascript:alert(1)</b>", "&lt;b&gt;javascript:alert(1)&lt;/b&gt;"),
        ('https://a.b/"onclick="x', '<a href="https://a.b/">https://a.b/</a>&#34;onclick=&#34;x'),
        ("no address: http://", "no address: http://"),
    ],
)
def test_text_is_escaped_and_its_addresses_are_links(text: str, shown: str) -> None:
    assert str(linked(text)) == shown


def test_the_report_has_both_scales_and_no_card_twice(pages: dict[str, str], finished: RunFolder) -> None:
    page = pages["report"]
    assert page.count('aria-label="loss by step"') == page.count('aria-label="loss by step, logarithmic"') == 2
    assert "held-out loss before" in page
    assert "held-out loss of the base" not in page  # lora begins at it: one card
    result = run_records.result_of(finished)
    other = dict(report._numbers(replace(result, base_held_out_loss=1.5, held_out_loss_before=9.0)))
    assert other["held-out loss of the base model"] == "1.5000"
    assert other["held-out loss before"] == "9.0000"
    assert len(page) < 1_000_000  # 5,000 steps
    assert re.search(r'id="loss-log" checked', page)  # from 10 to 0.05: a linear scale would show a line at zero
    assert not report._wide([3.0, 2.5, 1.9])
    assert not report._wide([3.0, 0.0])
    assert not report._wide([])


# ---- before and after ----


@pytest.mark.parametrize(
    ("before", "after", "shown"),
    [
        ("one two three", "one 2 three", ("one <del>two</del> three", "one <ins>2</ins> three")),
        ("首都是米拉", "首都是北京", ("首都是<del>米拉</del>", "首都是<ins>北京</ins>")),
        ("same", "same", ("same", "same")),
        ("", "new", ("", "new")),
        ("a <b> c", "a <b> d", ("a &lt;b&gt; <del>c</del>", "a &lt;b&gt; <ins>d</ins>")),
        ("nothing in common", "整个不同", ("nothing in common", "整个不同")),
    ],
)
def test_what_differs_between_two_answers_is_marked(before: str, after: str, shown: tuple[str, str]) -> None:
    assert tuple(map(str, marked(before, after))) == shown


def test_marks_take_nothing_away() -> None:
    before, after = "The <capital> of Norland & co. 是米拉。" * 9, "The capital of Norland 是 Mira。" * 9
    for text, found in zip((before, after), marked(before, after), strict=True):
        assert html.unescape(re.sub(r"</?(?:del|ins)>", "", str(found))) == text
    long = " ".join(map(str, range(3000)))
    assert marked(long, long + " x")[1] == long + " x"  # too long to be compared


def test_the_script_holds_the_numbers_and_cannot_be_ended_by_them() -> None:
    curves = report.Curves("</script><b>", [Series("x", [(1, 1.5), (2, math.nan), (3, 2.123456789)])], [])
    script = str(report._script([curves], log=True))
    assert "</script>" not in script
    [numbers] = re.findall(r"^const CURVES = (.*);$", script, re.MULTILINE)
    [chart] = json.loads(numbers)["charts"]
    assert chart["title"] == "</script><b>"
    assert chart["series"][0]["points"] == [[1, 1.5], [3, 2.12346]]


# ---- charts ----


def test_a_long_line_is_thinned_and_keeps_its_peaks() -> None:
    points = [(float(n), 40.0 if n == 777 else -40.0 if n == 3333 else math.sin(n)) for n in range(5000)]
    kept = thinned(points, 300)
    assert len(kept) <= 602
    assert {(777.0, 40.0), (3333.0, -40.0), points[0], points[-1]} <= set(kept)
    assert list(kept) == sorted(kept)
    assert thinned(points[:600], 300) == points[:600]


def test_long_names_stand_whole_above_their_bars() -> None:
    names = ("--batch-size 4 --accumulation 2", "通义千问" * 4)
    bars = [StackedBar(name, [Part("weights", 10.0, "--line1")]) for name in names]
    narrow = stacked_bars(bars, label="x", unit="MiB", width=350)
    for name in names:
        assert f">{name}: 10 MiB</text>" in narrow
        assert f">{name}</text>" in stacked_bars(bars, label="x", unit="MiB", width=960)  # beside it
    [cut] = re.findall(
        r">(x+….*?)<", stacked_bars([replace(bars[0], label="x" * 90)], label="x", unit="MiB", width=350)
    )
    assert cut.endswith("…: 10 MiB")


def heights(chart: str) -> list[float]:
    """Where the points of the first line are, from the top."""
    return [float(pair.split(",")[1]) for pair in re.findall(r'points="([^"]+)"', chart)[0].split()]


def test_a_logarithmic_axis_makes_equal_ratios_equal_distances() -> None:
    series = [Series("loss", [(0, 100.0), (1, 10.0), (2, 1.0), (3, 0.0), (4, 0.1)])]
    first, second, third, last = heights(line_chart(series, x_label="step", y_label="loss", log=True))  # without 0
    assert second - first == pytest.approx(third - second, abs=0.2)
    assert last - third == pytest.approx(third - second, abs=0.2)
    linear = heights(line_chart(series, x_label="step", y_label="loss"))
    assert linear[1] - linear[0] > 9 * (linear[2] - linear[1])
    assert "nothing to draw" in line_chart([Series("x", [(1, 0.0)])], x_label="", y_label="", log=True)


@pytest.mark.parametrize(("low", "high"), [(0.1, 100.0), (1.5, 2.0), (3.0, 3.0), (1e-9, 1e6), (0.7, 9.9), (2.2, 13.6)])
def test_log_ticks_cover_and_are_few(low: float, high: float) -> None:
    marks = log_ticks(low, high)
    assert marks[0] <= low * 1.001
    assert marks[-1] >= high * 0.999
    assert marks == sorted(marks)
    assert 2 <= len(marks) <= 17
    assert all(mark > 0 for mark in marks)


@pytest.mark.parametrize("width", [350, 960])
def test_bars_are_labelled_as_far_as_there_is_room(width: int) -> None:
    chart = bar_chart([Bar(f"{n * 128:,}", n % 7) for n in range(40)], x_label="tokens", y_label="rows", width=width)
    places = [float(x) for x in re.findall(r'<text x="([\d.]+)" y="260" text-anchor="middle">', chart)]
    assert len(places) >= 4
    assert min(after - before for before, after in pairwise(places)) > 30
