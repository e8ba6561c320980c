"""The Gram products on the CPU, against torch's matrix products and a plain read.

All contenders read the same memory: t rows and the gradient, one after the other, of which the
model's parameters are views.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from contenders import gpt2_shapes
from suite import Contender, NotHereError, Question, Work
from torch import Tensor

from cl_optim import functional as F
from cl_optim.ops import gram

ROWS = 10
SMALL, LARGE = "GPT-2 layer, 12 tensors 7 M", "GPT-2 148 tensors 124 M"


class Problem:
    """A memory and a gradient in one matrix, [t + 1, P]: 5.5 GB for 124 M parameters."""

    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        sizes = [torch.Size(shape).numel() for shape in shapes]
        self.matrix = torch.empty(ROWS + 1, sum(sizes))
        generator = torch.Generator().manual_seed(0)
        for row in self.matrix:
            row.normal_(generator=generator)
        parts = list(zip(self.matrix.split(sizes, dim=1), shapes, strict=True))
        self.memory = [part[:-1].unflatten(1, shape) for part, shape in parts]
        self.grads = [part[-1].view(shape) for part, shape in parts]

    def combine(self, coefficient: float) -> Work:
        v = torch.full((1, ROWS), coefficient, dtype=torch.float64)
        blocks = [0] * len(self.grads)
        return lambda: gram.combine_(self.grads, self.memory, v, blocks)


def wide(problem: Problem) -> Work:
    if problem.matrix.nbytes > 1 << 30:
        raise NotHereError("the rows in float64 would take 11 GB more")
    matrix = problem.matrix.double()
    return lambda: matrix @ matrix.T


def outcome(problem: Problem, work: Work) -> list[Tensor]:
    """Return the products of rows with each other and with the gradient."""
    found = work()
    if isinstance(found, tuple):  # Q and c
        return list(found)
    return [found[:ROWS, :ROWS], found[:ROWS, ROWS]]


OURS, READ = "gram", "plain read (sum)"
QUESTION = Question(
    problems={
        SMALL: (lambda: Problem(gpt2_shapes()[:12]), 5),
        LARGE: (lambda: Problem(gpt2_shapes(embeddings=True)[:-1]), 1),
    },
    once=(LARGE,),
    contenders={
        OURS: Contender(lambda p: lambda: F.gram(p.memory, p.grads), "ours"),
        "dots": Contender(lambda p: lambda: gram.dots_per_tensor(p.memory, p.grads), "variant"),
        "combine": Contender(lambda p: p.combine(1e-9), "variant"),
        "combine, nothing active": Contender(lambda p: p.combine(0.0), "variant"),
        "G @ Gᵀ float32": Contender(lambda p: lambda: p.matrix @ p.matrix.T, "peer"),
        "G @ Gᵀ float64": Contender(wide, "peer"),
        READ: Contender(lambda p: p.matrix.sum, "floor"),
    },
    reference=OURS,
    base=READ,
    outcome=outcome,
    tolerance=1e-3,  # of sums in float32
)


def test_gram(ask: Callable[[], None]) -> None:
    ask()
