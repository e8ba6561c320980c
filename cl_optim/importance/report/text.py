"""The report as tables for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cl_optim.importance.report.data import TOP, Data
from cl_optim.importance.statistics import SHARES
from cl_optim.ops.checks import require

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

_LAYERS = 20
_OVERLAPS = 8  # more tasks do not fit into a terminal's width


def render_text(data: Data) -> RenderableType:
    """Return tables of the tasks, of the layers with most importance, and of the tasks' overlap.

    Raises:
        ModuleNotFoundError: rich is not installed.
    """
    require("rich", "cli", "A report in the terminal")
    from rich.console import Group

    parts: list[RenderableType] = [_tasks(data), _layers(data)]
    if 1 < len(data["tasks"]) <= _OVERLAPS:
        parts.append(_overlap(data))
    if data["forgotten"]:
        parts.append(_plain(f"Forgotten: {', '.join(data['forgotten'])}."))
    return Group(*parts)


def _plain(name: Any) -> Text:
    """Return a name as it is: not markup, nor what controls the terminal."""
    from rich.text import Text

    return Text("".join(c if c.isprintable() else "\ufffd" for c in str(name)))


def _table(title: str, first: str, *columns: str | Text) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column(first, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _tasks(data: Data) -> Table:
    carriers = [f"{share:.0%} in" for share in SHARES]
    columns = ("recorded", "labels", "samples", "weights", "mean", *carriers, "codec")
    table = _table(
        "Tasks, and the share of weights that carries their importance", "task", *columns
    )
    for task in data["tasks"]:
        table.add_row(
            _plain(task["name"]),
            task["time"][:10],
            _plain(task["labels"] or ""),
            f"{task['samples']:,.0f}",
            f"{task['weights']:,}",
            f"{task['mean']:.2e}",
            *(f"{part:.2%}" for part in task["carriers"]),
            task["codec"],
        )
    return table


def _layers(data: Data) -> Table:
    """Return the layers by their largest share of any task's importance."""
    count = len(data["layers"])
    order = sorted(range(count), key=lambda row: -max(part or 0 for part in data["share"][row]))
    frozen = [f"top {part['fraction']:.0%}" for part in data["frozen"]]
    frozen += ["frozen"] if data["pinned"] else []
    frozen += ["effective rank"] if data["ranks"] else []
    title = f"Layers, the first {_LAYERS} of {count}" if count > _LAYERS else "Layers"
    table = _table(
        f"{title}, by their share of a task's importance", "layer", "weights", "share", *frozen
    )
    for row in order[:_LAYERS]:
        shares = [part for part in data["share"][row] if part is not None]
        low, high = min(shares), max(shares)
        table.add_row(
            _plain(data["layers"][row]["name"]),
            f"{data['layers'][row]['weights']:,}",
            f"{low:.1%} to {high:.1%}" if len(shares) > 1 else f"{high:.1%}",
            *(f"{part['layers'][row]:.1%}" for part in data["frozen"]),
            *([f"{data['pinned'][row]:.1%}"] if data["pinned"] else []),
            *([_ranks(data["ranks"][row])] if data["ranks"] else []),
        )
    return table


def _ranks(by_task: list[list[Data]]) -> str:
    """Return outputs × inputs of a layer's matrices, in the last task that knows them."""
    known = [matrices for matrices in by_task if matrices]
    last = known[-1] if known else []
    return ", ".join(f"{one['output']:.1f} × {one['input']:.1f}" for one in last)


def _overlap(data: Data) -> Table:
    tasks = [_plain(task["name"]) for task in data["tasks"]]
    title = f"Overlap of the {TOP:.0%} most important weights (common ones by all in either)"
    table = _table(title, "", *tasks)
    for task, row in zip(tasks, data["overlap"]["jaccard"], strict=True):
        table.add_row(task, *(f"{value:.2f}" for value in row))
    return table
