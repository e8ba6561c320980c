"""Kronecker factors of a batch on the CPU, against how others sum them and a plain backward pass.

Ours are summed in float64, of products in float32; the others' are float32.
"""

from __future__ import annotations

from collections.abc import Callable

from factor_contenders import factors, ours, scaled
from fisher_contenders import PROBLEMS, Problem, plain
from peers import asdl, curvlinops
from suite import Contender, Question, Work
from torch import Tensor

from cl_optim import FisherEstimator


def outcome(problem: Problem, work: Work) -> list[Tensor]:
    found = work()
    return scaled(factors(found) if isinstance(found, FisherEstimator) else found)


OURS = "cl_optim"
QUESTION = Question(
    problems={f"Factors: {name}": (make, 5) for name, make in PROBLEMS.items()},
    contenders={
        OURS: Contender(ours, "ours"),
        "ASDL": Contender(asdl.factors, "peer", "asdl"),
        "curvlinops": Contender(curvlinops.factors, "peer", "curvlinops"),
        "forward + backward": Contender(plain, "floor"),
    },
    reference=OURS,
    base="forward + backward",
    outcome=outcome,
)


def test_factors(ask: Callable[[], None]) -> None:
    ask()
