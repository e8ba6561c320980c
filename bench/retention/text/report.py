"""What the text demo prints and writes: a table, verdicts, JSON, a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from bench.retention import drift, tables
from bench.retention.text.results import COSTS, Results
from bench.retention.text.runs import ALPHAS, GUARD_EVERY, TOP, Method
from cl_optim.demo.metrics import Interval
from cl_optim.demo.picture import STYLE

_COLOURS = {
    "AdamW": "#d55e00",
    "EWC": "#56b4e9",
    "EWC, Kronecker": "#0072b2",
    "input projection": "#e69f00",
    "GEM": "#009e73",
    "replay": "#777777",
    "EWC + replay": "#cc79a7",
    "self-written, KL": "#000000",
    "LwF": "#a6761d",
    "EWC + self-written": "#7570b3",
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
    known = f"Before: {_show(before, 1, 3)} on {old}, {_show(unlearned, 1, 3)} on {new}."
    table = Table(box=table_box)
    for name in (
        "Method",
        "kept, %",
        "cost, %",
        *(f"decay, α: kept at {cost:.0%}" for cost in COSTS),
        "decay: kept, %",
        "cost, %",
    ):
        table.add_column(name, justify="left" if name == "Method" else "right")
    for method in results.base:
        decayed = replace(method, decay=True)
        table.add_row(
            method.label,
            _show(results.kept(method), 100, 1),
            _show(results.cost(method), 100, 2),
            *(_show(results.kept_at(decayed, cost), 100, 1) for cost in COSTS),
            _show(results.kept(decayed), 100, 1),
            _show(results.cost(decayed), 100, 2),
        )
    definitions = (
        f"Kept: (bpb_AdamW − bpb_method) / (bpb_AdamW − bpb_before) on {old}; cost: bpb_method / "
        f"bpb_AdamW − 1 on {new}; both paired by seed, against AdamW at a constant learning rate. "
        "Decay: the learning rate falls to 0 over the last four fifths. α: on the way from the end "
        f"back to the old weights ({len(ALPHAS)} points), the most that is kept at no more than "
        f"that cost. Replay replaces that part of each batch by some of {sizes.kept} kept windows "
        f"of {old}; GEM's memory is the same windows, its row computed anew every 10 steps. "
        f"Self-written: that part of each batch is replaced by some of {sizes.kept} windows that "
        f"the old model wrote, and the loss there is KL to its {TOP} largest outputs; LwF: KL to "
        "its outputs on the new text, times a weight. EWC is "
        "the proximal form. Nothing was tuned: every λ is a row."
    )
    guard = (
        f"The guard at work: AdamW, seed 0, checked every {GUARD_EVERY} steps, back to the last "
        f"good checkpoint when more than 10 % of {old} is lost:"
    )
    predicts = (
        f"What says how much of {old} is forgotten: measures of the ends of all "
        f"{len(results.runs)} runs, against the bits per byte lost."
    )
    parts: list[str | RenderableType] = [setting, known, "", table, definitions, ""]
    parts += [*results.verdicts, "", predicts, ""]
    parts += [drift.table([run.drift for run in results.runs], results.bits_lost, table_box), ""]
    parts += [guard, "", results.guard, ""]
    parts.append(f"The whole demo took {results.seconds:.0f} s.")
    return Group(*(Text(part) if isinstance(part, str) else part for part in parts))


def write(results: Results, directory: Path) -> list[Path]:
    """Write JSON, Markdown and two PNGs into an existing directory."""
    record = {**asdict(results), "alphas": ALPHAS, "verdicts": results.verdicts}
    table = render(results, box.MARKDOWN)
    paths = tables.write(directory, "text-demo", record, table, width=200)
    paths += [directory / "text-demo.png", directory / "text-drift.png"]
    draw(results, paths[2])
    drift.draw(
        [run.drift for run in results.runs],
        results.bits_lost,
        [_COLOURS[run.method.family] for run in results.runs],
        "bits per byte",
        paths[3],
    )
    return paths


def draw(results: Results, path: Path) -> None:
    """Draw the frontier: what is kept of the old text against the cost on the new one."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 5), dpi=160, layout="constrained")
        FigureCanvasAgg(figure)
        ends, ways = figure.subplots(1, 2, sharey=True)
        for family, colour in _COLOURS.items():
            methods = [method for method in results.base if method.family == family]
            _draw_ends(results, methods, ends, colour)
            for method in methods:
                decayed = replace(method, decay=True)
                kept, costs = results.kept_along(decayed), results.cost_along(decayed)
                ways.plot(
                    100 * np.mean(costs, 0), 100 * np.mean(kept, 0),
                    "o-", color=colour, linewidth=1.2, markersize=2.5,
                    label=family if method is methods[0] else None,
                )  # fmt: skip
        titles = ("constant learning rate, at the end", "decay, on the way back to the old weights")
        for axes, title in zip((ends, ways), titles, strict=True):
            axes.set_title(title, loc="left", fontweight="bold")
            axes.set_xlabel(f"more bits per byte on {results.new} than AdamW, %")
            axes.grid(color="#d9d9d9", linewidth=0.6)
            axes.set_axisbelow(True)
        ends.set_ylabel(f"kept of {results.old}, % of what AdamW forgets")
        low = min(
            0.0, *(100 * np.mean(results.cost_along(method), 0).min() for method in results.base)
        )
        ways.set_xlim(low - 1, 100 * COSTS[-1] + 3)
        ways.legend(frameon=False, loc="lower right", fontsize=8)
        figure.savefig(path)


def _draw_ends(results: Results, methods: Sequence[Method], axes: Any, colour: str) -> None:
    costs = [results.cost(method) for method in methods]
    kept = [results.kept(method) for method in methods]
    x = 100 * np.array([interval.mean for interval in costs])
    y = 100 * np.array([interval.mean for interval in kept])
    axes.errorbar(
        x, y,
        xerr=100 * np.nan_to_num([interval.half_width for interval in costs]),
        yerr=100 * np.nan_to_num([interval.half_width for interval in kept]),
        fmt="o-", color=colour, linewidth=1.5, markersize=4, elinewidth=0.8,
    )  # fmt: skip
    for method, left, up in zip(methods, x, y, strict=True):
        setting = method.label.removeprefix(method.family).strip(", ")
        axes.annotate(setting, (left, up), xytext=(4, -8), textcoords="offset points", fontsize=6.5)


def _show(interval: Interval, scale: float, digits: int) -> str:
    if math.isnan(interval.mean):
        return "–"
    text = f"{scale * interval.mean:.{digits}f}"
    if math.isnan(interval.half_width):
        return text
    return f"{text} ± {scale * interval.half_width:.{digits}f}"
