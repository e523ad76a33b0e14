"""planview: what is drawn and said of a memory plan is what the plan says."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from fitune.core.plan import Compared, Moment, Plan
from fitune.memory import storage
from fitune.views import plan as planview
from fitune.views.plan import CATEGORIES, compare_table, frozen_text, plan_table, plan_tables, verdict
from fitune.views.plan_drawing import plan_bar, plan_timeline
from fitune.views.plan_page import page
from fitune.views.stacked import Course, Layer, Limit, Part, Peak, Span, StackedBar, area_chart, stacked_bars
from support.plan_example import GIB, MIB, PHASES, example, on_cpu

pytestmark = pytest.mark.unit


def misses() -> Plan:
    return example(budget=16 * GIB)


def closed_form() -> Plan:
    """Made without a trace: no timeline, one phase, some categories zero."""
    parts = {**dict.fromkeys(CATEGORIES, 0), "frozen weights": 3000 * MIB, "activations": 1000 * MIB}
    return example(
        how="closed form", why="the model has code of its own", phases=[], timeline=[], closed=parts, budget=24 * GIB,
        peak={"phase": "step", "bytes": 4000 * MIB, "parts": parts}, allocated=4000 * MIB, needed=4516 * MIB,
        outside={"CUDA context": 516 * MIB}, reserved=None, reserved_expandable=None, smallest=None,
    )  # fmt: skip


PLANS = {"fits": example, "misses": misses, "cpu": on_cpu, "closed": closed_form}


def printed(shown: Any, *, colour: bool = False, encoding: str = "utf-8", width: int = 100) -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    console = Console(file=file, width=width, force_terminal=colour, color_system="truecolor" if colour else None)
    console.print(shown)
    file.flush()
    return raw.getvalue().decode(encoding)


def drawings(text: str) -> list[ET.Element]:
    return [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


# ---- the verdict ----
def test_the_categories_are_those_of_the_trace() -> None:
    assert CATEGORIES == storage.CATEGORIES


def test_verdicts() -> None:
    peak = "the peak is in the loss: activations 45 %, logits and loss 29 %, frozen weights 25 %"
    needs = "needs 17.3 GiB (at most 16.1 allocated + 0.7 fragmentation + 0.5 outside)"
    assert verdict(example()) == f"{needs}; fits into 24.0 GiB with 6.7 GiB to spare; {peak}"
    assert verdict(misses()) == f"{needs}; misses 16.0 GiB by 1.3 GiB; {peak}"
    assert verdict(example(budget=None)) == f"{needs}; {peak}"
    assert verdict(on_cpu()) == f"needs 1,610 MiB; {peak}"
    assert verdict(closed_form()) == (
        "needs 4,516 MiB (at most 4,000 allocated + 516 outside); fits into 24.0 GiB with 19.6 GiB to spare; "
        "the peak is in the step: frozen weights 75 %, activations 25 %"
    )


def test_verdicts_on_blocks() -> None:
    plan = example(blocks=32, recomputed=[*range(12)], more_work=0.1234)
    assert verdict(plan).endswith("; blocks 0 to 11 of 32 recomputed in the backward pass, 12 % more operations")
    plan = example(blocks=32, recomputed=[*range(32)], more_work=0.33, waiting=[0, 1], host=GIB)
    assert verdict(plan).endswith(
        "; all 32 blocks recomputed in the backward pass, 33 % more operations; "
        "inputs of blocks 0 to 1 in main memory until the backward pass, 1.0 GiB"
    )
    assert verdict(example(blocks=32, waiting=[0, 1], host=GIB)).endswith(
        "; activations of blocks 0 to 1 in main memory until the backward pass, 1.0 GiB"
    )


@pytest.mark.parametrize("name", PLANS)
def test_the_page_and_the_terminal_say_the_same(name: str) -> None:
    assert f">{verdict(PLANS[name]())}</div>" in page(PLANS[name]()).replace("\N{NO-BREAK SPACE}", " ")


# ---- tables ----
def test_table() -> None:
    (table,) = plan_tables(example(), 100)
    assert [column.header for column in table.columns] == ["", *PHASES]
    assert [str(column.style) for column in table.columns[1:]].index("bold yellow") == PHASES.index("loss")
    lines = printed(table).splitlines()
    assert "memory by phase, GiB" in lines[0]
    cells = {line[:30].strip(): line[30:].split() for line in lines[2:]}
    assert list(cells) == [*CATEGORIES, "total"]
    assert cells["logits and loss"] == ["-", "-", "4.72", "-", "-", "3.10", "-"]
    assert cells["total"][2] == "16.10"
    for column in range(len(PHASES)):
        whole = sum(float(cells[name][column].replace("-", "0")) for name in CATEGORIES)
        assert whole == pytest.approx(float(cells["total"][column]), abs=0.05)


@pytest.mark.parametrize("unit", [MIB // 10, MIB, 100 * MIB, GIB, 90 * GIB])
def test_table_fits_100_columns(unit: int) -> None:
    text = printed(plan_table(example(unit), 100))
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    assert "checkpoint" in text


@pytest.mark.parametrize("unit", [MIB // 10, MIB, 100 * MIB, GIB, 90 * GIB])
def test_no_figure_of_the_table_is_cut_off_at_80_columns(unit: int) -> None:
    text = printed(plan_table(example(unit), 80), width=80)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    wide = plan_tables(example(unit), 1000)[0]
    figures = [cell for column in wide.columns[1:] for cell in column._cells]
    assert sorted(re.findall(r"[<\d][\d.,]*|(?<= )-(?=\s|$)", text.split("\n", 1)[1])) == sorted(map(str, figures))
    assert [name for name in PHASES if name not in text] == []


def test_small_categories_join_the_temporaries_and_the_total_stays() -> None:
    plan = example()
    parts = [{**moment.parts, "trainable weights": 4 * MIB, "something new": MIB} for moment in plan.phases]
    phases = [Moment(old.phase, sum(new.values()), new) for old, new in zip(plan.phases, parts, strict=True)]
    shown = planview.grid(replace(plan, phases=phases))
    names = [name for name, _ in shown.rows]
    assert "trainable weights" not in names
    assert "temporaries" in names
    assert [sum(column) for column in zip(*(row for _, row in shown.rows), strict=True)] == shown.total


def test_categories_that_are_zero_have_no_row() -> None:
    shown = planview.grid(closed_form())
    assert [name for name, _ in shown.rows] == ["frozen weights", "activations"]
    assert (shown.phases, shown.peak) == (["step"], 0)


def test_predicted_beside_measured() -> None:
    table = compare_table(
        [
            Compared("frozen weights", 110 * MIB, 100 * MIB),
            Compared("states [m]", 0, 8 * MIB),
            Compared("outside", MIB, 0),
        ]
    )
    rows = [line.split("  ") for line in printed(table).splitlines()[2:]]
    assert [[cell.strip() for cell in row if cell] for row in rows] == [
        ["frozen weights", "110.0", "100.0", "+10.0", "+10.0"],
        ["states [m]", "0.0", "8.0", "-8.0", "-100.0"],
        ["outside", "1.0", "0.0", "+1.0", "-"],
    ]


# ---- drawings in the terminal ----
def test_bar_in_letters() -> None:
    budget, bar, *legend = printed(plan_bar(example(), 96)).splitlines()
    assert budget.index("▼") == 95
    assert "budget 24.0 GiB" in budget
    assert len(bar) == 96
    assert bar.count("A") == pytest.approx(96 * 7.25 / 24, abs=1)
    assert bar.count("·") == pytest.approx(96 * 6.7 / 24, abs=1)
    assert "A activations 7.25" in " ".join(legend)
    assert max(map(len, legend)) <= 96


def test_bar_of_a_plan_that_misses_points_into_it() -> None:
    budget, bar, *_ = printed(plan_bar(misses(), 96)).splitlines()
    assert budget.index("▼") == pytest.approx(96 * 16 / 17.3, abs=1)
    assert "·" not in bar


def test_what_the_allocator_counts_besides_tensors_is_drawn() -> None:
    plan = example()
    plan = replace(plan, allocated=plan.peak.bytes + 205 * MIB)
    text = " ".join(printed(plan_bar(plan, 96)).split())
    assert "+ workspaces and rounding 0.20 % fragmentation 0.50 # outside 0.50" in text
    assert "at most 16.3 allocated + 0.5 fragmentation" in verdict(plan)


def test_bar_of_a_far_budget_names_it() -> None:
    budget, bar, *_ = printed(plan_bar(closed_form(), 80)).splitlines()
    assert budget.strip() == "budget 24.0 GiB →"
    assert len(bar.strip()) == 80


def test_timeline_with_and_without_colour() -> None:
    plain = printed(plan_timeline(example(), 96, 12))
    lines = plain.splitlines()
    assert "▼" in lines[0]
    assert "peak of tensors 16.1 GiB" in lines[0]
    assert "A" in plain
    assert not any(block in plain for block in "▁▂▃▄▅▆▇█")
    assert lines[1].startswith("24.0 │")
    assert lines[1].count("╌") == 90
    peak = lines[0].index("▼")
    heights = [sum(line[n : n + 1].strip(" ╌") != "" for line in lines[1:13]) for n in range(6, 96)]
    assert max(heights) == heights[peak - 6] == pytest.approx(12 * 16.6 / 24, abs=1)
    for phase in ("└load", "└forward", "└backward", "evaluation┘"):
        assert phase in plain
    coloured = printed(plan_timeline(example(), 96, 12), colour=True)
    assert any(block in coloured for block in "▁▂▃▄▅▆▇")
    assert "38;2;95;208;189" in coloured


def test_drawings_in_ascii() -> None:
    for shown in (plan_bar(misses(), 80), plan_timeline(misses(), 80, 10)):
        assert printed(shown, encoding="ascii").isascii()


@pytest.mark.parametrize("width", [40, 60, 100])
@pytest.mark.parametrize("name", PLANS)
def test_drawings_keep_to_their_width(name: str, width: int) -> None:
    plan = PLANS[name]()
    for shown in (plan_bar(plan, width), plan_timeline(plan, width, 8)):
        longest = max(len(line.rstrip()) for line in printed(shown, width=200).splitlines())
        assert longest <= max(width, 45)  # a legend's entry is not broken


def test_no_timeline_without_a_trace() -> None:
    assert "closed forms" in printed(plan_timeline(closed_form(), 80, 8))


# ---- the page ----
@pytest.mark.parametrize("name", PLANS)
def test_page_is_whole_and_needs_nothing(name: str) -> None:
    plan = PLANS[name]()
    text = page(plan)
    assert not re.search(r"https?:|//[a-z]|<script|<link|<img|@import|url\(|src=|href=", text)
    pictures = drawings(text)
    assert len(pictures) == (4 if plan.timeline else 2)
    for picture in pictures:
        assert picture.get("role") == "img"
        assert picture.get("aria-label")
    assert "<b>not</b>" not in text
    for name in re.findall(r"fill=\"var\((--[a-z]+)\)", text):
        assert f"{name}:#" in text.replace("--fg:", "--fg:#")
    assert plan.model.rpartition("/")[2] in text
    assert ("Closed forms beside the trace" in text) == (plan.how == "trace")
    assert ("The largest tensors at the peak" in text) == bool(plan.largest)


@pytest.mark.parametrize("name", PLANS)
def test_drawn_widths_are_the_bytes(name: str) -> None:
    plan = PLANS[name]()
    phases = plan.phases or [plan.peak]
    for picture in drawings(page(plan))[:2]:
        drawn = [(rect[0].text or "", float(rect.get("width", 0))) for rect in picture.iter("rect") if len(rect)]
        needed = sum(width for title, width in drawn if title.startswith("needed, "))
        scale = needed / plan.needed
        for phase in phases:
            for part, size in phase.parts.items():
                widths = [width for title, width in drawn if title.startswith(f"{phase.phase}, {part}: ")]
                assert widths == ([pytest.approx(size * scale, rel=0.01)] if size else [])


@pytest.mark.parametrize("name", PLANS)
def test_nothing_is_drawn_outside(name: str) -> None:
    for picture in drawings(page(PLANS[name]())):
        _, _, width, height = map(float, str(picture.get("viewBox")).split())
        for rect in picture.iter("rect"):
            assert float(rect.get("x", -1)) >= 0
            assert float(rect.get("x", 0)) + float(rect.get("width", 0)) <= width
            assert float(rect.get("y", 0)) + float(rect.get("height", 0)) <= height
        for text in picture.iter("text"):
            assert 0 <= float(text.get("x", -1)) <= width
            assert 0 < float(text.get("y", -1)) <= height


# ---- charts ----
def test_the_limit_stands_where_its_value_is() -> None:
    bars = [StackedBar("步骤", [Part("激活", 10, "--line1"), Part("无", 0, "--line2")])]
    picture = ET.fromstring(stacked_bars(bars, label="<内存>", unit="MiB", limit=Limit("预算 20 MiB", 20)))
    [rect] = [rect for rect in picture.iter("rect") if rect.get("class") == "part"]
    [line] = [line for line in picture.iter("line") if line.get("class") == "limit"]
    start, width = float(rect.get("x", 0)), float(rect.get("width", 0))
    assert float(line.get("x1", 0)) == pytest.approx(start + 2 * width, rel=0.01)
    texts = [text.text for text in picture.iter("text")]
    assert "激活" in texts
    assert "无" not in texts  # of size 0
    assert "预算 20 MiB" in texts
    assert picture.get("aria-label") == "<内存>"


def test_layers_are_stacked_to_scale() -> None:
    layers = [Layer("a", [1, 2, 3], "--line1"), Layer("b", [3, 2, 7], "--line2"), Layer("none", [0, 0, 0], "--bad")]
    picture = ET.fromstring(
        area_chart(
            Course(
                layers,
                [0, 0.5, 1],
                spans=[Span("一", 0, 0.5), Span("二", 0.5, 1)],
                limit=Limit("budget 12.0 GiB", 12),
                peak=Peak(1, 10, "top"),
            ),
            label="x",
            unit="GiB",
            form=",.1f",
        )
    )
    first, second = [
        [tuple(map(float, point.split(","))) for point in str(polygon.get("points")).split()]
        for polygon in picture.iter("polygon")
    ]
    floor = first[-1][1]
    heights = [floor - y for _, y in second[:3]]
    assert heights[0] / heights[2] == pytest.approx(4 / 10, rel=0.01)
    assert second[3:] == first[2::-1]  # the second lies on the first
    [limit] = [line for line in picture.iter("line") if line.get("class") == "limit"]
    assert (floor - float(limit.get("y1", 0))) / heights[2] == pytest.approx(12 / 10, rel=0.01)
    [circle] = list(picture.iter("circle"))
    assert float(circle.get("cy", 0)) == second[2][1]
    texts = [text.text for text in picture.iter("text")]
    assert {"一", "二", "top", "budget 12.0 GiB", "a", "b"} <= set(texts)
    assert "none" not in texts


def test_nothing_to_draw() -> None:
    assert "nothing" in stacked_bars([StackedBar("a", [Part("b", 0, "--line1")])], label="x", unit="MiB")
    assert "nothing" in area_chart(Course([], []), label="x", unit="MiB")


def test_a_plan_says_which_blocks_run_once() -> None:
    text = frozen_text(replace(example(), frozen_cache="disk", frozen_blocks=14, frozen_bytes=3 * MIB, later_work=0.26))
    assert text.startswith("blocks 0 to 13 run once a row, what they give is kept on the disk, 3")
    assert text.endswith("a later epoch takes 26 % of the operations")
    assert frozen_text(example()) == ""
