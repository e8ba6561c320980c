"""What ``cl-optim demo`` does, with its progress bar."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from cl_optim.demo import report, sweep
from cl_optim.demo.experiments import Experiment
from cl_optim.demo.report import Results
from cl_optim.demo.scenarios import Task
from cl_optim.demo.sweep import Score
from cl_optim.demo.train import Run, one_thread, train


def run_demo(
    experiment: Experiment, data: Task, seeds: int, out: Path, console: Console
) -> Results:
    """Train every method with every seed; print the tables, write them and the picture.

    Args:
        experiment: What to run.
        data: Its data.
        seeds: How many; they are 0, 1, ...
        out: An existing directory.
        console: Where to print.
    """
    runs: list[Run] = []
    with one_thread(), progress_bar(console) as progress:
        bar = progress.add_task("", total=seeds * len(experiment.methods))
        for seed in range(seeds):
            scenario = experiment.build(data, experiment.config.tasks, seed)
            # Methods take turns, so that a slow moment of the machine meets all of them.
            for method in experiment.methods:
                progress.update(bar, description=f"seed {seed}: {method.label}")

                def advance(fraction: float, done: int = len(runs)) -> None:
                    progress.update(bar, completed=done + fraction)

                runs.append(train(method, scenario, experiment.config, seed, on_progress=advance))
    results = Results(experiment, tuple(runs))
    console.print(report.render(results))
    announce(report.write(results, out), console)
    return results


def run_sweep(
    experiment: Experiment, data: Task, seeds: int, out: Path, console: Console
) -> list[Score]:
    """Score every candidate on the validation split; print and write the grids and the choice.

    Args:
        experiment: Whose settings to choose.
        data: Its data.
        seeds: How many; they begin at ``sweep.FIRST_SEED``.
        out: An existing directory.
        console: Where to print.
    """
    candidates = [method for grid in experiment.grids for method in grid.candidates()]
    scores = []
    with one_thread(), progress_bar(console) as progress:
        bar = progress.add_task("", total=len(candidates))
        for method in candidates:
            progress.update(bar, description=f"{method.label}, lr={method.lr:g}")
            scores.append(sweep.score(method, experiment, data, seeds))
            progress.advance(bar)
    console.print(report.render_sweep(experiment, scores, seeds))
    announce(report.write_sweep(experiment, scores, seeds, out), console)
    return scores


@contextmanager
def progress_bar(console: Console) -> Iterator[Progress]:
    """A bar that goes away at the end."""
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield progress


def announce(paths: list[Path], console: Console) -> None:
    """Say what has been written."""
    console.print(
        "Written: " + ", ".join(str(path) for path in paths), highlight=False, soft_wrap=True
    )
