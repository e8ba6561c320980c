"""Time of EWCAdamW's step in two checkouts: did a change make it slower?

    python bench/before_after.py ../checkout-before [--turns 100]

Both need their extension built in place. A process for each takes turns with the other, a fraction
of a second at a time, so that both meet the same machine. A turn is its fastest step; shown are the
median of the turns' ratios, with their quartiles, and the ratio of the fastest turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parents[1]
STEPS = {"GPT-2 144 tensors 85 M": 5, "1000 tensors of 64": 50, "MLP 64-256-256-10": 400}


def serve() -> None:
    """Answer each name of a set with the seconds of its fastest step in this process's checkout."""
    from bench_step import SETS
    from contenders import CONTENDERS, Problem

    steps = {name: CONTENDERS["EWCAdamW gradient"](Problem(SETS[name][0])) for name in STEPS}
    for line in sys.stdin:
        name = line.strip()
        times = []
        for _ in range(STEPS[name]):
            start = time.perf_counter()
            steps[name]()
            times.append(time.perf_counter() - start)
        print(min(times), flush=True)


class Checkout:
    """A process that measures in a checkout."""

    def __init__(self, path: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": f"{path}:{HERE / 'bench'}"}
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def seconds(self, name: str) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(name, file=self._process.stdin, flush=True)
        return float(self._process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before", type=Path, nargs="?")
    parser.add_argument("--turns", type=int, default=100)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
        return
    sides = [Checkout(arguments.before.resolve()), Checkout(HERE)]
    for name in STEPS:
        for side in sides:
            side.seconds(name)  # warms up
        before, after = [], []
        for turn in range(arguments.turns):
            order = sides if turn % 2 else sides[::-1]
            taken = {side: side.seconds(name) for side in order}
            before.append(taken[sides[0]])
            after.append(taken[sides[1]])
        ratios = [b / a for a, b in zip(before, after, strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        print(
            f"{name}: {statistics.median(before) * 1e3:.3f} ms before, "
            f"{statistics.median(after) * 1e3:.3f} ms after, {median:.3f} times as long "
            f"({low:.3f}–{high:.3f}); fastest turns {min(after) / min(before):.3f}"
        )


if __name__ == "__main__":
    main()
