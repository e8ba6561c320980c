"""GEM as published, and random problems for it."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


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
