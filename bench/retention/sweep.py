"""How the settings of the experiments are chosen: ``python -m bench.retention sweep``.

Every candidate is trained with seeds of the sweep's own and judged on the validation split. For
each method the candidate with the highest validation ACC is chosen, among those whose learning
accuracy is at most a few points (``learning_loss``) below the best that AdamW reaches. Without that
condition the choice for AdamW is a learning rate so small that little is learned and so little
forgotten; it has a row of its own in the demo (``adamw-slow``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from bench.retention.grids import Grid
from cl_optim.demo import metrics
from cl_optim.demo.arguments import MAX_SEEDS
from cl_optim.demo.experiments import ADAMW, ADAMW_SLOW, Experiment
from cl_optim.demo.methods import Method, Protected
from cl_optim.demo.scenarios import Task
from cl_optim.demo.train import DivergedError, train

FIRST_SEED = MAX_SEEDS  # the demo reports seeds 0, 1, ...


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


def score(method: Method, experiment: Experiment, data: Task, seeds: int) -> Score:
    """Train a candidate with each of the sweep's seeds and measure on the validation split."""
    config = replace(experiment.config, points=0)
    matrices = []
    for seed in range(FIRST_SEED, FIRST_SEED + seeds):
        scenario = experiment.build(data, config.tasks, seed)
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


def choose(scores: Iterable[Score], learning_loss: float) -> dict[str, Method]:
    """Return the best candidate of each method by the rule above, by the method's key.

    A method is absent where none of its candidates qualifies.

    Args:
        scores: Of all candidates of all methods, AdamW among them.
        learning_loss: The learning accuracy that may be lost.
    """
    finite = [s for s in scores if not math.isnan(s.acc)]
    adamw = [s for s in finite if s.method.key == ADAMW.key]
    floor = max(s.learning_accuracy for s in adamw) - learning_loss
    best: dict[str, Score] = {}
    for s in finite:
        key = s.method.key
        learned = s.method.joint or s.learning_accuracy >= floor
        if learned and (key not in best or s.acc > best[key].acc):
            best[key] = s
    chosen = {key: s.method for key, s in best.items()}
    slow = max(adamw, key=lambda s: s.acc).method
    if slow.lr != chosen[ADAMW.key].lr:
        chosen[ADAMW_SLOW.key] = replace(ADAMW_SLOW, lr=slow.lr)
    return chosen


def at_edge(method: Method, grids: Iterable[Grid]) -> list[str]:
    """Name the settings of a chosen method that are the first or last of their grid."""
    key = ADAMW.key if method.key == ADAMW_SLOW.key else method.key
    grid = next(g for g in grids if g.method.key == key)
    edges = ["lr"] if method.lr in (grid.lrs[0], grid.lrs[-1]) else []
    if grid.strengths:
        if getattr(method, "strength", None) in (grid.strengths[0], grid.strengths[-1]):
            edges.append("strength")
    elif isinstance(method, Protected) and method.ewc_lambda in (grid.lambdas[0], grid.lambdas[-1]):
        edges.append("λ")
    return edges
