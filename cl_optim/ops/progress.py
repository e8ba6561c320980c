"""A progress bar, where somebody looks."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cl_optim.ops.checks import require


@contextmanager
def progress_bar(
    shown: bool | None, title: str, total: int | None
) -> Iterator[Callable[[int], None]]:
    """Yield a function that advances a bar by rich, or does nothing where none is shown.

    Args:
        shown: None: if rich is installed and the standard error is a terminal.
        title: Of what is counted.
        total: How many there are; there may be fewer.

    Raises:
        ModuleNotFoundError: One is asked for, and rich is not installed.
    """
    if shown is None:
        shown = sys.stderr.isatty() and importlib.util.find_spec("rich") is not None
    if not shown:
        yield lambda count: None
        return
    require("rich", "cli", "progress=True")
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)
        bar.update(task, total=bar.tasks[0].completed)
