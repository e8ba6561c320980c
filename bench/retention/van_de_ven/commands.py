"""What ``python -m bench.retention van-de-ven`` does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bench.retention import fashion_mnist
from bench.retention.van_de_ven import report, runs
from bench.retention.van_de_ven.scenarios import Name, Setting
from cl_optim.demo.commands import announce, new_console, progress_bar
from cl_optim.demo.train import one_thread


@one_thread()
def run_van_de_ven(
    settings: Mapping[Name, Setting],
    seeds: int,
    data: str,
    folder: Path | None,
    out: Path,
) -> None:
    """Train with van de Ven's EWC and with ours; print and write the tables.

    Raises:
        DataError: The folder has no such data, or its classes cannot be dealt out.
    """
    console, loaded = new_console(), fashion_mnist.load(data, folder)
    with progress_bar(console) as progress:
        bar = progress.add_task("", total=runs.count_runs([*settings], seeds))

        def on_run(what: str) -> None:
            progress.update(bar, description=what, advance=1)

        results = runs.measure(out / "van-de-ven", loaded, settings, seeds, on_run=on_run)
    console.print(report.render(results))
    announce(report.write(results, out), console)
