"""Peak memory of a GEM projection beside its arguments, each contender in its own process."""

from __future__ import annotations

import multiprocessing
import resource

from bench_gem import CONTENDERS, PARAMETERS, ROWS, Problem
from rich import box
from rich.console import Console
from rich.table import Table


def peak_bytes(contender: str) -> float:
    """Bytes of resident memory that a projection adds to what its arguments take."""
    problem = Problem()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    CONTENDERS[contender](problem)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024.0


def main() -> None:
    table = Table(title=f"{ROWS} rows of {PARAMETERS / 1e6:.0f} M, float32", box=box.MARKDOWN)
    table.add_column("")
    table.add_column("peak memory beside the arguments, GB", justify="right")
    context = multiprocessing.get_context("spawn")
    for contender in CONTENDERS:
        with context.Pool(1) as pool:  # a fresh process: the peak is never lowered again
            table.add_row(contender, f"{pool.apply(peak_bytes, (contender,)) / 1e9:.2f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
