"""Does one strength do for all networks? ``python -m bench.retention strength``.

Each form of protection is trained with each strength on networks of several widths, on more tasks
than a network has room for, and on heads; nothing is chosen: the table shows every value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from bench.retention import tables
from cl_optim.demo import metrics
from cl_optim.demo.experiments import (
    EWC_KRONECKER,
    EWC_PROXIMAL,
    INPUT_PROJECTION,
    PERMUTED_DIGITS,
    SPLIT_DIGITS,
    Experiment,
)
from cl_optim.demo.methods import Method, Projecting, Protected
from cl_optim.demo.metrics import Interval
from cl_optim.demo.report import in_percent, number_table
from cl_optim.demo.scenarios import Task
from cl_optim.demo.train import train

LR = 3.2e-3


def _networks() -> dict[str, Experiment]:
    permuted = PERMUTED_DIGITS
    found = {
        f"Permuted, {hidden} units": replace(
            permuted, config=replace(permuted.config, hidden=hidden, points=0)
        )
        for hidden in (100, 300, 1000)
    }
    config = replace(permuted.config, tasks=10, hidden=100, points=0)
    found["Permuted, 100 units, 10 tasks"] = replace(permuted, config=config)
    found["Split, 32 units"] = replace(SPLIT_DIGITS, config=replace(SPLIT_DIGITS.config, points=0))
    return found


NETWORKS = _networks()

# Each with its values, the one to begin with in the middle.
METHODS: tuple[tuple[Protected | Projecting, tuple[float, ...]], ...] = (
    (replace(EWC_PROXIMAL, label="EWC, diagonal", lr=LR), (0.01, 0.03, 0.1, 0.3, 1.0)),
    (replace(EWC_KRONECKER, lr=LR), (0.01, 0.03, 0.1, 0.3, 1.0)),
    (replace(INPUT_PROJECTION, lr=LR), (1.0, 3.0, 10.0, 30.0, 100.0)),
)


@dataclass(frozen=True)
class Cell:
    """What one strength reached on one network.

    Attributes:
        network: Key of `NETWORKS`.
        method: With its strength.
        acc: ACC on the test split, by seed.
        learning_accuracy: Likewise.
    """

    network: str
    method: Protected | Projecting
    acc: tuple[float, ...]
    learning_accuracy: tuple[float, ...]


def candidates() -> list[Protected | Projecting]:
    """Return every method with each of its strengths."""
    return [replace(method, strength=value) for method, values in METHODS for value in values]


def measure(
    data: Task, seeds: int, on_cell: Callable[[str, Method], None] = lambda network, method: None
) -> list[Cell]:
    """Train each candidate on each network with each seed.

    Args:
        data: The digits.
        seeds: How many, from 0.
        on_cell: Called before each cell.

    Raises:
        DivergedError: Training failed.
    """
    cells = []
    for network, experiment in NETWORKS.items():
        scenarios = [experiment.build(data, experiment.config.tasks, s) for s in range(seeds)]
        for method in candidates():
            on_cell(network, method)
            matrices = [
                train(method, scenario, experiment.config, seed).matrix
                for seed, scenario in enumerate(scenarios)
            ]
            acc = tuple(metrics.acc(r) for r in matrices)
            learning = tuple(metrics.learning_accuracy(r) for r in matrices)
            cells.append(Cell(network, method, acc, learning))
    return cells


def render(cells: Sequence[Cell], table_box: box.Box = box.SIMPLE_HEAD) -> RenderableType:
    """Return a table for each method: networks down, strengths across."""
    seeds = len(cells[0].acc)
    parts: list[RenderableType] = [
        Text(
            f"ACC on the test split in per cent (learning accuracy), mean over seeds 0 to "
            f"{seeds - 1}, ± half of the 95 % interval; lr = {LR:g} everywhere, nothing is chosen. "
            "The last column is what the middle strength, the one to begin with, loses to the best "
            "of its row."
        )
    ]
    for method, values in METHODS:
        parts += [
            Text(),
            _table([c for c in cells if c.method.key == method.key], values, table_box),
        ]
    return Group(*parts)


def _table(cells: Sequence[Cell], values: Sequence[float], table_box: box.Box) -> Table:
    headers = [f"strength {value:g}" for value in values]
    table = number_table(table_box, cells[0].method.label, *headers, "Middle\n− best")
    for network in dict.fromkeys(cell.network for cell in cells):
        row = [cell for cell in cells if cell.network == network]
        means = [Interval.of(cell.acc).mean for cell in row]
        shown = [
            f"{in_percent(Interval.of(cell.acc))} "
            f"({100 * Interval.of(cell.learning_accuracy).mean:.1f})"
            for cell in row
        ]
        loss = 100 * (means[len(means) // 2] - max(means))
        table.add_row(network, *shown, f"{loss:+.1f}" if loss else "0")
    return table


def write(cells: Sequence[Cell], directory: Path) -> list[Path]:
    """Write ``strength.json`` and ``strength.md`` into an existing directory."""
    record = {
        "lr": LR,
        "cells": [
            {
                "network": cell.network,
                "method": cell.method.key,
                "strength": cell.method.strength,
                "acc": cell.acc,
                "learning_accuracy": cell.learning_accuracy,
            }
            for cell in cells
        ],
    }
    return tables.write(directory, "strength", record, render(cells, box.MARKDOWN))
