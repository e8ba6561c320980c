"""Peak memory of writing and reading an importance log, beyond the importance: Linux only.

    python bench/log_memory.py FOLDER

The importance is 12 tensors of 64 M weights in float32, 256 MB each; the folder takes 3.3 GB.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from log_round_trip import fisher

from cl_optim import ImportanceLog
from cl_optim.importance import codecs

TENSORS, SIDE = 12, 8000


def peak(work: Callable[[], object]) -> float:
    """How much resident memory rose at most during ``work``, in MB."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is the present from here on
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(field))
    return int(line.split()[1]) * 1024 / 1e6


def read(log: ImportanceLog) -> None:
    for value in log.load("task").sums.values():
        del value  # one tensor at a time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="a folder with 4 GB of room")
    folder = parser.parse_args().folder
    generator = torch.Generator().manual_seed(0)
    importance = {f"{i}.weight": fisher((SIDE, SIDE), generator) for i in range(TENSORS)}
    for name in codecs.NAMES:
        with tempfile.TemporaryDirectory(dir=folder) as path:
            log = ImportanceLog(path)
            writing = peak(lambda: log.record("task", importance, codec=name))  # noqa: B023
            reading = peak(lambda: read(log))  # noqa: B023
            mapped = log["task"].nbytes / 1e6
        print(f"{name}: writing {writing:.0f} MB, reading {reading:.0f}, files {mapped:.0f}")


if __name__ == "__main__":
    main()
