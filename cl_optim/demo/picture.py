"""The picture of a demo: each task's accuracy as training goes on, method by method."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cl_optim.demo import metrics
from cl_optim.demo.methods import Method
from cl_optim.demo.metrics import Interval
from cl_optim.demo.report import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 4
_INK = "#222222"
_FAINT = "#d9d9d9"
# Kinds of methods in the summary, in colours of Okabe & Ito's palette for the colour-blind.
_PROTECTED, _PLAIN, _CEILING = "#0072b2", "#d55e00", "#777777"
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": "#999999",
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": _INK,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


def draw(results: Results, path: Path) -> None:
    """Write the picture as a PNG: one panel for each method, and one for all methods' ACC."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    compared = results.methods
    rows = math.ceil((len(compared) + 1) / _COLUMNS)
    tasks = results.experiment.config.tasks
    colours = mpl.colormaps["viridis"](np.linspace(0.0, 0.88, tasks))
    with mpl.rc_context(STYLE):
        height = 2.6 * rows + 0.75
        layout = ConstrainedLayoutEngine(rect=(0, 0, 1, 1 - 0.75 / height), hspace=0.06)
        figure = Figure(figsize=(3.2 * _COLUMNS, height), dpi=160, layout=layout)
        FigureCanvasAgg(figure)
        grid = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
        for axes, method in zip(grid, compared, strict=False):
            _curves(axes, results, method, colours)
        for number in range(0, len(compared), _COLUMNS):
            grid[number].set_ylabel("test accuracy")
        _summary(grid[len(compared)], results)
        for axes in grid[len(compared) + 1 :]:
            axes.set_axis_off()
        figure.text(
            0.008, 1 - 0.1 / height, va="top", fontsize=14, fontweight="bold",
            s=f"{results.experiment.name}: accuracy on {tasks} tasks learned one after another",
        )  # fmt: skip
        seeds = len(results.seeds)
        figure.text(
            0.008, 1 - 0.58 / height, color="#555555",
            s="one seed" if seeds == 1 else f"mean of {seeds} seeds with its 95 % interval",
        )  # fmt: skip
        figure.legend(
            *grid[0].get_legend_handles_labels(),
            loc="center right", bbox_to_anchor=(0.998, 1 - 0.5 / height), ncols=tasks,
            frameon=False, handlelength=1.4, columnspacing=1.4,
        )  # fmt: skip
        figure.savefig(path)


def _curves(axes: Axes, results: Results, method: Method, colours: NDArray[np.float64]) -> None:
    """Show one method: a line for each task, from where its training begins."""
    runs = results.of(method)
    tasks = results.experiment.config.tasks
    steps = np.mean([run.curve_steps for run in runs], axis=0)  # tasks may differ in length
    curves = np.stack([run.curves for run in runs])  # [seeds, points, tasks]
    end = float(steps[-1])
    if not method.joint:
        for task in range(1, tasks):
            axes.axvline(task * end / tasks, color=_FAINT, linewidth=0.8, zorder=0)
    for task in range(tasks):
        begun = ~np.isnan(curves[0, :, task])
        intervals = [Interval.of(list(values)) for values in curves[:, begun, task].T]
        mean = np.array([interval.mean for interval in intervals])
        half = np.nan_to_num([interval.half_width for interval in intervals])
        axes.plot(steps[begun], mean, color=colours[task], linewidth=1.7, label=f"task {task + 1}")
        low, high = np.clip([mean - half, mean + half], 0, 1)
        axes.fill_between(steps[begun], low, high, color=colours[task], alpha=0.13, linewidth=0)
    acc = results.interval(method, metrics.acc)
    axes.set_title(method.label, loc="left", fontweight="bold", fontsize=10)
    axes.set_title(f"ACC {100 * acc.mean:.0f} %", loc="right", fontsize=10)
    axes.set_xlim(0, end)
    axes.set_ylim(0, 1.02)
    axes.set_yticks(np.linspace(0, 1, 5), ["0", "25 %", "50 %", "75 %", "100 %"])
    axes.set_xlabel("training step")
    axes.grid(axis="y", color=_FAINT, linewidth=0.6)
    axes.set_axisbelow(True)


def _summary(axes: Axes, results: Results) -> None:
    """Show the final accuracy of every method, each named beside its interval."""
    for place, method in enumerate(results.methods):
        colour = _PROTECTED if method.protects else _PLAIN
        acc = results.interval(method, metrics.acc)
        axes.errorbar(
            acc.mean, place, xerr=np.nan_to_num(acc.half_width),
            fmt="o", color=_CEILING if method.joint else colour, markersize=5, elinewidth=2,
        )  # fmt: skip
        # On the side with more room.
        side = -1 if acc.mean > 0.5 else 1
        axes.annotate(
            method.label, (acc.mean + side * np.nan_to_num(acc.half_width), place),
            xytext=(side * 5, 0), textcoords="offset points", fontsize=7.5,
            ha="right" if side < 0 else "left", va="center_baseline",
        )  # fmt: skip
    axes.set_title("All methods", loc="left", fontweight="bold", fontsize=10)
    axes.set_ylim(len(results.methods) - 0.5, -0.5)
    axes.set_yticks([])
    axes.set_xlim(0, 1.02)
    axes.set_xticks(np.linspace(0, 1, 5), ["0", "25 %", "50 %", "75 %", "100 %"])
    axes.set_xlabel("ACC, mean over all tasks at the end")
    axes.grid(axis="x", color=_FAINT, linewidth=0.6)
    axes.spines["left"].set_visible(False)
    axes.set_axisbelow(True)
