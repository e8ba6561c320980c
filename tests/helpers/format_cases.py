"""The formats of EWCAdamW's state, and how two sides that round alike are compared."""

from __future__ import annotations

from typing import Any

import torch
from ewc_adamw_cases import OFF_DEFAULT, Problem, protect
from torch import Tensor

from cl_optim import EWCAdamW
from cl_optim.ops import formats

# Blocks of codes that are full, begun and alone; 8-bit moments from 4 096 elements on.
SHAPES = [(0,), (1,), (255,), (64, 4), (257,), (71, 73), (2, 3, 5, 7), ()]
IMPORTANCE = ("float32", "bfloat16", "log8")
MOMENTS = ("float32", "bfloat16", "8bit")
ROUNDING = ("nearest", "stochastic", "kahan")


def make(problem: Problem, penalty: str, formats: dict[str, Any], **options: Any) -> EWCAdamW:
    named = [(f"p{i}", p) for i, p in enumerate(problem.params)]
    settings = {**OFF_DEFAULT, "penalty": penalty, **formats, **options}
    optimizer = EWCAdamW(named, **settings)
    protect(optimizer, problem)
    return optimizer


def step(problem: Problem, optimizer: EWCAdamW, number: int) -> None:
    problem.set_gradients(number, torch.float32)
    optimizer.step()


def values(state: dict[str, Any], key: str, param: Tensor) -> Tensor:
    return formats.load_moment(state[key], param, signed=key == "exp_avg")


def assert_close(a: EWCAdamW, b: EWCAdamW, share: float) -> None:
    """Equal but for an ulp here and there, and where that tips a rounding."""
    pairs = zip(a.param_groups[0]["params"], b.param_groups[0]["params"], strict=True)
    for p, q in pairs:
        ours, theirs = a.state[p], b.state[q]
        assert ours.keys() == theirs.keys()
        for key in ours:
            x, y = ours[key], theirs[key].to(ours[key].device)
            assert x.dtype == y.dtype
            if key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
                x, y = values(ours, key, p), values(theirs, key, q).to(x.device)
            if key == "compensation":
                x, y = (o.state[w]["compensation"].float() + w.float() for o, w in ((a, p), (b, q)))
                y = y.to(x.device)
            _mostly_close(x.float(), y.float(), share)
        _mostly_close(p.detach().float(), q.detach().float().to(p.device), share)


def _mostly_close(x: Tensor, y: Tensor, share: float) -> None:
    apart = ~torch.isclose(x, y, rtol=3e-6, atol=1e-7)
    assert apart.float().mean().nan_to_num() <= share
    # Where a rounding tipped, it is the next value.
    torch.testing.assert_close(x[apart], y[apart], rtol=0.1, atol=1e-4)
