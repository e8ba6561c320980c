"""TorchJD (Quinton & Rey 2024, arXiv:2406.16232): aggregators of gradients."""

from __future__ import annotations

import torch
from torch import Tensor


def project(grad: Tensor, memory: Tensor) -> Tensor:
    """Return DualProj with all its weight on the new gradient: GEM's projection."""
    from torchjd.aggregation import DualProj

    weights = torch.zeros(len(memory) + 1, dtype=grad.dtype, device=grad.device)
    weights[-1] = 1.0
    return DualProj(pref_vector=weights)(torch.cat([memory, grad[None]]))


def upgrad(grad: Tensor, memory: Tensor) -> Tensor:
    """Return UPGrad, which projects every row, and not the new gradient alone."""
    from torchjd.aggregation import UPGrad

    return UPGrad()(torch.cat([memory, grad[None]]))
