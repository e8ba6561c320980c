"""suggest_lambda: the λ whose pull is as large as the task's gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from cl_optim import EWCAdamW, estimate_fisher

DRIFT = 0.03


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 300), nn.Tanh(), nn.Linear(300, 4))


def importance_of(model: nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.rand(param.shape, generator=generator) ** 8
        for name, param in model.named_parameters()
    }


def backward(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(16, 20, generator=generator).to(next(model.parameters()).dtype)
    model(x).square().mean().backward()


def pull_of(optimizer: EWCAdamW, ewc_lambda: float, drift: float) -> float:
    """‖∇ λ Σ F (θ − θ*)²‖ by autograd in float64, each weight having gone so far either way."""
    generator = torch.Generator().manual_seed(3)
    square = 0.0
    for one in optimizer.protected():
        if one.param.grad is None:
            continue
        anchor = one.anchor.double()
        way = torch.rand(anchor.shape, generator=generator).sub(0.5).sign().double()
        theta = (anchor + way * drift * anchor.square().mean().sqrt()).requires_grad_()
        importance = one.importance.double() * ~one.frozen
        penalty = ewc_lambda * (importance * (theta - anchor).square()).sum()
        (gradient,) = torch.autograd.grad(penalty, theta)
        square += gradient.square().sum().item()
    return math.sqrt(square)


def gradient_of(optimizer: EWCAdamW) -> float:
    return math.sqrt(
        sum(
            (one.param.grad.double() * ~one.frozen).square().sum().item()
            for one in optimizer.protected()
            if one.param.grad is not None
        )
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{}, {"importance_dtype": "log8", "state_dtype": "8bit"}, {"importance_dtype": "bfloat16"}],
)
def test_the_pull_is_as_large_as_the_gradient(dtype, options):
    """With frozen weights, a second group, one that has no gradient and one without protection."""
    model = network().to(dtype)
    named = list(model.named_parameters())
    free = nn.Parameter(torch.ones(3, dtype=dtype))
    free.grad = torch.full((3,), 1e6, dtype=dtype)
    groups = [
        {"params": named[:2], "ewc_lambda": 7.0},
        {"params": [*named[2:], ("free", free)], "weight_decay": 0.5},
    ]
    optimizer = EWCAdamW(groups, **options)
    optimizer.consolidate(importance_of(model), strict=False)
    optimizer.freeze(0.1)
    backward(model)
    model[0].bias.grad = None
    before = [p.clone() for p in model.parameters()]
    found = optimizer.suggest_lambda(DRIFT)
    assert pull_of(optimizer, found, DRIFT) == pytest.approx(gradient_of(optimizer), rel=1e-12)
    assert optimizer.suggest_lambda(DRIFT / 2) == pytest.approx(2 * found, rel=1e-12)
    assert [group["ewc_lambda"] for group in optimizer.param_groups] == [7.0, 1.0]
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("penalty", ["decoupled", "proximal"])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_in_the_other_forms_the_pull_is_as_large_as_adams_step(penalty, amsgrad):
    """Adam's direction is what one more step by it moves, over lr; λ makes the pull as large."""
    model = network()
    options = {"penalty": penalty, "lr": 1e-3, "weight_decay": 0.0, "amsgrad": amsgrad}
    optimizer = EWCAdamW(model.named_parameters(), betas=(0.8, 0.97), eps=1e-5, **options)
    plain = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.8, 0.97), eps=1e-5, weight_decay=0.0, amsgrad=amsgrad
    )
    optimizer.consolidate(importance_of(model))
    with pytest.raises(RuntimeError, match=r"suggest_lambda\(\) needs a step of the task"):
        optimizer.suggest_lambda(DRIFT)
    for _ in range(3):
        optimizer.zero_grad()
        backward(model)
        before = [p.detach().double() for p in model.parameters()]
        plain.step()
        moved = sum(
            ((p.detach().double() - old) / 1e-3).square().sum().item()
            for p, old in zip(model.parameters(), before, strict=True)
        )
        with torch.no_grad():
            for p, old in zip(model.parameters(), before, strict=True):
                p.copy_(old)
        optimizer.step()
        with torch.no_grad():
            for p, old in zip(model.parameters(), before, strict=True):
                p.copy_(old)
    found = optimizer.suggest_lambda(DRIFT)
    assert pull_of(optimizer, found, DRIFT) == pytest.approx(math.sqrt(moved), rel=1e-4)


def test_on_a_model_that_has_learned_a_task():
    """Where the default λ pulls thousands of times more weakly than the new task pushes."""
    model = network()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 20, generator=generator)
    old, new = (x @ torch.randn(20, 4, generator=generator) for _ in range(2))
    optimizer = EWCAdamW(model.named_parameters(), lr=3e-3)
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), old.argmax(1)).backward()
        optimizer.step()
    optimizer.consolidate(estimate_fisher(model, [(x, old.argmax(1))], labels="exact"))
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), new.argmax(1)).backward()
    gradient = gradient_of(optimizer)
    assert pull_of(optimizer, 1.0, 0.01) < gradient / 1000
    found = optimizer.suggest_lambda()
    assert pull_of(optimizer, found, 0.01) == pytest.approx(gradient, rel=1e-9)
