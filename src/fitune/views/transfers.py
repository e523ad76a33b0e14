"""How far a download is.

In: a console. Out: a function that a download calls with the file, the bytes that are there, and all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

OnBytes = Callable[[str, int, int], None]


@contextmanager
def transfer_bar(console: Console) -> Iterator[OnBytes | None]:
    """Inside, a function that shows how far a file is; nothing where nobody watches."""
    if not console.is_terminal:
        yield None
        return
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        console=console,
    ) as bar:
        tasks: dict[str, TaskID] = {}

        def on_bytes(file: str, done: int, total: int) -> None:
            if file not in tasks:
                tasks[file] = bar.add_task(file, total=total)
            bar.update(tasks[file], completed=done)

        yield on_bytes
