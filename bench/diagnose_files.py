"""Time and memory of `diagnose` on two generated files: ``python bench/diagnose_files.py [MB]``."""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

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
    size = 1_000_000 * int(sys.argv[1] if len(sys.argv) > 1 else 500)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        old, new = Path(folder) / "old.txt", Path(folder) / "new.txt"
        write(old, size, rng)
        write(new, size, rng)
        before, start = peak(), time.perf_counter()
        found = diagnose(read_corpus(old), read_corpus(new))
        seconds = time.perf_counter() - start
    print(f"{seconds:.0f} s, {2e-6 * size / seconds:.1f} MB/s, {before:.0f} → {peak():.0f} MB")
    print(f"vocabularies {found.vocabulary}, uncounted {found.uncounted:,}")


if __name__ == "__main__":
    main()
