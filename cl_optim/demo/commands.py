"""What ``cl-optim demo`` does, with its progress bar."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich import box
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from cl_optim import ImportanceLog
from cl_optim.demo import experiments, picture, report
from cl_optim.demo.experiments import EWC_GRADIENT, Experiment
from cl_optim.demo.report import Results
from cl_optim.demo.scenarios import Task, digits
from cl_optim.demo.train import Run, one_thread, train

_LOGGED = EWC_GRADIENT.key


def demo(
    scenario: str, tasks: int | None, epochs: int | None, seeds: int | None, out: Path
) -> None:
    """Run the experiments of a scenario, or those of both.

    Args:
        scenario: ``"permuted"``, ``"split"`` or ``"both"``.
        tasks: How many; None: the experiment's number, and so of the next two.
        epochs: Per task.
        seeds: How many.
        out: An existing directory.

    Raises:
        DataError: The classes cannot be dealt out to so many tasks.
        DivergedError: Training failed.
        LogError: Something that is no log stands where the log would.
    """
    data, console = digits(), new_console()
    chosen = [
        experiment.resized(tasks, epochs)
        for experiment in experiments.EXPERIMENTS
        if scenario in ("both", experiment.scenario)
    ]
    check(chosen, data)
    for experiment in chosen:
        run_demo(experiment, data, seeds or experiment.seeds, out, console)


def check(chosen: Sequence[Experiment], data: Task) -> None:
    """Build each scenario once, so that what cannot be built is refused before any training.

    Raises:
        DataError: The classes cannot be dealt out to so many tasks.
    """
    for experiment in chosen:
        experiment.build(data, experiment.config.tasks, 0)


@one_thread()
def run_demo(
    experiment: Experiment,
    data: Task,
    seeds: int,
    out: Path,
    console: Console,
    render: Callable[[Results, box.Box], RenderableType] = report.render,
) -> Results:
    """Train every method with every seed; print the tables, write them and the picture.

    Of the permuted tasks, EWC's run with the first seed leaves an importance log and its report.

    Args:
        experiment: What to run.
        data: Its data.
        seeds: How many; they are 0, 1, ...
        out: An existing directory.
        console: Where to print.
        render: Makes tables and sentences of the results.
    """
    runs: list[Run] = []
    log = _new_log(out / f"{experiment.key}-log") if experiment.scenario == "permuted" else None
    with progress_bar(console) as progress:
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
    console.print(render(results, box.SIMPLE_HEAD))
    written = write(results, out, render)
    if log is not None and log.tasks:
        page = out / f"{experiment.key}-importance.html"
        log.report(page)
        written += [log.path, page]
    announce(written, console)
    return results


def _new_log(path: Path) -> ImportanceLog:
    """Begin a log in place of an earlier demo's."""
    if path.exists():
        ImportanceLog(path, mode="r")  # refuses what is no log
        shutil.rmtree(path)
    return ImportanceLog(path)


def new_console() -> Console:
    """Return where to print: the terminal, or as wide as the tables are."""
    console = Console()
    if not console.is_terminal:
        console.width = report.WIDTH
    return console


@contextmanager
def progress_bar(console: Console) -> Iterator[Progress]:
    """Show a bar that goes away at the end."""
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


def write(
    results: Results, folder: Path, render: Callable[[Results, box.Box], RenderableType]
) -> list[Path]:
    """Write JSON, Markdown and a PNG named after the experiment into an existing folder."""
    paths = [folder / f"{results.experiment.key}.{kind}" for kind in ("json", "md", "png")]
    paths[0].write_text(json.dumps(report.to_json(results)) + "\n", encoding="utf-8")
    report.write_markdown(render(results, box.MARKDOWN), paths[1])
    picture.draw(results, paths[2])
    return paths
