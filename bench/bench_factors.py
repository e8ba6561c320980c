"""Kronecker factors of a batch on the CPU, against how others sum them and a plain backward pass.

Ours are summed in float64, of products in float32; the others' are float32.
"""

from __future__ import annotations

from collections.abc import Callable

from factor_contenders import factors, ours, plain, scaled
from fisher_contenders import PROBLEMS, Problem
from peers import asdl, curvlinops
from suite import Contender, Question, Work
from torch import Tensor

from cl_optim import FisherEstimator


def outcome(problem: Problem, work: Work) -> list[Tensor]:
    found = work()
    if not isinstance(found, FisherEstimator):
        return scaled(found)
    widths = {name: p.flatten(1).shape[1] for name, p in problem.model.named_parameters()
              if p.requires_grad}  # fmt: skip
    return scaled(
        {
            name: (inputs[: widths[f"{name}.weight"], : widths[f"{name}.weight"]], gradients)
            for name, (inputs, gradients) in factors(found).items()
        }
    )


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
