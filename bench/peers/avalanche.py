"""Avalanche (Lomonaco et al. 2021): its plugins for EWC and GEM, called as its strategies do."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from contenders import LAMBDA, Problem
from torch import Tensor


def penalty(problem: Problem) -> Callable[[], None]:
    """Return a step of AdamW with the term that EWCPlugin adds to the loss, of one earlier task."""
    from avalanche.training.plugins import EWCPlugin
    from avalanche.training.utils import ParamData

    optimizer = problem.adamw
    model = torch.nn.ParameterList(problem.params)
    plugin = EWCPlugin(LAMBDA, mode="online", decay_factor=1.0)
    kept = (plugin.importances, plugin.saved_params)
    for one, values in zip(kept, problem.protection, strict=True):
        one[0] = {
            name: ParamData(name, value.shape, init_tensor=value)
            for (name, _), value in zip(model.named_parameters(), values, strict=True)
        }
    clock = SimpleNamespace(train_exp_counter=1)
    device = problem.params[0].device

    def step() -> None:
        loss = torch.zeros((), device=device)
        strategy = SimpleNamespace(model=model, loss=loss, clock=clock, device=device)
        plugin.before_backward(strategy)
        strategy.loss.backward()
        optimizer.step()

    return step


def project(grad: Tensor, memory: Tensor) -> Tensor:
    """Return what GEMPlugin projects a gradient [P] to, rows [t, P] being there."""
    from avalanche.training.plugins import GEMPlugin

    parameter = torch.nn.Parameter(torch.empty_like(grad))
    parameter.grad = grad.clone()
    plugin = GEMPlugin(patterns_per_experience=1, memory_strength=0.0)
    plugin.G = memory
    model = SimpleNamespace(parameters=lambda: [parameter])
    clock = SimpleNamespace(train_exp_counter=len(memory))
    plugin.after_backward(SimpleNamespace(model=model, clock=clock, device=grad.device))
    return parameter.grad
