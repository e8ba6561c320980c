"""qpth (Amos & Kolter 2017, arXiv:1703.00443): an interior point method in batches."""

from __future__ import annotations

import torch
from torch import Tensor


def programs(gram: Tensor, linear: Tensor) -> Tensor:
    """Return the solutions of quadratic programs, [B, t, t] and [B, t]."""
    from qpth.qp import QPFunction

    t = gram.shape[1]
    identity, none = torch.eye(t, dtype=gram.dtype), torch.empty(0, dtype=gram.dtype)
    zeros = torch.zeros(t, dtype=gram.dtype)
    solve = QPFunction(verbose=False, check_Q_spd=False)
    return solve(gram, linear, -identity, zeros, none, none)
