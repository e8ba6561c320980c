"""What ``cl-optim demo`` does, with its progress bar."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from cl_optim import ImportanceLog
from cl_optim.demo import report, sweep
from cl_optim.demo.experiments import EWC_GRADIENT, Experiment
from cl_optim.demo.report import Results
from cl_optim.demo.scenarios import Task
from cl_optim.demo.sweep import Score
from cl_optim.demo.train import Run, one_thread, train

_LOGGED = EWC_GRADIENT.key


def run_demo(
    experiment: Experiment, data: Task, seeds: int, out: Path, console: Console
) -> Results:
    """Train every method with every seed; print the tables, write them and the picture.

    Of the permuted tasks, EWC's run with the first seed leaves an importance log and its report.

    Args:
        experiment: What to run.
        data: Its data.
        seeds: How many; they are 0, 1, ...
        out: An existing directory.
        console: Where to print.
    """
    runs: list[Run] = []
    log = _new_log(out / f"{experiment.key}-log") if experiment.scenario == "permuted" else None
    with one_thread(), progress_bar(console) as progress:
        bar = progress.add_task("", total=seeds * len(experiment.methods))
        for seed in range(seeds):
            scenario = experiment.build(data, experiment.config.tasks, seed)
            # Methods take turns, so that a slow moment of the machine meets all of them.
            for method in experiment.methods:
                progress.update(bar, description=f"seed {seed}: {method.label}")

                def advance(fraction: float, done: int = len(runs)) -> None:
                    progress.update(bar, completed=done + fraction)

                recorded = log if (seed, method.key) == (0, _LOGGED) else None
                runs.append(
                    train(method, scenario, experiment.config, seed, "test", advance, recorded)
                )
    results = Results(experiment, tuple(runs))
    console.print(report.render(results))
    written = report.write(results, out)
    if log is not None and log.tasks:
        page = out / f"{experiment.key}-importance.html"
        log.report(page)
        written += [log.path, page]
    announce(written, console)
    return results


def _new_log(path: Path) -> ImportanceLog:
    """A log in place of an earlier demo's."""
    if path.exists():
        ImportanceLog(path, mode="r")  # refuses what is no log
        shutil.rmtree(path)
    return ImportanceLog(path)


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
