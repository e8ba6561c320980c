"""Time of one protected step against torch's fused AdamW, alone and with a penalty of its own.

Every contender does all that its method needs per step, gradients being there already. The
contenders take turns, REPEATS times, so that what else the machine does hits them alike; the
figures are medians of the ratios within a turn (summary.py).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cl_optim import EWCAdamW

REPEATS = 7
LAMBDA = 0.5


def gpt2_shapes() -> list[tuple[int, ...]]:
    """The 144 tensors, 85 M parameters, of GPT-2's 12 layers."""
    d = 768
    layer: list[tuple[int, ...]] = [(d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,)]
    layer += [(d,), (d,), (d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return layer * 12


SETS: dict[str, tuple[list[tuple[int, ...]], int]] = {
    # name: shapes, rounds per turn
    "MLP 64-256-256-10": ([(256, 64), (256,), (256, 256), (256,), (10, 256), (10,)], 200),
    "GPT-2 144 tensors 85 M": (gpt2_shapes(), 5),
    "1000 tensors of 64": ([(64,)] * 1000, 30),
}


class Problem:
    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        self.params = [torch.nn.Parameter(torch.randn(s) * 0.02) for s in shapes]
        for p in self.params:
            p.grad = torch.randn_like(p) * 1e-3
        self.grads = [p.grad for p in self.params]

    def protection(self) -> tuple[list[Tensor], list[Tensor]]:
        importances = [torch.rand(p.shape) * 1e-2 for p in self.params]
        anchors = [p.detach() + torch.randn(p.shape) * 1e-3 for p in self.params]
        return importances, anchors


def adamw(problem: Problem) -> Callable[[], None]:
    """No protection at all."""
    return torch.optim.AdamW(problem.params, fused=True).step


def ewc(penalty: str) -> Callable[[Problem], Callable[[], None]]:
    def make(problem: Problem) -> Callable[[], None]:
        named = [(str(i), p) for i, p in enumerate(problem.params)]
        optimizer = EWCAdamW(named, ewc_lambda=LAMBDA, penalty=penalty, fused=True)
        importances, _ = problem.protection()
        optimizer.consolidate({name: f for (name, _), f in zip(named, importances, strict=True)})
        del importances
        with torch.no_grad():
            for p in problem.params:
                p.add_(torch.randn(p.shape), alpha=1e-3)
        return optimizer.step

    return make


def autograd_penalty(problem: Problem) -> Callable[[], None]:
    """The term added to the loss, as the libraries do it."""
    optimizer = torch.optim.AdamW(problem.params, fused=True)
    importances, anchors = problem.protection()

    def step() -> None:
        terms = [
            (f * (p - a).square()).sum()
            for p, f, a in zip(problem.params, importances, anchors, strict=True)
        ]
        (LAMBDA * torch.stack(terms).sum()).backward()
        optimizer.step()

    return step


def foreach_penalty(problem: Problem) -> Callable[[], None]:
    """The penalty's gradient by hand: two passes over the tensors and one temporary."""
    optimizer = torch.optim.AdamW(problem.params, fused=True)
    importances, anchors = problem.protection()

    @torch.no_grad()
    def step() -> None:
        drift = torch._foreach_sub(problem.params, anchors)
        torch._foreach_addcmul_(problem.grads, drift, importances, value=2 * LAMBDA)
        optimizer.step()

    return step


def memory_floor(problem: Problem) -> Callable[[], None]:
    """36 bytes per parameter read or written in one simple pass, in place as in a step.

    (A copy to other memory would be slower: the processor reads what it is about to overwrite.)
    """
    numel = sum(p.numel() for p in problem.params)
    values = torch.zeros(numel * 9 // 2)
    return lambda: values.neg_()


CONTENDERS: dict[str, Callable[[Problem], Callable[[], None]]] = {
    "AdamW fused": adamw,
    "EWCAdamW gradient": ewc("gradient"),
    "EWCAdamW decoupled": ewc("decoupled"),
    "EWCAdamW proximal": ewc("proximal"),
    "AdamW fused + autograd penalty": autograd_penalty,
    "AdamW fused + foreach penalty": foreach_penalty,
    "36 B per parameter in place": memory_floor,
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
    benchmark.extra_info.update(turn=turn, contender=contender)
    benchmark.pedantic(steps[contender], rounds=SETS[name][1], warmup_rounds=2)
