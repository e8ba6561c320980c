"""Time of Σ_n (b_nᵀ a_n)² on the CPU, against forming the per-sample gradients.

The contenders take turns, REPEATS times, so that what else the machine does hits them alike; the
figures are medians of the ratios within a turn (summary.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from cl_optim import functional as F

REPEATS = 7
BASES = ["weight gradient alone"]

SETS: dict[str, tuple[tuple[int, int, int, int], int]] = {
    # name: (samples, tokens, in, out), rounds per turn
    "transformer 8×128, 768 → 768": ((8, 128, 768, 768), 3),
    "convolution 64×196, 288 → 64": ((64, 196, 288, 64), 5),
    "MLP 256, 784 → 256": ((256, 1, 784, 256), 20),
}


@dataclass
class Problem:
    """A linear map's inputs and output gradients, and where the sums go."""

    inputs: Tensor
    grad_outputs: Tensor
    out: Tensor
    weight_grad: Tensor


def loop(problem: Problem) -> None:
    """What batches of size 1 do, without the rest of their backward pass."""
    for a, b in zip(problem.inputs, problem.grad_outputs, strict=True):
        problem.out += (b.mT @ a).square()


def materialised(problem: Problem) -> None:
    """What libraries with per-sample gradients do: all of them at once."""
    grads = torch.einsum("nto,nti->noi", problem.grad_outputs, problem.inputs)
    problem.out += grads.square().sum(0)


def weight_grad_alone(problem: Problem) -> None:
    """The ordinary backward pass, which gives no squares."""
    b, a = problem.grad_outputs.flatten(0, 1), problem.inputs.flatten(0, 1)
    torch.mm(b.mT, a, out=problem.weight_grad)


def ours(problem: Problem) -> None:
    F.squared_grad_sum_(problem.out, problem.inputs, problem.grad_outputs)


def ours_with_weight_grad(problem: Problem) -> None:
    p = problem
    F.squared_grad_sum_(p.out, p.inputs, p.grad_outputs, p.weight_grad.zero_())


CONTENDERS: dict[str, Callable[[Problem], None]] = {
    "weight gradient alone": weight_grad_alone,
    "loop of batch size 1": loop,
    "per-sample gradients by einsum": materialised,
    "squared_grad_sum_": ours,
    "squared_grad_sum_ and weight gradient": ours_with_weight_grad,
}


@pytest.fixture(scope="module", params=SETS)
def problem(request: pytest.FixtureRequest) -> Problem:
    (samples, tokens, in_features, out_features), _ = SETS[request.param]
    torch.manual_seed(0)
    return Problem(
        torch.randn(samples, tokens, in_features),
        torch.randn(samples, tokens, out_features),
        torch.zeros(out_features, in_features),
        torch.zeros(out_features, in_features),
    )


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("turn", range(REPEATS))
def test_squared_grad(benchmark, request, problem, turn, contender) -> None:
    name = request.node.callspec.params["problem"]
    benchmark.group = name
    benchmark.extra_info.update(turn=turn, contender=contender, bases=BASES)
    run = CONTENDERS[contender]
    benchmark.pedantic(run, args=(problem,), rounds=SETS[name][1], warmup_rounds=1)
