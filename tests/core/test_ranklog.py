"""The logs of a run of several processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from fitune.core import begun
from fitune.core.ranklog import LAST, MOVED, RankLog, last_of, path_of

pytestmark = pytest.mark.unit


def test_of_a_log_its_last_lines_are_taken(tmp_path: Path) -> None:
    log = RankLog(tmp_path, 1, all_of_it=False)
    for number in range(20):
        log.line(f"step {number}")
    assert last_of(path_of(tmp_path, 1)) == [f"step {number}" for number in range(20 - LAST, 20)]
    assert "rank-1.log ends with:" in log.end_of(1)
    assert "No such file" in log.end_of(2)


def test_a_stack_is_taken_whole_unless_the_run_went_on(tmp_path: Path) -> None:
    stack = ["Timeout (0:00:01)!", *(f'  File "a.py", line {n} in b' for n in range(30))]
    path = tmp_path / "log"
    path.write_text("\n".join(["step 1", "step 2", *stack]), encoding="utf-8")
    assert last_of(path) == ["step 2", *stack]
    path.write_text("\n".join([*stack, *(f"step {n}" for n in range(99))]), encoding="utf-8")
    assert last_of(path)[0] == f"step {99 - LAST}"


def test_a_log_that_goes_on_elsewhere_is_followed(tmp_path: Path) -> None:
    first, then = tmp_path / "first", tmp_path / "then"
    first.write_text(f"a warning\n{MOVED}{then}\n", encoding="utf-8")
    then.write_text("the last words\n", encoding="utf-8")
    assert last_of(first) == ["a warning", "the last words"]


def test_a_folder_with_nothing_but_logs_is_free(tmp_path: Path) -> None:
    RankLog(tmp_path, 1, all_of_it=False).line("step 1")
    assert not begun.check(tmp_path)
    (tmp_path / "logs" / "mine.txt").touch()
    with pytest.raises(Exception, match="not empty"):
        begun.check(tmp_path)
