"""Time of the exact per-sample Fisher on the CPU against the ways there are.

The contenders take turns, REPEATS times, so that what else the machine does hits them alike; the
figures are medians of the ratios within a turn. They are checked against each other first. With
CL_OPTIM_BENCH_OPACUS=1, Opacus takes part.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from fisher_contenders import CONTENDERS, PROBLEMS

REPEATS = 5
BASES = ["loop of batch size 1"]
# Opacus makes use of module hooks that warn.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


@pytest.fixture(scope="module", params=PROBLEMS)
def steps(request: pytest.FixtureRequest) -> dict[str, Callable[[], object]]:
    torch.manual_seed(0)
    problem = PROBLEMS[request.param]()
    made = {name: make(copy.deepcopy(problem)) for name, make in CONTENDERS.items()}
    results = {name: step() for name, step in made.items()}
    expected = results["loop of batch size 1"]
    for name, sums in results.items():
        if sums is not None:
            for key, value in sums.items():
                error = float((value - expected[key]).norm() / expected[key].norm())
                assert error < 1e-4, (name, key, error)
    return made


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("turn", range(REPEATS))
def test_fisher(benchmark, request, steps, turn, contender) -> None:
    benchmark.group = request.node.callspec.params["steps"]
    benchmark.extra_info.update(turn=turn, contender=contender, bases=BASES)
    rounds = 1 if contender.startswith("loop") else 5
    benchmark.pedantic(steps[contender], rounds=rounds, warmup_rounds=1)
