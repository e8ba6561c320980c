"""One GEM projection with 10 memories: ours, the published host path, TorchJD's DualProj.

All rows are given and violated about half the time, as in training. "Between refreshes" is what a
step of `GEM` costs when Q is known: c, the quadratic program, g + Gᵀv. The floor reads every row
once. The contenders take turns, as in bench_step.py. P is GPT-2's, 124 M; set P to try less.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from gem_peers import published, torchjd
from torch import Tensor

from cl_optim import functional as F
from cl_optim.ops import gram, nnqp

ROWS, PARAMETERS = 10, int(os.environ.get("P", "124_000_000"))
TURNS = 3
BASES = ["floor: every row read once", "cl_optim, rows recomputed"]


class Problem:
    """A gradient, memory rows that are in conflict with it, and what GEM keeps of the rows."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        # Norms near 10. (At norms of 1e4 quadprog finds the constraints inconsistent.)
        self.memory = torch.randn(ROWS, PARAMETERS).mul_(10 / PARAMETERS**0.5)
        self.grad = torch.randn(PARAMETERS).mul_(10 / PARAMETERS**0.5)
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


CONTENDERS: dict[str, Callable[[Problem], Tensor | None]] = {
    "cl_optim, rows recomputed": recomputed,
    "cl_optim, between refreshes": between_refreshes,
    "published (float64 on the host, quadprog)": lambda p: published(p.grad, p.memory),
    "TorchJD DualProj": lambda p: torchjd(p.grad, p.memory),
    "floor: every row read once": lambda p: p.memory.sum(),
}


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem()


def test_all_agree(problem) -> None:
    expected = published(problem.grad, problem.memory)
    for project in list(CONTENDERS.values())[:2]:
        assert (project(problem) - expected).abs().max() < 1e-4 * problem.grad.abs().max()


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("turn", range(TURNS))
def test_projection(benchmark, problem, turn, contender) -> None:
    benchmark.group = f"GEM projection, {ROWS} rows of {PARAMETERS / 1e6:.0f} M"
    benchmark.extra_info.update(turn=turn, contender=contender, bases=BASES)
    benchmark.pedantic(CONTENDERS[contender], args=(problem,), rounds=1, warmup_rounds=1)
