"""GEM as published, random problems for it, and a model with memories."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def published(grad: Tensor, memory: Tensor, margin: float = 0.0) -> Tensor:
    """The projection of Lopez-Paz & Ranzato's code, without its ridge (eps = 0).

    Their `observe` calls `project2cone2` only if some product is negative; that solves
    min ½ vᵀPv − qᵀv subject to v ≥ margin, P = GGᵀ, q = −Gg, and returns Gᵀv + g. Here every
    support is tried instead of calling quadprog.
    """
    grad, memory = grad.double(), memory.double()
    if not (memory @ grad < 0).any():
        return grad
    p, q = memory @ memory.T, -memory @ grad
    best, best_value = None, torch.inf
    for support in itertools.product((False, True), repeat=len(memory)):
        free = torch.tensor(support)
        v = torch.full_like(q, margin)
        if free.any():
            right = q[free] - p[free][:, ~free].sum(1) * margin
            v[free] = torch.linalg.lstsq(p[free][:, free], right[:, None]).solution[:, 0]
        if (v < margin).any():
            continue
        value = 0.5 * v @ p @ v - q @ v
        if value < best_value:
            best, best_value = v, value
    return memory.T @ best + grad


def problem(rows: int, size: int, seed: int, pull: float = -0.5) -> tuple[Tensor, Tensor]:
    """A gradient and well-conditioned rows that it mostly violates, float32."""
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(size, generator=generator)
    memory = torch.randn(rows, size, generator=generator) + pull * grad
    return grad, memory


class Memory:
    """A task's samples and its closure, which counts its calls."""

    def __init__(self, model: nn.Module, seed: int, batches: int = 1) -> None:
        self.model = model
        self.calls = 0
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(batches, 8, 5, generator=generator)
        self.y = torch.randn(batches, 8, 3, generator=generator)

    def loss(self, batch: int = 0) -> Tensor:
        dtype = next(self.model.parameters()).dtype
        return F.mse_loss(self.model(self.x[batch].to(dtype)), self.y[batch].to(dtype))

    def __call__(self) -> None:
        self.calls += 1
        for batch in range(len(self.x)):
            self.loss(batch).backward()

    def gradient(self, params: list[Tensor]) -> list[Tensor]:
        losses = [self.loss(batch) for batch in range(len(self.x))]
        return list(torch.autograd.grad(torch.stack(losses).mean(), params))


def make_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def backward(model: nn.Module, seed: int) -> None:
    model.zero_grad()
    Memory(model, seed)()
