"""How the settings in methods.py were chosen: ``cl-optim demo --sweep``.

Every candidate is trained with seeds of the sweep's own and judged on the validation split. For
each method the candidate with the highest validation ACC is chosen, among those whose learning
accuracy is at most 5 points below the best that AdamW reaches. Without that condition the choice
for AdamW is a learning rate so small that little is learned and so little forgotten; it has a row
of its own in the demo (``adamw-slow``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from cl_optim.demo import methods, metrics
from cl_optim.demo.methods import Method, Protected
from cl_optim.demo.scenarios import Task, permuted
from cl_optim.demo.train import Config, DivergedError, train

FIRST_SEED = 1000  # the demo reports seeds 0, 1, ...
SEEDS = 3
MAX_LEARNING_LOSS = 0.05


def powers(first: int, last: int) -> tuple[float, ...]:
    """Powers of √10 from √10^first to √10^last, to two digits."""
    return tuple(float(f"{10 ** (k / 2):.2g}") for k in range(first, last + 1))


@dataclass(frozen=True)
class Grid:
    """The candidates of one method.

    Attributes:
        method: What is varied.
        lrs: Learning rates.
        lambdas: Values of λ; empty for a method that has none.
    """

    method: Method
    lrs: tuple[float, ...]
    lambdas: tuple[float, ...] = ()

    def candidates(self) -> list[Method]:
        """The method with each combination of values."""
        method = self.method
        if not isinstance(method, Protected):
            return [replace(method, lr=lr) for lr in self.lrs]
        return [
            replace(method, lr=lr, ewc_lambda=value) for lr in self.lrs for value in self.lambdas
        ]


GRIDS: tuple[Grid, ...] = (
    Grid(methods.ADAMW, powers(-10, -4)),
    Grid(methods.L2_SP, powers(-7, -4), powers(-6, -1)),
    Grid(methods.EWC_GRADIENT, powers(-6, -3), powers(1, 6)),
    Grid(methods.EWC_DECOUPLED, powers(-7, -4), powers(4, 9)),
    Grid(methods.EWC_PROXIMAL, powers(-6, -3), powers(6, 11)),
    Grid(methods.JOINT, powers(-8, -4)),
)


@dataclass(frozen=True)
class Score:
    """How one candidate did on the validation split.

    Attributes:
        method: The candidate.
        acc: Mean ACC over the seeds; NaN if a run diverged.
        learning_accuracy: Mean learning accuracy; NaN likewise, and for joint training.
    """

    method: Method
    acc: float
    learning_accuracy: float


def score(method: Method, data: Task, config: Config, seeds: int) -> Score:
    """Train a candidate with each of the sweep's seeds and measure on the validation split."""
    config = replace(config, evaluate_every=None)
    matrices = []
    for seed in range(FIRST_SEED, FIRST_SEED + seeds):
        scenario = permuted(data, config.tasks, seed)
        try:
            matrices.append(train(method, scenario, config, seed, held_out="validation").matrix)
        except DivergedError:
            return Score(method, float("nan"), float("nan"))
    return Score(
        method,
        acc=float(np.mean([metrics.acc(r) for r in matrices])),
        learning_accuracy=float("nan")
        if method.joint
        else float(np.mean([metrics.learning_accuracy(r) for r in matrices])),
    )


def choose(scores: Iterable[Score]) -> dict[str, Method]:
    """The best candidate of each method by the rule above, keyed as in ``methods.METHODS``.

    A method is absent where none of its candidates qualifies.

    Args:
        scores: Of all candidates of all methods, AdamW among them.
    """
    finite = [s for s in scores if not math.isnan(s.acc)]
    adamw = [s for s in finite if s.method.key == methods.ADAMW.key]
    floor = max(s.learning_accuracy for s in adamw) - MAX_LEARNING_LOSS
    best: dict[str, Score] = {}
    for s in finite:
        key = s.method.key
        learned = s.method.joint or s.learning_accuracy >= floor
        if learned and (key not in best or s.acc > best[key].acc):
            best[key] = s
    chosen = {key: s.method for key, s in best.items()}
    slow = max(adamw, key=lambda s: s.acc).method
    chosen[methods.ADAMW_SLOW.key] = replace(methods.ADAMW_SLOW, lr=slow.lr)
    return chosen


def at_edge(method: Method) -> list[str]:
    """Which of a chosen method's settings are the first or last of their grid."""
    key = methods.ADAMW.key if method.key == methods.ADAMW_SLOW.key else method.key
    grid = next(g for g in GRIDS if g.method.key == key)
    edges = ["lr"] if method.lr in (grid.lrs[0], grid.lrs[-1]) else []
    if isinstance(method, Protected) and method.ewc_lambda in (grid.lambdas[0], grid.lambdas[-1]):
        edges.append("λ")
    return edges
