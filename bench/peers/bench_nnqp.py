"""A batch of 4 096 quadratic programs with 16 rows, all regular: ours, quadprog, qpth.

The contenders take turns, as in bench_step.py.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gem_peers import qpth, quadprog_loop
from torch import Tensor

from cl_optim import functional as F

PROBLEMS, ROWS, DIMENSIONS = 4096, 16, 64
TURNS = 5


def ours(gram: Tensor, linear: Tensor) -> Tensor:
    return F.nnqp(gram, linear).v


CONTENDERS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int]] = {
    # name: function, rounds per turn
    "cl_optim nnqp": (ours, 20),
    "quadprog in a loop": (quadprog_loop, 2),
    "qpth": (qpth, 1),
}


@pytest.fixture(scope="module")
def problems() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    rows = torch.randn(PROBLEMS, ROWS, DIMENSIONS, dtype=torch.float64)
    grads = torch.randn(PROBLEMS, DIMENSIONS, 1, dtype=torch.float64) - rows.mean(1)[..., None]
    return rows @ rows.mT, (rows @ grads)[..., 0]


def test_all_agree(problems) -> None:
    expected = ours(*problems)
    for solve, _ in CONTENDERS.values():
        assert (solve(*problems) - expected).abs().max() < 1e-6


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("turn", range(TURNS))
def test_batch(benchmark, problems, turn, contender) -> None:
    solve, rounds = CONTENDERS[contender]
    benchmark.group = f"{PROBLEMS} quadratic programs of {ROWS} rows"
    benchmark.extra_info.update(turn=turn, contender=contender)
    benchmark.pedantic(solve, args=problems, rounds=rounds, warmup_rounds=1)
