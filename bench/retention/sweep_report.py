"""What a sweep prints and writes: its grids, and what was chosen from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from bench.retention import sweep, tables
from bench.retention.grids import Grid
from bench.retention.sweep import Score, choose
from cl_optim.demo.experiments import Experiment
from cl_optim.demo.methods import Method
from cl_optim.demo.report import (
    finite,
    number_table,
    setting_of,
    settings_of,
)


def render(
    experiment: Experiment,
    grids: Sequence[Grid],
    scores: Sequence[Score],
    seeds: int,
    table_box: box.Box = box.SIMPLE_HEAD,
) -> RenderableType:
    """Return the grid of every method with its validation ACC, and what was chosen."""
    chosen = choose(scores, experiment.learning_loss)
    last = sweep.FIRST_SEED + seeds - 1
    parts: list[RenderableType] = [
        Text(
            f"{experiment.name}: validation ACC (learning accuracy) in per cent, mean over seeds "
            f"{sweep.FIRST_SEED} to {last}. Chosen (*): the highest ACC among those whose learning "
            f"accuracy is at most {100 * experiment.learning_loss:.0f} points below AdamW's best."
        )
    ]
    for key in dict.fromkeys(score.method.key for score in scores):
        of_method = [score for score in scores if score.method.key == key]
        parts += [Text(), _grid_table(of_method, chosen.get(key), table_box)]
    parts += [Text(), _chosen_table(experiment, grids, chosen, table_box)]
    return Group(*parts)


def _grid_table(scores: Sequence[Score], best: Method | None, table_box: box.Box) -> Table:
    """Show one method: a row for each learning rate, a column for each λ or strength."""
    settings = dict.fromkeys(setting_of(score.method) for score in scores)
    headers = [setting or "ACC" for setting in settings]
    table = number_table(table_box, scores[0].method.label, *headers)
    for lr in dict.fromkeys(score.method.lr for score in scores):
        cells = [_cell(s, s.method == best) for s in scores if s.method.lr == lr]
        table.add_row(f"lr = {lr:g}", *cells)
    return table


def _cell(score: Score, best: bool) -> str:
    if math.isnan(score.acc):
        return "diverged"
    learning = (
        "" if math.isnan(score.learning_accuracy) else f" ({_points(score.learning_accuracy)})"
    )
    return f"{_points(score.acc)}{learning}{' *' if best else ''}"


def _chosen_table(
    experiment: Experiment, grids: Sequence[Grid], chosen: dict[str, Method], table_box: box.Box
) -> Table:
    table = number_table(table_box, "Chosen", "lr", "λ", "in experiments.py", "note")
    for method in experiment.methods:
        best = chosen.get(method.key)
        if best is None:
            table.add_row(method.label, "", "", "", "no candidate learns well enough")
            continue
        edges = sweep.at_edge(best, grids)
        table.add_row(
            *settings_of(best),
            "the same" if best == method else " ".join(settings_of(method)[1:]),
            f"{' and '.join(edges)} at the edge of the grid" if edges else "",
        )
    return table


def _points(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def write(
    experiment: Experiment,
    grids: Sequence[Grid],
    scores: Sequence[Score],
    seeds: int,
    directory: Path,
) -> list[Path]:
    """Write JSON and Markdown named after the experiment into an existing directory."""
    chosen = choose(scores, experiment.learning_loss)
    record = {
        "experiment": experiment.name,
        "seeds": list(range(sweep.FIRST_SEED, sweep.FIRST_SEED + seeds)),
        "scores": [
            {
                "method": asdict(score.method),
                "acc": finite(score.acc),
                "learning_accuracy": finite(score.learning_accuracy),
            }
            for score in scores
        ],
        "chosen": {key: asdict(method) for key, method in chosen.items()},
    }
    table = render(experiment, grids, scores, seeds, box.MARKDOWN)
    return tables.write(directory, f"sweep-{experiment.key}", record, table, width=200)
