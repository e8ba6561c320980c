"""Time of the Gram products on the CPU against torch's matrix product and a plain read.

All contenders read the same memory: t rows and the gradient, one after the other, of which the
model's parameters are views. As in bench_step.py they take turns. `bytes` in the report is what a
contender must read and write at least.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from contenders import gpt2_shapes

from cl_optim import functional as F
from cl_optim.ops import gram

ROWS = 10
REPEATS = 5
SMALL, LARGE = "GPT-2 layer, 12 tensors 7 M", "GPT-2 148 tensors 124 M"
SETS: dict[str, tuple[list[tuple[int, ...]], int]] = {
    # name: shapes, rounds per turn
    SMALL: (gpt2_shapes()[:12], 5),
    LARGE: (gpt2_shapes(embeddings=True)[:-1], 1),
}


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

    def combine(self, coefficient: float) -> Callable[[], None]:
        v = torch.full((1, ROWS), coefficient, dtype=torch.float64)
        blocks = [0] * len(self.grads)
        return lambda: gram.combine_(self.grads, self.memory, v, blocks)


# name: (what to call, how often it must read or write the matrix's t + 1 rows)
CONTENDERS: dict[str, tuple[Callable[[Problem], Callable[[], object]], float]] = {
    "gram": (lambda p: lambda: F.gram(p.memory, p.grads), 1),
    "dots": (lambda p: lambda: gram.dots_per_tensor(p.memory, p.grads), 1),
    "combine": (lambda p: p.combine(1e-9), (ROWS + 2) / (ROWS + 1)),
    "combine, nothing active": (lambda p: p.combine(0.0), 0),
    "G @ G.T float32": (lambda p: lambda: p.matrix @ p.matrix.T, 1),
    "plain read (sum)": (lambda p: p.matrix.sum, 1),
}


def run(benchmark, request, problem: Problem, call: Callable[[], object], share: float) -> None:
    name = request.node.callspec.params["problem"]
    benchmark.group = name
    benchmark.extra_info.update(request.node.callspec.params, bytes=share * problem.matrix.nbytes)
    benchmark.pedantic(call, rounds=SETS[name][1], warmup_rounds=1)


@pytest.fixture(scope="module", params=SETS)
def problem(request: pytest.FixtureRequest) -> Problem:
    assert gram.choose("gram_per_tensor", "cpu") == "cpu"
    return Problem(SETS[request.param][0])


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("turn", range(REPEATS))
def test_gram(benchmark, request, problem, turn, contender) -> None:
    make, share = CONTENDERS[contender]
    run(benchmark, request, problem, make(problem), share)


@pytest.mark.parametrize("problem", [SMALL], indirect=True)  # LARGE would take 11 GB more
@pytest.mark.parametrize("turn", range(REPEATS))
def test_float64(benchmark, request, problem, turn) -> None:
    wide = problem.matrix.double()
    run(benchmark, request, problem, lambda: wide @ wide.T, 2)
    benchmark.extra_info["contender"] = "G @ G.T float64"
