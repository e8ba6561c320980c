"""What ``cl-optim report`` does: write a log's report, or print it."""

from __future__ import annotations

import io
import sys
from pathlib import Path

from cl_optim.importance.report.data import Data
from cl_optim.importance.report.figures import write_csv, write_json


def write(
    data: Data, page: Path | None, pictures: Path | None, json: Path | None, csv: Path | None
) -> list[Path]:
    """Write what is asked for, in any of four forms.

    Args:
        data: The figures.
        page: A file for the page.
        pictures: A folder for the pictures, which need matplotlib.
        json: A file for all figures.
        csv: A file for those of layers and tasks.

    Returns:
        The files that have been written.

    Raises:
        OSError: One cannot be written.
    """
    written = []
    if page is not None:
        from cl_optim.importance.report.html import write_html

        write_html(data, page)
        written.append(page)
    if pictures is not None:
        from cl_optim.importance.report.pictures import write_png

        pictures.mkdir(parents=True, exist_ok=True)
        written += write_png(data, pictures)
    for write_as, path in ((write_json, json), (write_csv, csv)):
        if path is not None:
            write_as(data, path)
            written.append(path)
    return written


def show(data: Data) -> None:
    """Print the tables; needs rich."""
    from rich.console import Console

    from cl_optim.importance.report.text import render_text

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # names that the terminal cannot show
    console = Console(emoji=False)
    if not console.is_terminal:
        console.width = 120
    console.print(render_text(data))
