"""Tables of what was measured: as text, and as rich shows them."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

Rows = Sequence[Sequence[str]]


def as_lines(
    names: Sequence[str], rows: Rows, left: Collection[int] = (), gap: str = "  "
) -> list[str]:
    """Return the columns' names and the rows, all of one width, numbers to the right.

    Args:
        names: Of the columns.
        rows: A cell for each.
        left: The numbers of the columns that are texts.
        gap: What is between columns.
    """
    table = [names, *rows]
    widths = [max(map(cells, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        padded = []
        for place, (cell, width) in enumerate(zip(row, widths, strict=True)):
            space = " " * (width - cells(cell))
            padded.append(cell + space if place in left else space + cell)
        lines.append(gap.join(padded))
    return lines


def as_rich(names: Sequence[str], rows: Rows, left: Collection[int] = ()) -> Table:
    """Return the same for rich; nothing in it is markup."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    for place, name in enumerate(names):
        table.add_column(Text(name), justify="left" if place in left else "right")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def cells(text: str) -> int:
    """Count the cells that a terminal takes for a text: two for wide characters, none for marks."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(map(bool, map(unicodedata.combining, text)))
