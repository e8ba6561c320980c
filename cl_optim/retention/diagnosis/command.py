"""What ``cl-optim diagnose`` does: compare two files."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from cl_optim.retention.diagnosis.compare import diagnose
from cl_optim.retention.diagnosis.corpora import read_corpus
from cl_optim.retention.diagnosis.findings import Diagnosis


def diagnose_files(old: Path, new: Path) -> Diagnosis:
    """Compare the data in two files; with rich, progress is shown on stderr meanwhile.

    Raises:
        OSError: One cannot be read.
        ValueError: One has a line that is none, or nothing in it.
    """
    if importlib.util.find_spec("rich") is None:
        return diagnose(read_corpus(old), read_corpus(new))
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    # Where nobody sees the bar, its end would be an empty line.
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:

        def stream(path: Path) -> Iterator[object]:
            bar = progress.add_task(path.name, total=path.stat().st_size if path.is_file() else 0)
            yield from read_corpus(path, lambda read: progress.update(bar, completed=read))

        return diagnose(stream(old), stream(new))


def show(diagnosis: Diagnosis) -> None:
    """Print it as a table; needs rich."""
    from rich.console import Console

    Console().print(diagnosis, soft_wrap=True)
