"""What the commands of ``python -m bench.retention`` do, but for those on texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich import box

from bench.retention import (
    avalanche,
    budget,
    experiments,
    optimizers,
    published,
    retention_table,
    strength,
    sweep,
    sweep_report,
    tables,
)
from bench.retention.fashion_mnist import fashion_mnist, load
from bench.retention.grids import GRIDS, sweep_seeds
from bench.retention.sweep import Score
from cl_optim.demo import report
from cl_optim.demo.commands import announce, check, new_console, progress_bar, run_demo
from cl_optim.demo.experiments import Experiment
from cl_optim.demo.methods import Method
from cl_optim.demo.report import Results
from cl_optim.demo.scenarios import DataError, Task, digits
from cl_optim.demo.train import one_thread


@dataclass(frozen=True)
class Choice:
    """What a command is to run.

    Attributes:
        scenarios: Names of scenarios.
        data: ``"digits"`` or ``"fashion-mnist"``.
        folder: Of Fashion-MNIST's files; None: where Debian, else torchvision, puts them.
        tasks: How many; None: the experiment's number, and so of the next two.
        epochs: Per task.
        seeds: How many.
        out: An existing directory.
    """

    scenarios: Sequence[str]
    data: str
    folder: Path | None
    tasks: int | None
    epochs: int | None
    seeds: int | None
    out: Path

    def experiments(self) -> list[Experiment]:
        """Return the experiments.

        Raises:
            DataError: There is none for a scenario.
        """
        known = {e.scenario: e for e in experiments.EXPERIMENTS[self.data]}
        for scenario in self.scenarios:
            if scenario not in known:
                raise DataError(f"there is no scenario {scenario} for --data {self.data}.")
        return [known[scenario].resized(self.tasks, self.epochs) for scenario in self.scenarios]

    def load(self) -> Task:
        """Return the data.

        Raises:
            DataError: They are not there, or damaged.
        """
        return digits() if self.data == "digits" else fashion_mnist(self.folder)


def run(choice: Choice) -> list[Results]:
    """Train every method of the experiments; print, write and draw the results.

    Raises:
        DataError: There is no such experiment, or its data are not there, or not what is needed.
        DivergedError: Training failed.
        LogError: Something that is no log stands where the log of an experiment would.
    """
    chosen, data, console = choice.experiments(), choice.load(), new_console()
    check(chosen, data)
    return [
        run_demo(
            experiment,
            data,
            choice.seeds or experiment.seeds,
            choice.out,
            console,
            retention_table.render if experiment.scenario == "retention" else report.render,
        )
        for experiment in chosen
    ]


@one_thread()
def run_published(choice: Choice) -> None:
    """Run likewise, and print and write published figures beside those that were measured."""
    results = run(choice)
    console = new_console()
    console.print(published.table(results))
    path = choice.out / f"published-{choice.data}.md"
    tables.write_page(published.table(results, box.MARKDOWN), path)
    announce([path], console)


def run_sweeps(choice: Choice) -> None:
    """Choose settings anew; print and write the grids and the choice.

    Raises:
        DataError: As in `run`, or the experiment has no sweep.
    """
    chosen, data = choice.experiments(), choice.load()
    for experiment in chosen:
        if experiment.key not in GRIDS:
            raise DataError(
                f"scenario {experiment.scenario} has no sweep: its settings are another's."
            )
    check(chosen, data)
    for experiment in chosen:
        _sweep(experiment, data, choice.seeds or sweep_seeds(experiment), choice.out)


@one_thread()
def _sweep(experiment: Experiment, data: Task, seeds: int, out: Path) -> None:
    """Score every candidate on the validation split."""
    grids, console = GRIDS[experiment.key], new_console()
    candidates = [method for grid in grids for method in grid.candidates()]
    scores: list[Score] = []
    with progress_bar(console) as progress:
        bar = progress.add_task("", total=len(candidates))
        for method in candidates:
            progress.update(bar, description=f"{method.label}, lr={method.lr:g}")
            scores.append(sweep.score(method, experiment, data, seeds))
            progress.advance(bar)
    console.print(sweep_report.render(experiment, grids, scores, seeds))
    announce(sweep_report.write(experiment, grids, scores, seeds, out), console)


@one_thread()
def run_strength(seeds: int, out: Path) -> None:
    """Try every strength on every network; print and write the tables.

    Raises:
        DivergedError: Training failed.
    """
    data, console = digits(), new_console()
    with progress_bar(console) as progress:
        bar = progress.add_task("", total=len(strength.NETWORKS) * len(strength.candidates()))

        def on_cell(network: str, method: Method) -> None:
            progress.update(bar, description=f"{network}: {method.label}", advance=1)

        cells = strength.measure(data, seeds, on_cell)
    console.print(strength.render(cells))
    announce(strength.write(cells, out), console)


@one_thread()
def run_budget(seeds: int, out: Path) -> None:
    """Run every pair of tasks with every budget; print and write the table."""
    console = new_console()
    with progress_bar(console) as progress:
        total = len(budget.PAIRS) * seeds * (1 + 2 * len(budget.BUDGETS))
        bar = progress.add_task("budgets", total=total)
        runs = budget.measure(seeds, on_run=partial(progress.advance, bar))
    console.print(budget.render(runs))
    announce(budget.write(runs, out), console)


@one_thread()
def run_optimizers(seeds: int, out: Path) -> None:
    """Train under each optimizer; print and write the table."""
    data, console = digits(), new_console()
    with progress_bar(console) as progress:
        total = sum(len(methods) + 1 for methods in optimizers.candidates())
        bar = progress.add_task("optimizers", total=total)
        rows = optimizers.measure(data, seeds, on_run=partial(progress.advance, bar))
    console.print(optimizers.render(rows))
    announce(optimizers.write(rows, out), console)


@one_thread()
def run_avalanche(
    seeds: int, name: str, folder: Path | None, inners: Sequence[avalanche.Inner], out: Path
) -> None:
    """Train with Avalanche's plugins and with ours; print and write the tables.

    Raises:
        DataError: The folder has no such data.
        ModuleNotFoundError: Avalanche is not installed.
    """
    console, setting = new_console(), avalanche.Setting()
    data = load(name, folder)
    with progress_bar(console) as progress:
        total = avalanche.count_runs(seeds, avalanche.SWEEP_SEEDS, inners)
        bar = progress.add_task("", total=total)

        def on_run(what: str) -> None:
            progress.update(bar, description=what, advance=1)

        results = avalanche.measure(
            out / "avalanche", data, setting, seeds, avalanche.SWEEP_SEEDS, inners, on_run=on_run
        )
    console.print(avalanche.render(results))
    announce(avalanche.write(results, out), console)
