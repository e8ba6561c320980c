"""Online EWC as Mammoth (Buzzega et al. 2020, arXiv:2004.07211) has it: one flat vector."""

from __future__ import annotations

from collections.abc import Callable

import torch
from contenders import LAMBDA, Problem
from torch import Tensor


def penalty(problem: Problem) -> Callable[[], None]:
    """Return a step of AdamW after 2λF(θ − θ*) of one flat vector was added to the gradients."""
    optimizer = problem.adamw
    importance, anchor = map(flat, problem.protection)
    sizes = [p.numel() for p in problem.params]

    @torch.no_grad()
    def step() -> None:
        grads = 2 * LAMBDA * importance * (flat(problem.params) - anchor)
        for p, grad in zip(problem.params, grads.split(sizes), strict=True):
            p.grad.add_(grad.view_as(p))  # where backward() would add the loss's
        optimizer.step()

    return step


def flat(tensors: list[Tensor]) -> Tensor:
    """Return all values as a vector."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
