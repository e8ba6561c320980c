"""Tables of the suite: of pytest-benchmark's JSON, or of the record that is made of it.

    python bench/summary.py runs/bench.json [--record bench/results/suite.json] [--markdown]

A contender's ratios are medians over the turns, in each of which it is divided by what another took
in the same turn; the range is that of the ratio to the best peer: the fastest of those whose result
is ours.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

Turns = dict[int, float]  # the median in seconds of each turn
# By problem: "base", and of each of its "contenders" the "kind", the "seconds" of each turn and
# "peak bytes", or "not here" with the reason.
Groups = dict[str, dict[str, Any]]

HEAD = ("", "ms", "÷ best peer", "range", "÷ {base}", "% of the floor", "MB beside")


def record(report: dict[str, Any]) -> dict[str, Any]:
    """Return what is kept of a report.

    Raises:
        SystemExit: A contender was not asked in each turn, or not the one that others are divided
            by: ratios are of what was measured in the same turn.
    """
    asked: dict[tuple[str, str], Turns] = {}
    for benchmark in report["benchmarks"]:
        info = benchmark["extra_info"]
        of_contender = asked.setdefault((benchmark["group"], info["contender"]), {})
        of_contender[info["turn"]] = float(f"{benchmark['stats']['median']:.4g}")
    groups: Groups = report["told"]
    for name, group in groups.items():
        every = {turn for (of, _), found in asked.items() if of == name for turn in found}
        for label, about in group["contenders"].items():
            if "not here" in about:
                continue
            found = asked.get((name, label), {})
            if found.keys() != every:
                raise SystemExit(
                    f"{name}: {label} was asked in {len(found)} of {len(every)} turns; ask the "
                    "whole question, without -k on its contenders."
                )
            about["seconds"] = [found[turn] for turn in sorted(found)]
    return {"machine": report["machine_info"], "groups": groups}


def turns(group: dict[str, Any], contender: str) -> Turns:
    """Return the seconds of each turn; of one who is not here, none."""
    return dict(enumerate(group["contenders"][contender].get("seconds", ())))


def ratio(a: Turns, b: Turns) -> tuple[float, float, float]:
    """Median, least and greatest a/b over the turns."""
    ratios = sorted(a[turn] / b[turn] for turn in a)
    return statistics.median(ratios), ratios[0], ratios[-1]


def best(group: dict[str, Any], *kinds: str) -> str | None:
    """Return the contender of these kinds that takes the least; None if none is here."""
    times = {
        name: statistics.median(about["seconds"])
        for name, about in group["contenders"].items()
        if about["kind"] in kinds and "seconds" in about
    }
    return min(times, key=lambda name: times[name], default=None)


def rows(group: dict[str, Any]) -> Iterator[list[str]]:
    """Yield the cells of each contender in the order of HEAD; of those not here, the reason."""
    peer, floor = best(group, "peer"), best(group, "floor")
    for name, about in group["contenders"].items():
        mine = turns(group, name)
        if not mine:
            yield [f"{name}: {about['not here']}", *("" for _ in HEAD[1:])]
            continue
        against_peer, spread = "", ""
        if peer is not None and about["kind"] != "floor":
            middle, low, high = ratio(mine, turns(group, peer))
            against_peer = "best peer" if name == peer else f"{middle:.2f}"
            spread = "" if name == peer else f"{low:.2f}–{high:.2f}"
        against_base = f"{ratio(mine, turns(group, group['base']))[0]:.2f}"
        share = "" if floor is None else f"{100 / ratio(mine, turns(group, floor))[0]:.0f}"
        peak = about["peak bytes"]
        yield [
            f"**{name}**" if about["kind"] == "ours" else name,
            f"{statistics.median(mine.values()) * 1e3:#.4g}".rstrip("."),
            against_peer, spread, against_base, share,
            "" if peak is None else f"{peak / 1e6:.0f}",
        ]  # fmt: skip


def table(name: str, group: dict[str, Any], style: box.Box) -> Table:
    """Return one problem's table."""
    result = Table(title=name, box=style, title_justify="left")
    for column in HEAD:
        result.add_column(column.format(base=group["base"]), justify="right" if column else "left")
    for cells in rows(group):
        result.add_row(*cells)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path, help="what --benchmark-json or --record wrote")
    parser.add_argument("--record", type=Path, help="write what is kept of it here")
    parser.add_argument("--markdown", action="store_true", help="print tables as Markdown")
    arguments = parser.parse_args()
    kept = json.loads(arguments.report.read_text())
    if "benchmarks" in kept:
        kept = record(kept)
    console = Console(width=160)  # a contender to a line
    console.print(kept["machine"])
    style = box.MARKDOWN if arguments.markdown else box.SIMPLE_HEAD
    for name, group in kept["groups"].items():
        console.print(table(name, group, style))
    if arguments.record:
        arguments.record.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
