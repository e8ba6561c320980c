"""Files of a benchmark's results: a table, the figures behind it, and the machine of both."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from bench import records
from cl_optim.demo.machine import machine, sentence
from cl_optim.demo.report import write_markdown


def write(
    directory: Path,
    name: str,
    record: Mapping[str, Any],
    table: RenderableType,
    width: int = 400,
) -> list[Path]:
    """Write ``<name>.json`` and ``<name>.md`` into an existing directory; return both paths.

    Args:
        directory: Of the files.
        name: Of both.
        record: The figures.
        table: The same as tables and sentences, in Markdown.
        width: Of its lines.
    """
    paths = [directory / f"{name}.{kind}" for kind in ("json", "md")]
    records.write(paths[0], record)
    write_page(table, paths[1], width)
    return paths


def write_page(content: RenderableType, path: Path, width: int = 400) -> None:
    """Write tables and sentences as Markdown, and the machine that they are of."""
    write_markdown(Group(content, Text(), Text(sentence(machine()))), path, width)
