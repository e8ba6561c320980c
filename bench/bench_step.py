"""Time of one protected step on the CPU against torch's fused AdamW.

The contenders take turns, REPEATS times, so that what else the machine does hits them alike; the
figures are medians of the ratios within a turn (summary.py). Many small tensors are measured twice:
step after step, and with other memory read before each, as by a model's forward and backward pass.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from contenders import CONTENDERS, Problem, gpt2_shapes

REPEATS = 7
# What the others are divided by.
BASES = ["36 B per parameter in place", "AdamW fused", "EWCAdamW gradient"]

SMALL: list[tuple[int, ...]] = [(64,)] * 1000
LARGE = "GPT-2 144 tensors 85 M"
COLD = "1000 tensors of 64, not in the cache"
SETS: dict[str, tuple[list[tuple[int, ...]], int]] = {
    # name: shapes, rounds per turn
    "MLP 64-256-256-10": ([(256, 64), (256,), (256, 256), (256,), (10, 256), (10,)], 200),
    LARGE: (gpt2_shapes(), 5),
    "1000 tensors of 64": (SMALL, 30),
    COLD: (SMALL, 30),
}
OTHER_MEMORY = torch.zeros(16_000_000)  # 64 MB, twice the third-level cache


def evict() -> None:
    OTHER_MEMORY.sum()


@pytest.fixture(scope="module", params=SETS)
def steps(request: pytest.FixtureRequest) -> dict[str, Callable[[], None]]:
    shapes, _ = SETS[request.param]
    torch.manual_seed(0)
    shared = Problem(shapes) if request.param == LARGE else None  # else 20 GB would not do
    return {name: make(shared or Problem(shapes)) for name, make in CONTENDERS.items()}


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("turn", range(REPEATS))
def test_step(benchmark, request, steps, turn, contender) -> None:
    name = request.node.callspec.params["steps"]
    benchmark.group = name
    benchmark.extra_info.update(turn=turn, contender=contender, bases=BASES)
    setup = evict if name == COLD else None
    rounds = SETS[name][1]
    benchmark.pedantic(steps[contender], setup=setup, rounds=rounds, warmup_rounds=3)
