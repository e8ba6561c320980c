"""4 096 quadratic programs with 16 rows on the CPU, all regular, half of their rows active."""

from __future__ import annotations

from collections.abc import Callable

import torch
from peers import published, qpth
from suite import Contender, Question
from torch import Tensor

from cl_optim import functional as F

PROBLEMS, ROWS, DIMENSIONS = 4096, 16, 64

Programs = tuple[Tensor, Tensor]


def programs() -> Programs:
    rows = torch.randn(PROBLEMS, ROWS, DIMENSIONS, dtype=torch.float64)
    grads = torch.randn(PROBLEMS, DIMENSIONS, 1, dtype=torch.float64) - rows.mean(1)[..., None]
    return rows @ rows.mT, (rows @ grads)[..., 0]


def on(solve: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Programs], Callable[[], Tensor]]:
    return lambda programs: lambda: solve(*programs)


OURS = "cl_optim nnqp"
QUESTION = Question(
    problems={f"{PROBLEMS} quadratic programs of {ROWS} rows": (programs, 10)},
    contenders={
        OURS: Contender(on(lambda gram, linear: F.nnqp(gram, linear).v), "ours"),
        "quadprog in a loop": Contender(on(published.programs), "peer", "quadprog", rounds=2),
        "qpth": Contender(on(qpth.programs), "peer", "qpth", rounds=1),
        "one linear system each": Contender(on(torch.linalg.solve), "other"),
    },
    reference=OURS,
    base="one linear system each",
    tolerance=1e-6,
)


def test_programs(ask: Callable[[], None]) -> None:
    ask()
