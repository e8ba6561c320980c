"""Σ_n (b_nᵀ a_n)² on the CPU, against forming the per-sample gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from suite import Contender, Question, Work
from torch import Tensor

from cl_optim import functional as F


@dataclass
class Problem:
    """A linear map's inputs and output gradients, and where the sums go."""

    inputs: Tensor
    grad_outputs: Tensor
    out: Tensor
    weight_grad: Tensor


def problem(samples: int, tokens: int, in_features: int, out_features: int) -> Problem:
    return Problem(
        torch.randn(samples, tokens, in_features),
        torch.randn(samples, tokens, out_features),
        torch.zeros(out_features, in_features),
        torch.zeros(out_features, in_features),
    )


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


def on(run: Callable[[Problem], None]) -> Callable[[Problem], Work]:
    return lambda problem: partial(run, problem)


def outcome(problem: Problem, work: Work) -> list[Tensor]:
    work()
    return [problem.out]


OURS, ALONE = "squared_grad_sum_", "weight gradient alone"
QUESTION = Question(
    problems={
        "transformer 8×128, 768 → 768": (partial(problem, 8, 128, 768, 768), 3),
        "convolution 64×196, 288 → 64": (partial(problem, 64, 196, 288, 64), 5),
        "MLP 256, 784 → 256": (partial(problem, 256, 1, 784, 256), 20),
    },
    contenders={
        OURS: Contender(on(ours), "ours"),
        "squared_grad_sum_ and weight gradient": Contender(on(ours_with_weight_grad), "ours"),
        "loop of batch size 1": Contender(on(loop), "peer"),
        "per-sample gradients by einsum": Contender(on(materialised), "peer"),
        ALONE: Contender(on(weight_grad_alone), "other"),
    },
    reference=OURS,
    base=ALONE,
    outcome=outcome,
)


def test_squared_grad(ask: Callable[[], None]) -> None:
    ask()
