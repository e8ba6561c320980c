"""The table of the retention scenario: what replay and growing networks cost, and transfer."""

from __future__ import annotations

from rich import box
from rich.console import RenderableType
from rich.table import Table

from cl_optim.demo import metrics, report
from cl_optim.demo.metrics import Interval, Matrix
from cl_optim.demo.report import Results, in_percent, number_table, settings_of, with_interval

_DEFINITIONS = (
    " FWT: accuracy just before learning a task minus the untrained network's (eq. 4); every task "
    "has a head of its own here, untrained at both times, so that nothing but chance is expected. "
    "Replay fills half of each batch with the samples that GEM keeps. Progressive: a frozen column "
    "of the same width for each task, with lateral adapters at the head. Seconds: of all steps and "
    "ends of tasks."
)


def render(results: Results, table_box: box.Box) -> RenderableType:
    """Return the demo's tables and sentences, with this one in place of its own."""
    return report.render(results, table_box, _table, _DEFINITIONS)


def _table(results: Results, table_box: box.Box) -> Table:
    headers = ("lr", "λ", "ACC", "BWT", "FWT", "Learning\nacc.", "Parameters", "Seconds")
    table = number_table(table_box, "Method", *headers)
    for method in results.methods:
        runs = results.of(method)
        transfer = Interval.of([fwt(run.matrix, run.initial) for run in runs])
        table.add_row(
            *settings_of(method),
            in_percent(results.interval(method, metrics.acc)),
            "" if method.joint else in_percent(results.interval(method, metrics.bwt), signed=True),
            "" if method.joint else in_percent(transfer, signed=True),
            "" if method.joint else in_percent(results.interval(method, metrics.learning_accuracy)),
            f"{runs[0].parameters:,}",
            with_interval(Interval.of([run.seconds for run in runs]), ".2f"),
        )
    return table


def fwt(r: Matrix, initial: Matrix) -> float:
    """Return forward transfer: accuracy just before learning, minus the untrained network's.

    Lopez-Paz & Ranzato 2017, eq. 4: the mean over the T−1 tasks after the first; ``initial`` is
    [T]. Where each task has a head of its own, that head is untrained at both times.
    """
    return float((r.diagonal(1) - initial[1:]).mean()) if len(r) > 1 else 0.0
