"""Tables of ratios from pytest-benchmark's JSON, as they stand in RESULTS.md."""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

# Each set of contenders holds some of these; the others are measured by them.
REFERENCES = ("AdamW fused", "EWCAdamW gradient", "weight gradient alone", "loop of batch size 1")
FLOOR = "36 B per parameter in place"


def samples(report: dict[str, Any]) -> dict[str, dict[str, dict[int, float]]]:
    """The median in seconds by set, contender and turn."""
    medians: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for benchmark in report["benchmarks"]:
        info = benchmark["extra_info"]
        medians[benchmark["group"]][info["contender"]][info["turn"]] = benchmark["stats"]["median"]
    return medians


def ratio(a: dict[int, float], b: dict[int, float]) -> tuple[float, float, float]:
    """Median, least and greatest a/b over the turns."""
    ratios = sorted(a[turn] / b[turn] for turn in a)
    return statistics.median(ratios), ratios[0], ratios[-1]


def table(name: str, contenders: dict[str, dict[int, float]], style: box.Box) -> Table:
    """One set of tensors: a row for each contender. The range is that of the last ratio."""
    references = [reference for reference in REFERENCES if reference in contenders]
    result = Table(title=name, box=style, title_justify="left")
    columns = ["", "median ms", *(f"÷ {reference}" for reference in references), "range"]
    for column in (*columns, *(["of the floor"] if FLOOR in contenders else [])):
        result.add_column(column, justify="right" if column else "left")
    for contender, turns in contenders.items():
        ratios = [ratio(turns, contenders[reference]) for reference in references]
        _, low, high = ratios[-1]
        row = [contender, f"{statistics.median(turns.values()) * 1e3:.3f}"]
        row += [f"{median:.2f}" for median, _, _ in ratios] + [f"{low:.2f}–{high:.2f}"]
        if FLOOR in contenders:
            floor, _, _ = ratio(contenders[FLOOR], turns)
            row.append(f"{floor:.0%}" if "EWC" in contender else "")
        result.add_row(*row)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path, help="what --benchmark-json wrote")
    parser.add_argument("--samples", type=Path, help="write every sample here, in microseconds")
    parser.add_argument("--markdown", action="store_true", help="print tables as Markdown")
    arguments = parser.parse_args()
    report = json.loads(arguments.report.read_text())
    console = Console(width=120)
    console.print(report["machine_info"])
    for name, contenders in samples(report).items():
        style = box.MARKDOWN if arguments.markdown else box.SIMPLE_HEAD
        console.print(table(name, contenders, style))
    if arguments.samples:
        rows = [
            {
                "set": benchmark["group"],
                **benchmark["extra_info"],
                "us": [round(seconds * 1e6, 1) for seconds in benchmark["stats"]["data"]],
            }
            for benchmark in report["benchmarks"]
        ]
        lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        machine = json.dumps(report["machine_info"])
        arguments.samples.write_text(f'{{"machine": {machine},\n"samples": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
