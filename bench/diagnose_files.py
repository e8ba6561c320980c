"""Time and memory of `diagnose` on two generated files.

    python bench/diagnose_files.py [MB] [--json FILE]

Lines of 20 words, whose ranks have a Zipf distribution of exponent 1.3 and go to 10⁷.
"""

from __future__ import annotations

import resource
import tempfile
import time
from pathlib import Path

import cost_figures
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
    parser = records.parser(__doc__)
    parser.add_argument("megabytes", type=int, nargs="?", default=500, help="of each file")
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
    figures = {
        "megabytes": arguments.megabytes,
        "seconds": seconds,
        "peaks": [before, peak()],
        "vocabulary": found.vocabulary,
        "uncounted": found.uncounted,
    }
    print(cost_figures.diagnose_numbers(figures))
    records.write(arguments.json, figures)


if __name__ == "__main__":
    main()
