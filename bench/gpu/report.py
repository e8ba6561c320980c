"""Figures, a line of JSON each as soon as it is known, and the table of goals at the end.

    python -m gpu.report figures.jsonl [more.jsonl …] [--stages stages.txt]

prints the table: `RESULT name value unit goal pass|fail|missing`. Imports no torch, so that it
works after anything.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from gpu.goals import BY_NAME, GOALS

Figure = dict[str, Any]


class Check(NamedTuple):
    """How far a result is from its reference, and how far it may be."""

    error: float
    allowed: float

    @property
    def right(self) -> bool:
        """NaN is wrong."""
        return self.error <= self.allowed


def path() -> Path:
    """Where figures go: what the environment variable FIGURES says."""
    return Path(os.environ.get("FIGURES", "figures.jsonl"))


def python() -> list[str]:
    """The Python that the environment variable PYTHON names, else this one."""
    return shlex.split(os.environ.get("PYTHON", sys.executable))


def append(line: Figure) -> None:
    """Write a line at once."""
    with path().open("a") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def figure(
    name: str,
    value: float,
    unit: str = "",
    *,
    check: Check | None = None,
    **details: object,
) -> None:
    """Write and print a figure.

    Args:
        name: As in `goals.py` if it has a goal.
        value: In ``unit``.
        unit: ms, x (a ratio) …
        check: Of the result whose time this is. A wrong one fails whatever its time.
        **details: Whatever explains it.
    """
    goal = BY_NAME.get(name)
    right = check is None or check.right
    met = goal is None or goal.met(value)
    result = "pass" if right and met else "fail"
    limit = None if goal is None else f"{goal.comparison} {goal.limit:g}"
    error = None if check is None else _json(check.error)
    line = {
        "name": name,
        "value": _json(value),
        "unit": unit,
        "goal": limit,
        "result": result,
        "error": error,
        "allowed_error": None if check is None else check.allowed,
        **details,
    }
    append(line)
    wrong = "" if right else f"  WRONG by {error}"
    print(f"{name:72}{value:12.4g} {unit:8}{limit or '':8}{result}{wrong}", flush=True)


def _json(number: float) -> float | str:
    """JSON knows neither NaN nor infinity."""
    return number if math.isfinite(number) else str(number)


def read(files: Iterable[Path]) -> list[Figure]:
    """The lines of several files; what is no JSON, as after a kill, is left out."""
    figures = []
    for file in files:
        for line in file.read_text().splitlines() if file.exists() else ():
            try:
                figures.append(json.loads(line))
            except json.JSONDecodeError:
                print(f"{file}: a line that is no JSON: {line[:80]}")
    return figures


def table(figures: Iterable[Figure]) -> list[str]:
    """A line for each goal and each wrong result without a goal; the last figure counts."""
    last = {line["name"]: line for line in figures if "name" in line}
    rows = [("", "name", "value", "unit", "goal", "")]
    for goal in GOALS:
        found = last.get(goal.name)
        value = "-" if found is None else f"{float(found['value']):.4g}"
        result = "missing" if found is None else found["result"]
        limit = f"{goal.comparison}{goal.limit:g}"
        rows.append(("RESULT", goal.name, value, goal.unit or "-", limit, result))
    for name, found in last.items():
        if name not in BY_NAME and found["result"] == "fail":
            value = f"{float(found['value']):.4g}"
            rows.append(("RESULT", name, value, found["unit"] or "-", "-", "fail"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("figures", type=Path, nargs="+")
    parser.add_argument("--stages", type=Path, help="what became of each stage, printed first")
    arguments = parser.parse_args()
    figures = read(arguments.figures)
    for line in figures:
        if "header" in line:
            print(json.dumps(line["header"], ensure_ascii=False))
    if arguments.stages is not None and arguments.stages.exists():
        print(arguments.stages.read_text(), end="")
    print("\n".join(table(figures)))


if __name__ == "__main__":
    main()
