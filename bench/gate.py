"""Has a change made something much slower? Ratios of times, measured in turns, each with a limit.

    python bench/gate.py [--turns 15]

A limit is the goal, or what was measured, with room for a machine of another kind; what exceeds it
is measured once more. For a machine with nothing else to do: others disturb torch's threads more
than ours. Takes about two minutes; exits with 1 where a ratio is over its limit.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import NamedTuple

import contenders
import fisher_contenders
import torch
from bench_gram import OURS as GRAM
from bench_gram import QUESTION as PRODUCTS
from bench_gram import READ, SMALL
from bench_step import SETS
from scaling import Work, taken


class Ratio(NamedTuple):
    """What takes how many times as long as what.

    Attributes:
        name: Of both.
        limit: The most that it may be.
        make: Makes both works.
    """

    name: str
    limit: float
    make: Callable[[], tuple[Work, Work]]


def step(problem: str, ours: str) -> Callable[[], tuple[Work, Work]]:
    """Return what makes an optimizer's step, and that of torch's fused AdamW."""

    def make() -> tuple[Work, Work]:
        torch.manual_seed(0)
        shapes = SETS[problem][0]
        both = (contenders.CONTENDERS[name] for name in (ours, "AdamW fused"))
        one, other = (make(contenders.Problem(shapes)) for make in both)
        return one, other

    return make


def fisher(problem: str, ours: str, theirs: str) -> Callable[[], tuple[Work, Work]]:
    """Return what makes one batch's Fisher in a way, and in another."""

    def make() -> tuple[Work, Work]:
        torch.manual_seed(0)
        made = fisher_contenders.PROBLEMS[problem]
        one, other = (fisher_contenders.CONTENDERS[name](made()) for name in (ours, theirs))
        return one, other

    return make


def gram() -> tuple[Work, Work]:
    """Make the products of ten memories with a gradient, and one read of all of them."""
    problem = PRODUCTS.problems[SMALL][0]()
    ours, read = (PRODUCTS.contenders[name].work(problem) for name in (GRAM, READ))
    return ours, read


LAYERS, TENSORS = "GPT-2 144 tensors 85 M", "1000 tensors of 64"
MLP, TRANSFORMER = "MLP 64-256-256-10, 256 samples", "Transformer 1.1 M, 16 sequences of 64"
OWN, PLAIN, LOOP = "cl_optim, a pass of its own", "forward + backward", "loop of batch size 1"
RATIOS = [
    Ratio("EWCAdamW ÷ AdamW, MLP", 1.2, step("MLP 64-256-256-10", "EWCAdamW gradient")),
    Ratio("EWCAdamW ÷ AdamW, 1 000 tensors", 0.6, step(TENSORS, "EWCAdamW gradient")),
    Ratio("EWCAdamW ÷ AdamW, 85 M", 1.7, step(LAYERS, "EWCAdamW gradient")),
    Ratio("EWCAdamW, log8 ÷ AdamW, 85 M", 1.6, step(LAYERS, "EWCAdamW log8")),
    Ratio("EWC(AdamW) ÷ AdamW, 85 M", 2.2, step(LAYERS, "EWC(AdamW fused) proximal")),
    Ratio("Fisher ÷ a loop of batch size 1, MLP", 0.15, fisher(MLP, OWN, LOOP)),
    Ratio("Fisher ÷ forward and backward, transformer", 2.2, fisher(TRANSFORMER, OWN, PLAIN)),
    Ratio("products of ten memories ÷ reading them, 7 M", 12.0, gram),
]


def measure(ratio: Ratio, turns: int) -> float:
    """Return the median over turns, in which both go one after the other."""
    ours, theirs = ratio.make()
    for work in (ours, theirs):
        taken(work)  # warms up
    return statistics.median(taken(ours) / taken(theirs) for _ in range(turns))


def main() -> None:
    """Measure all, those over their limit twice."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--only", default="", help="ratios whose name has this")
    arguments = parser.parse_args()
    failed = []
    for ratio in RATIOS:
        if arguments.only not in ratio.name:
            continue
        found = measure(ratio, arguments.turns)
        if found > ratio.limit:
            found = min(found, measure(ratio, 2 * arguments.turns))
        print(f"{ratio.name}: {found:.2f}, at most {ratio.limit:g}", flush=True)
        if found > ratio.limit:
            failed.append(ratio.name)
    if failed:
        sys.exit(f"slower than its limit: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
