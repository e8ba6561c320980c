"""What the text demo prints and writes: a table, verdicts, JSON, a picture."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from bench.retention.text.results import Results
from bench.retention.text.runs import GUARD_EVERY, LAMBDA_WITH_REPLAY, METHODS
from cl_optim.demo.metrics import Interval
from cl_optim.demo.picture import STYLE
from cl_optim.demo.report import versions, write_markdown

_COLOURS = {
    "AdamW": "#d55e00",
    "EWC": "#0072b2",
    "GEM": "#009e73",
    "replay": "#777777",
    "EWC + replay": "#cc79a7",
}


def render(results: Results, table_box: box.Box = box.SIMPLE_HEAD) -> RenderableType:
    """Return the table and sentences."""
    old, new, sizes = results.old, results.new, results.sizes
    seeds = len(results.before)
    setting = (
        f"A byte-level transformer ({sizes.layers} layers of width {sizes.width}, context "
        f"{sizes.context}) learns {old} in {sizes.old_steps} steps of {sizes.batch} windows, then "
        f"{new} in {sizes.new_steps}; {seeds} seed{'s' * (seeds > 1)}. Bits per byte on held-out "
        "text, mean ± 95 % t-interval."
    )
    before = Interval.of([b.old_bpb for b in results.before])
    unlearned = Interval.of([b.new_bpb for b in results.before])
    table = Table(box=table_box)
    for name in (
        "Method",
        f"{old}, bits",
        f"{new}, bits",
        f"kept of {old}, %",
        f"cost on {new}, %",
    ):
        table.add_column(name, justify="left" if name == "Method" else "right")
    table.add_row(f"before {new}", _show(before, 1, 3), _show(unlearned, 1, 3), "", "")
    for method in METHODS:
        table.add_row(
            method.label,
            _show(results.old_bpb(method), 1, 3),
            _show(results.new_bpb(method), 1, 3),
            _show(results.kept(method), 100, 1),
            _show(results.cost(method), 100, 2),
        )
    definitions = (
        f"Kept: (bpb_AdamW − bpb_method) / (bpb_AdamW − bpb_before) on {old}, paired by seed. "
        f"Cost: bpb_method / bpb_AdamW − 1 on {new}. Replay replaces that part of each batch by "
        f"some of {sizes.kept} kept windows of {old}; GEM's memory is the same windows, its row "
        "computed anew every 10 steps. EWC is the proximal form; with replay, its λ is "
        f"{LAMBDA_WITH_REPLAY:g}. Form and λ were chosen with another seed; nothing else was tuned."
    )
    guard = (
        f"The guard at work: AdamW, seed 0, checked every {GUARD_EVERY} steps, back to the last "
        f"good checkpoint when more than 10 % of {old} is lost:"
    )
    parts: list[str | RenderableType] = [setting, "", table, definitions, ""]
    parts += [*results.verdicts, "", guard, "", results.guard, ""]
    parts.append(f"The whole demo took {results.seconds:.0f} s.")
    return Group(*(Text(part) if isinstance(part, str) else part for part in parts))


def write(results: Results, directory: Path) -> list[Path]:
    """Write JSON, Markdown and a PNG into an existing directory."""
    paths = [directory / f"text-demo.{kind}" for kind in ("json", "md", "png")]
    paths[0].write_text(json.dumps(_to_json(results), indent=1) + "\n", encoding="utf-8")
    write_markdown(render(results, box.MARKDOWN), paths[1])
    draw(results, paths[2])
    return paths


def _to_json(results: Results) -> dict[str, Any]:
    return {**asdict(results), "versions": versions(), "verdicts": results.verdicts}


def draw(results: Results, path: Path) -> None:
    """Draw the frontier: what is kept of the old text against the cost on the new one."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 5), dpi=160, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for family, colour in _COLOURS.items():
            methods = [method for method in METHODS if method.family == family]
            costs = [results.cost(method) for method in methods]
            kept = [results.kept(method) for method in methods]
            x = 100 * np.array([interval.mean for interval in costs])
            y = 100 * np.array([interval.mean for interval in kept])
            axes.errorbar(
                x, y,
                xerr=100 * np.nan_to_num([interval.half_width for interval in costs]),
                yerr=100 * np.nan_to_num([interval.half_width for interval in kept]),
                fmt="o-", color=colour, label=family, linewidth=1.5, markersize=5, elinewidth=0.8,
            )  # fmt: skip
            for method, left, up in zip(methods, x, y, strict=True):
                setting = method.label.removeprefix(family).strip(", ")
                axes.annotate(
                    setting, (left, up), xytext=(5, -9), textcoords="offset points", fontsize=7.5
                )
        axes.set_title(
            f"What is kept of {results.old} while {results.new} is learned",
            loc="left", fontweight="bold",
        )  # fmt: skip
        axes.set_xlabel(f"more bits per byte on {results.new} than AdamW, %")
        axes.set_ylabel(f"kept of {results.old}, % of what AdamW forgets")
        axes.grid(color="#d9d9d9", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.legend(frameon=False, loc="lower right")
        figure.savefig(path)


def _show(interval: Interval, scale: float, digits: int) -> str:
    text = f"{scale * interval.mean:.{digits}f}"
    if math.isnan(interval.half_width):
        return text
    return f"{text} ± {scale * interval.half_width:.{digits}f}"
