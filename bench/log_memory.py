"""Peak memory of writing and reading an importance log, beyond the importance: Linux only.

    python bench/log_memory.py FOLDER [--json FILE]

The importance is 12 tensors of 64 M weights in float32, 256 MB each; the folder takes 3.3 GB.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import cost_figures
import records
import torch
from log_round_trip import fisher
from suite import Work, peak_bytes

from cl_optim import ImportanceLog
from cl_optim.importance import codecs

TENSORS, SIDE = 12, 8000


def megabytes(work: Work) -> float:
    peak = peak_bytes(work)
    if peak is None:
        raise SystemExit("The peak of a process's memory is told by Linux: run this there.")
    return peak / 1e6


def read(log: ImportanceLog) -> None:
    for value in log.load("task").sums.values():
        del value  # one tensor at a time


def main() -> None:
    parser = records.parser(__doc__)
    parser.add_argument("folder", type=Path, help="a folder with 4 GB of room")
    arguments, made = parser.parse_args(), {}
    generator = torch.Generator().manual_seed(0)
    importance = {f"{i}.weight": fisher((SIDE, SIDE), generator) for i in range(TENSORS)}
    for name in codecs.NAMES:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as path:
            log = ImportanceLog(path)
            writing = megabytes(lambda: log.record("task", importance, codec=name))  # noqa: B023
            reading = megabytes(lambda: read(log))  # noqa: B023
            mapped = log["task"].nbytes / 1e6
        made[name] = {"writing": writing, "reading": reading, "mapped": mapped}
    figures = {"megabytes": made}
    cost_figures.show(cost_figures.log_memory(figures))
    records.write(arguments.json, figures)


if __name__ == "__main__":
    main()
