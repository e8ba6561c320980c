"""GEM as published (Lopez-Paz & Ranzato 2017, arXiv:1706.08840): float64 on the host, quadprog."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def project(grad: Tensor, memory: Tensor, margin: float = 0.0, epsilon: float = 1e-3) -> Tensor:
    """Return what a gradient [P] is projected to, by rows [t, P]: with εI, in float64 on the host.

    Raises:
        ValueError: By quadprog, where Q + εI is not positive definite.
    """
    import quadprog

    rows = memory.cpu().double().numpy()
    g = grad.cpu().double().numpy()
    gram = rows @ rows.T
    gram = 0.5 * (gram + gram.T) + epsilon * np.eye(len(rows))
    v, *_ = quadprog.solve_qp(gram, -(rows @ g), np.eye(len(rows)), np.full(len(rows), margin))
    return torch.from_numpy(g + v @ rows).to(grad)


def programs(gram: Tensor, linear: Tensor) -> Tensor:
    """Return the solutions of quadratic programs, [B, t, t] and [B, t], one after the other."""
    import quadprog

    identity, zeros = np.eye(gram.shape[1]), np.zeros(gram.shape[1])
    problems = zip(gram.numpy(), linear.numpy(), strict=True)
    return torch.from_numpy(
        np.stack([quadprog.solve_qp(q, -c, identity, zeros)[0] for q, c in problems])
    )
