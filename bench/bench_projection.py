"""One GEM projection with 10 memories on the CPU, against how others compute it.

All rows are given and violated about half the time, as in training. "Between refreshes" is what a
step of `GEM` costs when Q is known: c, the quadratic program, g + Gᵀv. The floor reads every row
once. GPT-2's 124 M weights; set P to try others.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from peers import avalanche, published, torchjd
from suite import Contender, Question
from torch import Tensor

from cl_optim import functional as F
from cl_optim.ops import gram, nnqp

ROWS = 10
SIZES = [int(number) for number in os.environ.get("P", "8_000_000 124_000_000").split()]


class Problem:
    """A gradient, memory rows that are in conflict with it, and what GEM keeps of the rows."""

    def __init__(self, parameters: int) -> None:
        # Norms near 10. (At norms of 1e4 quadprog finds the constraints inconsistent.)
        self.memory = torch.randn(ROWS, parameters).mul_(10 / parameters**0.5)
        self.grad = torch.randn(parameters).mul_(10 / parameters**0.5)
        for row in self.memory[::2]:
            self.grad.sub_(row, alpha=0.3)
        products = gram.gram_per_tensor([self.memory], [self.grad])
        self.gram = products[:, :ROWS, :ROWS].contiguous()
        self.state = nnqp.new_state(1, ROWS)


def recomputed(problem: Problem) -> Tensor:
    return F.gem_project(problem.grad, problem.memory)[0]


def between_refreshes(problem: Problem) -> Tensor:
    grad = problem.grad.clone()
    linear = gram.dots_per_tensor([problem.memory], [grad])[:, :ROWS]
    v = nnqp.nnqp(problem.gram, linear, only_violated=True, state=problem.state).v
    gram.combine_([grad], [problem.memory], v, [0])
    return grad


Project = Callable[[Problem], Tensor]


def on(project: Project) -> Callable[[Problem], Callable[[], Tensor]]:
    return lambda problem: lambda: project(problem)


def of(project: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Problem], Callable[[], Tensor]]:
    return on(lambda problem: project(problem.grad, problem.memory))


OURS = "cl_optim, rows recomputed"
QUESTION = Question(
    problems={
        f"GEM projection, {ROWS} rows of {size / 1e6:.0f} M": (lambda size=size: Problem(size), 1)
        for size in SIZES
    },
    once=tuple(
        f"GEM projection, {ROWS} rows of {size / 1e6:.0f} M" for size in SIZES if size > 1e8
    ),
    contenders={
        OURS: Contender(on(recomputed), "ours"),
        "cl_optim, between refreshes": Contender(on(between_refreshes), "variant"),
        "published (float64 on the host, quadprog)": Contender(
            of(published.project), "peer", "quadprog"
        ),
        "Avalanche's GEM": Contender(of(avalanche.project), "peer", "avalanche"),
        "TorchJD DualProj": Contender(of(torchjd.project), "peer", "torchjd"),
        "TorchJD UPGrad": Contender(of(torchjd.upgrad), "other", "torchjd"),
        "every row read once": Contender(on(lambda problem: problem.memory.sum()), "floor"),
    },
    reference=OURS,
    base="every row read once",
    turns=3,
    tolerance=1e-3,  # TorchJD normalizes and regularizes
)


def test_projection(ask: Callable[[], None]) -> None:
    ask()
