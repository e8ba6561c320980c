"""Time of one protected step on the CPU against torch's fused AdamW.

The contenders take turns, REPEATS times, so that what else the machine does hits them alike; the
figures are medians of the ratios within a turn (summary.py).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from contenders import CONTENDERS, Problem, gpt2_shapes

REPEATS = 7
# What the others are divided by.
BASES = ["36 B per parameter in place", "AdamW fused", "EWCAdamW gradient"]

SETS: dict[str, tuple[list[tuple[int, ...]], int]] = {
    # name: shapes, rounds per turn
    "MLP 64-256-256-10": ([(256, 64), (256,), (256, 256), (256,), (10, 256), (10,)], 200),
    "GPT-2 144 tensors 85 M": (gpt2_shapes(), 5),
    "1000 tensors of 64": ([(64,)] * 1000, 30),
}


@pytest.fixture(scope="module", params=SETS)
def steps(request: pytest.FixtureRequest) -> dict[str, Callable[[], None]]:
    shapes, _ = SETS[request.param]
    torch.manual_seed(0)
    return {name: make(Problem(shapes)) for name, make in CONTENDERS.items()}


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("turn", range(REPEATS))
def test_step(benchmark, request, steps, turn, contender) -> None:
    name = request.node.callspec.params["steps"]
    benchmark.group = name
    benchmark.extra_info.update(turn=turn, contender=contender, bases=BASES)
    benchmark.pedantic(steps[contender], rounds=SETS[name][1], warmup_rounds=2)
