"""The report's figures as PNG files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cl_optim.importance.files import whole
from cl_optim.importance.report.data import Data
from cl_optim.importance.statistics import SHARES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = "Blues"
_LONGEST_NAME = 40
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "text.parse_math": False,  # names of tasks and layers may have a $
}


def write_png(data: Data, folder: Path) -> list[Path]:
    """Draw the layers, the carriers, the overlap and the freezing, and training if it was watched.

    Args:
        data: What :func:`~cl_optim.importance.report.data.report_data` returned.
        folder: Exists.

    Returns:
        The files: one PNG for each.
    """
    import matplotlib as mpl

    drawings = {
        "layers": _layers,
        "carriers": _carriers,
        "overlap": _overlap,
        "frozen": _frozen,
        **({"training": _training} if data["training"] else {}),
    }
    paths = []
    with mpl.rc_context(_STYLE):
        for name, draw in drawings.items():
            path = folder / f"{name}.png"
            with whole(path) as file:
                draw(data).savefig(file, format="png")
            paths.append(path)
    return paths


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _layers(data: Data) -> Figure:
    means = np.array(
        [[math.nan if value is None else value for value in row] for row in data["mean"]]
    )
    of_tasks = np.array([task["mean"] or math.nan for task in data["tasks"]])
    with np.errstate(divide="ignore"):
        ratios = np.log10(means / of_tasks)
    ratios[~np.isfinite(ratios)] = math.nan
    rows, columns = ratios.shape
    figure = _figure(3.5 + 0.45 * columns, 1.6 + 0.17 * rows)
    axes = figure.subplots()
    image = axes.imshow(ratios, aspect="auto", cmap=_COLOURS)
    axes.set_facecolor("#dddddd")
    _name(axes, _layer_names(data), _tasks(data))
    axes.set_title("Mean importance of each layer", loc="left", fontweight="bold")
    figure.colorbar(image, label="log₁₀ of its ratio to the task's mean", shrink=0.6)
    return figure


def _carriers(data: Data) -> Figure:
    tasks = _tasks(data)
    figure = _figure(7, 1.3 + 0.28 * len(tasks))
    axes = figure.subplots()
    shades = ("#0b3d78", "#4f8ac4", "#a9c8e6")
    for place in reversed(range(len(SHARES))):
        values = [100 * task["carriers"][place] for task in data["tasks"]]
        axes.barh(range(len(tasks)), values, color=shades[place], label=f"{SHARES[place]:.0%}")
    axes.set_yticks(range(len(tasks)), tasks)
    axes.invert_yaxis()
    axes.set_xlabel("% of the weights that carry so much of the importance")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    axes.set_title("How few weights carry it", loc="left", fontweight="bold")
    return figure


def _overlap(data: Data) -> Figure:
    tasks = _tasks(data)
    figure = _figure(2.5 + 0.45 * len(tasks), 2.0 + 0.4 * len(tasks))
    axes = figure.subplots()
    values = np.array(data["overlap"]["jaccard"])
    axes.imshow(values, vmin=0, vmax=1, cmap=_COLOURS)
    _name(axes, tasks, tasks)
    for (row, column), value in np.ndenumerate(values):
        colour = "white" if value > 0.5 else "black"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    title = f"Overlap of the top {data['top']:.0%}"
    axes.set_title(title, loc="left", fontweight="bold")
    return figure


def _frozen(data: Data) -> Figure:
    layers = _layer_names(data)
    figure = _figure(7, 1.3 + 0.17 * len(layers))
    axes = figure.subplots()
    for part, shade in zip(reversed(data["frozen"]), ("#a9c8e6", "#0b3d78"), strict=True):
        values = [100 * value for value in part["layers"]]
        label = f"top {part['fraction']:.0%} of all weights"
        axes.barh(range(len(layers)), values, color=shade, label=label)
    if data["pinned"]:
        values = [100 * value for value in data["pinned"]]
        axes.plot(values, range(len(layers)), "D", color="#c0392b", markersize=4, label="frozen")
    axes.set_yticks(range(len(layers)), layers, fontsize=7)
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.set_xlabel("% of the layer's weights that freezing would pin")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    axes.set_title("What freezing would pin", loc="left", fontweight="bold")
    return figure


def _training(data: Data) -> Figure:
    runs = data["training"]
    figure = _figure(8, 0.4 + 2.4 * len(runs))
    grid = figure.subplots(len(runs), 2, squeeze=False)
    for run, (penalty, drift) in zip(runs, grid, strict=True):
        penalty.plot(run["steps"], _numbers(run["penalty"]), color="#0b3d78")
        penalty.set_title("Penalty λ Σ F (θ − θ*)²", loc="left", fontweight="bold")
        drift.plot(run["steps"], _numbers(run["drift"]), color="#0b3d78", label="all weights")
        for layer in run["layers"]:
            label = _short(layer["name"])
            drift.plot(run["steps"], _numbers(layer["drift"]), linewidth=0.8, label=label)
        drift.set_title("Drift ‖θ − θ*‖", loc="left", fontweight="bold")
        drift.legend(frameon=False, fontsize=6)
        for axes in (penalty, drift):
            axes.set_xlabel("step")
            axes.set_ylim(0)
    return figure


def _numbers(values: list[float | None]) -> list[float]:
    """Return a curve, with a gap where a number was not finite."""
    return [math.nan if value is None else value for value in values]


def _tasks(data: Data) -> list[str]:
    return [_short(task["name"]) for task in data["tasks"]]


def _layer_names(data: Data) -> list[str]:
    return [_short(layer["name"]) for layer in data["layers"]]


def _short(name: str) -> str:
    """Return at most 40 characters, the first and the last, without what no font has."""
    name = "".join(c if c.isprintable() else "\ufffd" for c in name)
    return name if len(name) <= _LONGEST_NAME else f"{name[:19]}…{name[-20:]}"


def _name(axes: Axes, rows: list[str], columns: list[str]) -> None:
    axes.set_yticks(range(len(rows)), rows, fontsize=7)
    axes.set_xticks(range(len(columns)), columns, fontsize=7, rotation=45, ha="right")
    axes.tick_params(length=0)
