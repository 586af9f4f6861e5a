"""The progress bar of all commands."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Report = Callable[[str, int, int], None]
"""Moves the bar; called with what is done, the number done, and the number of all."""


@contextmanager
def progress_bar() -> Iterator[Report]:
    """Show a bar on stderr of the first rank, and yield what moves it; on the other ranks that does nothing."""
    if os.environ.get("RANK", "0") != "0":
        yield lambda what, done, total: None
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    remaining = TimeRemainingColumn(elapsed_when_finished=True)
    # If rich redirected stdout, whatever is printed meanwhile would go to the stream of the bar.
    with Progress(*columns, remaining, console=Console(stderr=True), redirect_stdout=False) as bar:
        task = bar.add_task("", visible=False)  # until there is something to count
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total, visible=True)
