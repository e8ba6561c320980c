"""Steps that are left out, where a number is not to be waited for and where it is known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cl_optim import EWCAdamW
from cl_optim.ops.nnqp import Solution, Status
from cl_optim.optim.invalid_steps import InvalidSteps
from cl_optim.optim.projection import outcome

Optimizer = torch.optim.Optimizer

# What leaves out a step by itself, as it does on a GPU.
ON_DEVICE: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "sgd-fused": lambda params: torch.optim.SGD(params, lr=0.1, fused=True),
    "adamw-fused": lambda params: torch.optim.AdamW(params, lr=0.1, fused=True),
    "ewc": lambda params: EWCAdamW(params, lr=0.1),
}
ALL = {
    **ON_DEVICE,
    # Its first step would leave uninitialised memory as momentum.
    "momentum-fused": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, fused=True),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.1),
}


def weights() -> list[nn.Parameter]:
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    return [weight]


def taken(name: str, invalid: bool | Tensor, on_invalid: str = "skip") -> tuple[bool, bool, bool]:
    """Take a first step; where it does not move, the next one is as if it had not been.

    Returns:
        Whether it is an error, whether it moved, whether the optimizer's own step was called.
    """
    params, fresh = weights(), weights()
    optimizer, twin = ALL[name](params), ALL[name](fresh)
    calls: list[bool] = []
    hook = optimizer.register_step_pre_hook(lambda *_: calls.append(True))
    is_error = InvalidSteps().take_step(optimizer, optimizer.step, invalid, on_invalid)
    hook.remove()
    assert not hasattr(optimizer, "found_inf")
    assert not hasattr(optimizer, "grad_scale")
    moved = bool((params[0] != 1).any())
    if not moved:
        optimizer.step()
        twin.step()
        assert torch.equal(params[0], fresh[0])
    return is_error, moved, bool(calls)


@pytest.mark.parametrize("name", ALL)
def test_an_invalid_step_is_left_out(name):
    assert taken(name, True) == (False, False, False)


@pytest.mark.parametrize("name", ALL)
def test_an_invalid_step_is_left_out_on_the_device(name):
    """By the optimizer itself, where it can."""
    assert taken(name, torch.tensor(True)) == (False, False, name in ON_DEVICE)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("invalid", [False, torch.tensor(False)])
def test_a_valid_step_is_taken(name, invalid):
    assert taken(name, invalid) == (False, True, True)


@pytest.mark.parametrize("name", ALL)
def test_a_raw_step_is_taken(name):
    assert taken(name, True, "raw") == (False, True, True)


@pytest.mark.parametrize("name", ALL)
def test_a_known_invalid_step_is_an_error(name):
    assert taken(name, True, "raise") == (True, False, False)


class TestOutcome:
    """What a step makes of solutions."""

    @staticmethod
    def of(*status: Status) -> tuple[Tensor, bool | Tensor, bool]:
        codes = torch.tensor(status, dtype=torch.int8)
        v = torch.arange(1.0, 1.0 + len(status), dtype=torch.float64)[:, None]
        return outcome(Solution(v, codes, torch.zeros(len(status))))

    def test_solved(self):
        v, is_invalid, may_move = self.of(Status.SOLVED, Status.INACTIVE)
        assert v.tolist() == [[1.0], [2.0]]
        assert (is_invalid, may_move) == (False, True)

    def test_inactive(self):
        assert self.of(Status.INACTIVE, Status.INACTIVE)[1:] == (False, False)

    @pytest.mark.parametrize("status", [Status.INVALID, Status.UNCONVERGED])
    def test_invalid(self, status):
        v, is_invalid, may_move = self.of(Status.DEPENDENT, status)
        assert v.tolist() == [[1.0], [0.0]]
        assert (is_invalid, may_move) == (True, True)

    def test_elsewhere_nothing_is_waited_for(self):
        status = torch.zeros(2, dtype=torch.int8, device="meta")
        v = torch.zeros(2, 1, dtype=torch.float64, device="meta")
        moved, is_invalid, may_move = outcome(Solution(v, status, v[:, 0]))
        assert moved.is_meta
        assert isinstance(is_invalid, Tensor)
        assert is_invalid.is_meta
        assert may_move
