"""The terminal: eight lines before training, one bar, nothing left behind; and no control codes where nobody looks."""

from __future__ import annotations

import io
import re
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console

from fitune.core.events import RUN_FOLDER
from fitune.core.records import Finding, LengthChoice, StepRecord
from fitune.core.results import Answered
from fitune.views import terminal as console
from fitune.views.terminal import ECHO, Terminal, answers_table, lengths_table, methods_table

CPU = torch.device("cpu")
LONG = "/a/很长的路径/" + "x" * 150
LINES = {
    "model": "通义千问-" + "大" * 60 + ": 1,543,714,304 parameters, bf16 on cpu",
    "data": "数据" * 30 + ".json: 20,465 rows, 200 held out; 2,543,714 tokens, 89% trained",
    "method": "lora: 20,480 parameters (1.06%)",
    "steps": "30 of 8 rows, 0.25 epochs; learning rate 0.0002",
}
OK = [Finding(f"rule-{n}", "ok", "all is as it should be") for n in range(29)] + [Finding("bpe", "fixed", "apart")]
WARNED = Finding("truncation", "warn", "数据 " * 40 + "41.9% of the rows lose answer tokens", "--max-length 512")


def terminal(width: int, *, tty: bool = False, verbose: bool = False) -> tuple[Terminal, io.StringIO]:
    file = io.StringIO()
    return Terminal(Console(file=file, width=width, force_terminal=tty), verbose=verbose), file


def plan(frozen_cache: str = "off", blocks: int = 0) -> Any:
    peak = SimpleNamespace(parts={"activations": 2**20}, phase="loss")
    return SimpleNamespace(
        needed=706 * 2**20, budget=2**34, how="trace", peak=peak, outside={}, notes=["closed forms give 3 MiB"],
        frozen_cache=frozen_cache, frozen_blocks=blocks, frozen_bytes=2**20 * blocks, later_work=0.5,
    )  # fmt: skip


def begin(shown: Terminal, findings: list[Finding]) -> None:
    shown.summary(LINES)
    shown.settings({"batch": "8 rows x 1"})
    shown.groups([("block 0", 1, 2)])
    shown.plan(plan())
    shown.findings(findings)
    shown.summary({RUN_FOLDER: LONG})


def record(step: int, **changed: Any) -> StepRecord:
    values = {"epoch": 1.0, "loss": 2.1234, "lr": 1e-4, "grad_norm": 1.0, "tokens": 10**6, "targets": 9, "seconds": 1.0}
    return StepRecord(step, **{**values, **changed})


@pytest.mark.parametrize("width", [60, 80, 120])
def test_eight_lines_come_before_training(width: int) -> None:
    shown, file = terminal(width)
    begin(shown, OK)
    lines = file.getvalue().splitlines()
    names = ["model", "data", "method", "steps", "memory", "checks", "warnings", "run folder"]
    assert [line[:11].strip() for line in lines] == names
    assert "30 checks passed" in lines[5]
    assert lines[6].split() == ["warnings", "none"]
    assert LONG in lines[7]  # whole, so that it can be copied
    assert all(cell_len(line) <= width for line in lines[:7])


def test_blocks_that_run_once_are_named() -> None:
    for verbose in (False, True):
        shown, file = terminal(120, verbose=verbose)
        shown.plan(plan("memory", 14))
        assert "the peak is in the loss; 14 blocks run once (memory)" in file.getvalue()
        assert ("a later epoch takes 50 % of the operations" in file.getvalue()) == verbose


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_warning_is_shown_whole_and_once(width: int) -> None:
    shown, file = terminal(width)
    begin(shown, [*OK, WARNED])
    text = file.getvalue()
    lines = text.splitlines()[6:-1]
    assert "".join(line[11:] for line in lines).replace(" ", "").count("41.9%oftherowsloseanswertokens") == 1
    assert "".join(line[11:] for line in lines).replace(" ", "").endswith("(fix:--max-length512)")
    assert lines[0].startswith("warning    truncation: ")
    assert all(line.startswith(" " * 11) and cell_len(line) <= width for line in lines[1:])
    assert "all is as it should be" not in text
    assert not any(line.endswith(" ") for line in lines)
    assert "warnings   none" not in text


def test_verbose_prints_all_of_it() -> None:
    shown, file = terminal(100, verbose=True)
    begin(shown, [*OK, WARNED])
    for part in (
        "8 rows x 1",
        "block 0",
        "all is as it should be",
        "rule-28",
        "closed forms give 3 MiB",
        "activations",
    ):
        assert part in file.getvalue()


def test_a_check_that_is_made_later_prints_nothing_but_its_warning() -> None:
    shown, file = terminal(80)
    shown.findings([OK[0]])
    assert "checks passed" in file.getvalue()
    shown, file = terminal(80)
    shown.findings([WARNED])
    assert file.getvalue().startswith("warning    truncation")
    shown, file = terminal(80)
    shown.findings([Finding("grad-reaches", "refuse", "no gradient")])
    assert file.getvalue() == ""  # the error that follows says it


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_bar_leaves_room_for_what_a_terminal_echoes(width: int) -> None:
    """^C behind a full line would begin another one, and the bar would be drawn twice."""
    shown, _ = terminal(width, tty=True)
    shown.start(100_000, 0, "cpu")
    assert shown.bar is not None
    shown.step(record(99_999, held_out_loss=12.3456))
    for stopping in (False, True):
        if stopping:
            shown.stopping()
        lines = shown.console.render_lines(shown.bar.get_renderable(), pad=False)
        assert len(lines) == 1
        text = "".join(segment.text for segment in lines[0])
        assert cell_len(text.rstrip()) <= width - ECHO
        assert ("stopping after this step" if stopping else "loss 2.1234") in text
    shown.stop()


def test_one_bar_is_left_and_the_cursor_is_back() -> None:
    shown, file = terminal(80, tty=True)
    with shown:
        shown.start(10, 4, "cpu")
        shown.step(record(5))
        shown.stopping()
    left = file.getvalue().splitlines()[-1]
    assert "\x1b[?25h" in file.getvalue()[file.getvalue().rindex("\x1b[?25l") :]
    assert file.getvalue().count("\n") == 1, left
    assert shown.bar is None
    shown.stop()  # again: nothing happens
    assert file.getvalue().count("\n") == 1


def test_an_error_while_rows_are_read_leaves_no_bar() -> None:
    shown, file = terminal(80, tty=True)
    with suppress(ValueError), shown:
        shown.progress("reading rows", 500, None)
        raise ValueError
    assert shown.preparing is None
    assert "\x1b[?25h" in file.getvalue()
    shown, file = terminal(80, tty=True)
    shown.progress("reading rows", 1000, 1000)  # over before it was shown
    assert file.getvalue() == ""


def test_a_log_has_few_lines_and_no_control_codes() -> None:
    shown, file = terminal(80)
    begin(shown, [*OK, WARNED])
    shown.progress("reading rows", 10, 100)
    shown.start(1000, 0, "cpu")
    for step in range(1, 1001):
        shown.step(record(step))
    shown.stopping()
    shown.stop()
    text = file.getvalue()
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", text)
    assert sum(line.startswith("step ") for line in text.splitlines() if "/1000" in line) == 11


def test_columns_line_up_behind_wide_characters() -> None:
    file = io.StringIO()
    out = Console(file=file, width=100)
    out.print(lengths_table([LengthChoice("选定", 8, cut=0.1, lose_answer=0.0),
                             LengthChoice("p50", 12345, cut=1.0, lose_answer=1.0)]))  # fmt: skip
    first, second = file.getvalue().splitlines()[-2:]
    assert cell_len(first[: first.index("10.0%") + 5]) == cell_len(second[: second.index("100.0%") + 6])
    file.truncate(file.seek(0))
    rows = [Answered("法国的首都是哪里？", "巴黎", before="x", after="巴黎")]
    out.print(answers_table(rows))
    lines = [line for line in file.getvalue().splitlines() if line[:1] in "┃│"]
    edges = [[cell_len(line[: found.start()]) for found in re.finditer("[┃│]", line)] for line in lines]
    assert edges[0] == edges[1]
    assert all(line[1] == " " for line in lines)  # cells do not touch their borders


def test_a_model_alone_has_one_answer_to_a_prompt() -> None:
    rows = [Answered("1+1?", "2", before="two", after="two")]
    for base, headings in (
        (True, ["prompt", "expected", "before", "after"]),
        (False, ["prompt", "expected", "answer"]),
    ):
        file = io.StringIO()
        Console(file=file, width=80).print(answers_table(rows, base=base))
        assert re.findall(r"\w+", file.getvalue().splitlines()[2]) == headings
        assert file.getvalue().count("two") == 1 + base


def test_a_method_is_named_once_in_its_note() -> None:
    row: Any = SimpleNamespace(
        name="bitfit", trains="biases (add: some)", trainable=None, training_bytes=None, merges=True, default_lr=1e-3,
        note="bitfit: this model has no bias terms",
    )  # fmt: skip
    file = io.StringIO()
    Console(file=file, width=80).print(methods_table([row], "llama"))
    assert "bitfit: biases (add: some); this model has no bias terms" in " ".join(file.getvalue().split())
    assert "bitfit: bitfit" not in file.getvalue()


def test_neighbouring_blocks_are_one_line() -> None:
    parts = [("embedding", 0, 10), ("block 0", 2, 5), ("block 1", 2, 5), ("head", 0, 1)]
    rows = [("embedding", 10, 0, 10), ("block 0 ... block 1, each", 3, 2, 5), ("head", 1, 0, 1), ("all", 17, 4, 21)]
    assert console.parameters(parts) == rows


def test_a_held_out_loss_is_shown_with_the_step_that_it_is_of() -> None:
    """In lines only where it was measured; beside a bar with its step; the memory has room in both."""
    out = io.StringIO()
    terminal = Terminal(Console(file=out, width=80))
    terminal.start(40, 0, "cpu")
    for number in range(1, 9):
        record = StepRecord(number, 0.1, 2.0, 1e-4, 1.0, 100, 50, 0.1, 1.5 if number == 4 else None)
        terminal.step(record)
    terminal.stop()
    lines = out.getvalue().splitlines()
    assert [("held-out" in line, "MiB" in line) for line in lines] == [(False, True), (True, True), (False, True)]
