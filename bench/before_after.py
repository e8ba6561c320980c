"""Time of the step, the projection, the Fisher and the log in two checkouts: did a change cost any?

    python bench/before_after.py ../checkout-before [--turns 100] [--only Fisher]

Both need their extension built in place. A process for each takes turns with the other, a fraction
of a second at a time, so that both meet the same machine. A turn is its fastest call; shown are the
median of the turns' ratios, with their quartiles, and the ratio of the fastest turns.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

HERE = Path(__file__).parents[1]
Work = Callable[[], object]


def step(problem: str) -> Work:
    """EWCAdamW's step in its default form."""
    from bench_step import SETS
    from contenders import CONTENDERS, Problem

    return CONTENDERS["EWCAdamW gradient"](Problem(SETS[problem][0]))


def projection() -> Work:
    """A step of GEM with ten memories around SGD, without refreshing them."""
    from cl_optim import GEM

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256))
    x = torch.randn(32, 256)
    optimizer = GEM(torch.optim.SGD(model.parameters(), lr=1e-3))
    for task in range(10):
        target = torch.randn(32, 256)
        optimizer.remember(
            f"task {task}",
            lambda target=target: F.mse_loss(model(x), target).backward(),
            refresh_every=10**6,
        )
    F.mse_loss(model(x), torch.randn(32, 256)).backward()
    return optimizer.step


def fisher(problem: str, contender: str) -> Work:
    """One batch's Fisher, in a pass of its own or beside the gradients of training."""
    from fisher_contenders import CONTENDERS, PROBLEMS

    torch.manual_seed(0)
    return CONTENDERS[contender](PROBLEMS[problem]())


def log() -> Work:
    """A record of 8.4 M weights in 100 tensors, written in one byte each, made durable and read."""
    from cl_optim import ImportanceLog

    folder = tempfile.TemporaryDirectory()
    importance = {f"layer.{i}": torch.rand(128, 656) for i in range(100)}
    numbers = itertools.count()

    def work(folder: tempfile.TemporaryDirectory[str] = folder) -> None:
        path = Path(folder.name) / str(next(numbers))
        ImportanceLog(path).record("task", importance, codec="log8")
        list(ImportanceLog(path).load("task").sums.values())
        shutil.rmtree(path)

    return work


# With the calls of a turn.
WORK: dict[str, tuple[int, Callable[[], Work]]] = {
    "step, GPT-2 144 tensors 85 M": (5, partial(step, "GPT-2 144 tensors 85 M")),
    "step, 1000 tensors of 64": (50, partial(step, "1000 tensors of 64")),
    "step, MLP 64-256-256-10": (400, partial(step, "MLP 64-256-256-10")),
    "GEM step, 10 memories": (100, projection),
    "Fisher, MLP": (
        20, partial(fisher, "MLP 64-256-256-10, 256 samples", "cl_optim, a pass of its own"),
    ),
    "Fisher, transformer 1.1 M": (
        2, partial(fisher, "Transformer 1.1 M, 16 sequences of 64", "cl_optim, during training"),
    ),
    "log, 8.4 M weights": (2, log),
}  # fmt: skip


def serve() -> None:
    """Answer each name of a work with the seconds of its fastest call in this checkout."""
    made: dict[str, Work] = {}
    for line in sys.stdin:
        name = line.strip()
        calls, make = WORK[name]
        if name not in made:
            made[name] = make()
        times = []
        for _ in range(calls):
            start = time.perf_counter()
            made[name]()
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
    parser.add_argument("--only", default="", help="works whose name begins so")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
        return
    sides = [Checkout(arguments.before.resolve()), Checkout(HERE)]
    for name in WORK:
        if not name.startswith(arguments.only):
            continue
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
