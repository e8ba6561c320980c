"""The report's figures as files for other programs: JSON and CSV."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from cl_optim.importance.files import whole
from cl_optim.importance.report.data import Data
from cl_optim.importance.statistics import SHARES

_SIDES = ("output", "input")


def csv_cell(value: object) -> object:
    """Return the value as a cell of a CSV file that no spreadsheet takes for a formula.

    Texts that could be one, such as a task's name, get an apostrophe before them; numbers stay.

    References:
        OWASP, CSV Injection.
    """
    is_formula = isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r", "\n"))
    return f"'{value}" if is_formula else value


def write_json(data: Data, path: Path) -> None:
    """Write all figures."""
    with whole(path) as file:
        file.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def write_csv(data: Data, path: Path) -> None:
    """Write the figures of layers and tasks, a line for each pair."""
    carriers = [f"carries_{share:.0%}".replace("%", "") for share in SHARES]
    frozen = [f"frozen_at_{part['fraction']:.0%}".replace("%", "") for part in data["frozen"]]
    with whole(path) as beside, open(beside, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            [
                *("layer", "task", "weights", "mean", "largest", "share", *carriers, *frozen),
                *("frozen", "output_rank", "input_rank"),
            ]
        )
        for row, layer in enumerate(data["layers"]):
            for column, task in enumerate(data["tasks"]):
                if data["mean"][row][column] is None:
                    continue
                figures = [data[name][row][column] for name in ("mean", "largest", "share")]
                parts = [part["layers"][row] for part in data["frozen"]]
                names = (csv_cell(layer["name"]), csv_cell(task["name"]))
                line = [*names, layer["weights"], *figures]
                pinned = data["pinned"][row] if data["pinned"] else 0.0
                matrices = data["ranks"][row][column] if data["ranks"] else []
                # A cell of several, where a layer has several matrices.
                ranks = [" ".join(str(one[side]) for one in matrices) for side in _SIDES]
                writer.writerow([*line, *data["carriers"][row][column], *parts, pinned, *ranks])
