"""GEM's projection as others compute it, like `cl_optim.functional.gem_project`."""

from __future__ import annotations

import numpy as np
import quadprog
import torch
from qpth.qp import QPFunction
from torch import Tensor
from torchjd.aggregation import DualProj


def published(grad: Tensor, memory: Tensor, margin: float = 0.0, epsilon: float = 1e-3) -> Tensor:
    """As published (Lopez-Paz & Ranzato 2017): in float64 on the host, by quadprog, with εI.

    Raises:
        ValueError: By quadprog, where Q + εI is not positive definite.
    """
    rows = memory.cpu().double().numpy()
    g = grad.cpu().double().numpy()
    gram = rows @ rows.T
    gram = 0.5 * (gram + gram.T) + epsilon * np.eye(len(rows))
    v, *_ = quadprog.solve_qp(gram, -(rows @ g), np.eye(len(rows)), np.full(len(rows), margin))
    return torch.from_numpy(g + v @ rows).to(grad)


def torchjd(grad: Tensor, memory: Tensor) -> Tensor:
    """TorchJD's DualProj with all its weight on the new gradient."""
    weights = torch.zeros(len(memory) + 1, dtype=grad.dtype, device=grad.device)
    weights[-1] = 1.0
    return DualProj(pref_vector=weights)(torch.cat([memory, grad[None]]))


def quadprog_loop(gram: Tensor, linear: Tensor) -> Tensor:
    """A batch of problems, [B, t, t] and [B, t], one after the other."""
    identity, zeros = np.eye(gram.shape[1]), np.zeros(gram.shape[1])
    problems = zip(gram.numpy(), linear.numpy(), strict=True)
    return torch.from_numpy(
        np.stack([quadprog.solve_qp(q, -c, identity, zeros)[0] for q, c in problems])
    )


def qpth(gram: Tensor, linear: Tensor) -> Tensor:
    """The same by qpth's batched interior point method."""
    t = gram.shape[1]
    identity, none = torch.eye(t, dtype=gram.dtype), torch.empty(0, dtype=gram.dtype)
    zeros = torch.zeros(t, dtype=gram.dtype)
    return QPFunction(verbose=False, check_Q_spd=False)(gram, linear, -identity, zeros, none, none)
