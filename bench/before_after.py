"""Time of EWCAdamW's step in two checkouts: did a change make it slower?

    python bench/before_after.py ../checkout-before [--turns 9]

Both need their extension built in place. They take turns, a process each, in changing order. A turn
is the mean of the fastest tenth of its steps. Shown are the ratio of both checkouts' fastest turns,
which the machine's other work disturbs least, and the median of the turns' ratios with their
quartiles.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parents[1]
ROUNDS = {"GPT-2 144 tensors 85 M": 15, "1000 tensors of 64": 150, "MLP 64-256-256-10": 400}


def measure() -> dict[str, float]:
    """Seconds of the fastest steps for each set of tensors, in this process's checkout."""
    from bench_step import SETS
    from contenders import CONTENDERS, Problem

    fastest = {}
    for name, rounds in ROUNDS.items():
        step = CONTENDERS["EWCAdamW gradient"](Problem(SETS[name][0]))
        times = []
        for _ in range(rounds + 5):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        # On a machine that others use, slower ones are theirs.
        fastest[name] = statistics.mean(sorted(times[5:])[: rounds // 10 + 1])
    return fastest


def measured_in(checkout: Path) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": f"{checkout}:{HERE / 'bench'}"}
    command = [sys.executable, __file__, "--measure"]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(shown.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before", type=Path, nargs="?")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure()))
        return
    turns = []
    for turn in range(arguments.turns):
        order = [arguments.before.resolve(), HERE]
        results = {path: measured_in(path) for path in (order if turn % 2 else order[::-1])}
        turns.append([results[path] for path in order])
    for name in ROUNDS:
        before, after = ([turn[i][name] for turn in turns] for i in (0, 1))
        ratios = [b / a for a, b in zip(before, after, strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        print(
            f"{name}: {min(before) * 1e3:.3f} ms before, {min(after) * 1e3:.3f} ms after, "
            f"{min(after) / min(before):.3f} times as long; of the turns {median:.3f} "
            f"({low:.3f}–{high:.3f})"
        )


if __name__ == "__main__":
    main()
