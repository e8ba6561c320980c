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

Turns = dict[int, float]  # the median in seconds of each turn


def samples(report: dict[str, Any]) -> dict[str, dict[str, Turns]]:
    """By group and contender."""
    medians: dict[str, dict[str, Turns]] = defaultdict(lambda: defaultdict(dict))
    for benchmark in report["benchmarks"]:
        info = benchmark["extra_info"]
        medians[benchmark["group"]][info["contender"]][info["turn"]] = benchmark["stats"]["median"]
    return medians


def ratio(a: Turns, b: Turns) -> tuple[float, float, float]:
    """Median, least and greatest a/b over the turns."""
    ratios = sorted(a[turn] / b[turn] for turn in a)
    return statistics.median(ratios), ratios[0], ratios[-1]


def table(name: str, contenders: dict[str, Turns], bases: list[str], style: box.Box) -> Table:
    """One group: a row for each contender, its time as a multiple of each base's."""
    result = Table(title=name, box=style, title_justify="left")
    result.add_column("")
    for column in ("median ms", *(f"÷ {base}" for base in bases), "range"):
        result.add_column(column, justify="right")
    for contender, turns in contenders.items():
        ratios = [ratio(turns, contenders[base]) for base in bases]
        _, low, high = ratios[-1]
        result.add_row(
            contender,
            f"{statistics.median(turns.values()) * 1e3:.3f}",
            *(f"{median:.2f}" for median, _, _ in ratios),
            f"{low:.2f}–{high:.2f}",
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path, help="what --benchmark-json wrote")
    parser.add_argument("--samples", type=Path, help="write every sample here, in microseconds")
    parser.add_argument("--markdown", action="store_true", help="print tables as Markdown")
    arguments = parser.parse_args()
    report = json.loads(arguments.report.read_text())
    console = Console(width=160)  # a contender to a line
    console.print(report["machine_info"])
    bases = {
        benchmark["group"]: benchmark["extra_info"].get("bases")
        for benchmark in report["benchmarks"]
    }
    for name, contenders in samples(report).items():
        style = box.MARKDOWN if arguments.markdown else box.SIMPLE_HEAD
        console.print(table(name, contenders, bases[name] or [next(iter(contenders))], style))
    if arguments.samples:
        rows = [
            {
                "set": benchmark["group"],
                "turn": benchmark["extra_info"]["turn"],
                "contender": benchmark["extra_info"]["contender"],
                "us": [round(seconds * 1e6, 1) for seconds in benchmark["stats"]["data"]],
            }
            for benchmark in report["benchmarks"]
        ]
        lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        machine = json.dumps(report["machine_info"])
        arguments.samples.write_text(f'{{"machine": {machine},\n"samples": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
