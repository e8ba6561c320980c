"""Tables of ratios from pytest-benchmark's JSON, as they stand in RESULTS.md."""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

OURS = "EWCAdamW gradient"
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path)
    report = json.loads(parser.parse_args().report.read_text())
    console = Console(width=120)
    console.print(report["machine_info"])
    for name, contenders in samples(report).items():
        table = Table(title=name)
        for column in ("", "median ms", "÷ AdamW fused", "÷ " + OURS, "[range]", "of the floor"):
            table.add_column(column, justify="right" if column else "left")
        for contender, turns in contenders.items():
            plain, _, _ = ratio(turns, contenders["AdamW fused"])
            ours, low, high = ratio(turns, contenders[OURS])
            floor, _, _ = ratio(contenders[FLOOR], turns)
            table.add_row(
                contender,
                f"{statistics.median(turns.values()) * 1e3:.3f}",
                f"{plain:.2f}",
                f"{ours:.2f}",
                f"{low:.2f}-{high:.2f}",
                f"{floor:.0%}" if "EWC" in contender else "",
            )
        console.print(table)


if __name__ == "__main__":
    main()
