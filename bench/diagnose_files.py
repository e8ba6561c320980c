"""Time and memory of `diagnose` on two generated files.

    python bench/diagnose_files.py [MB] [--json FILE]

Lines of 20 words, whose ranks have a Zipf distribution of exponent 1.3 and go to 10⁷.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import records

from cl_optim.retention import diagnose, read_corpus


def write(path: Path, size: int, rng: np.random.Generator) -> None:
    """Lines of 20 words, whose ranks have a Zipf distribution."""
    with path.open("w") as file:
        while file.tell() < size:
            ranks = rng.zipf(1.3, size=(1000, 20)) % 10_000_000
            file.writelines(" ".join(f"w{rank}" for rank in line) + "\n" for line in ranks)


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("megabytes", type=int, nargs="?", default=500, help="of each file")
    parser.add_argument("--json", type=Path, help="where the figures go")
    arguments = parser.parse_args()
    size = 1_000_000 * arguments.megabytes
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        old, new = Path(folder) / "old.txt", Path(folder) / "new.txt"
        write(old, size, rng)
        write(new, size, rng)
        before, start = peak(), time.perf_counter()
        found = diagnose(read_corpus(old), read_corpus(new))
        seconds = time.perf_counter() - start
    after = peak()
    print(f"{seconds:.0f} s, {2e-6 * size / seconds:.1f} MB/s, {before:.0f} → {after:.0f} MB")
    print(f"vocabularies {found.vocabulary}, uncounted {found.uncounted:,}")
    if arguments.json:
        records.write(
            arguments.json, megabytes=arguments.megabytes, seconds=seconds, peaks=[before, after],
            vocabulary=found.vocabulary, uncounted=found.uncounted,
        )  # fmt: skip


if __name__ == "__main__":
    main()
