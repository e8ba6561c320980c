"""Where values of importance lie: a histogram, the largest value and the sum in one pass.

A value's bin is the upper 16 bits of its float32, without the sign that a zero may have. Of numbers
≥ 0 these are in the order of the numbers; a bin is 2⁻⁷ of its values wide.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cl_optim.ops import library

BINS = 2**15
_CHUNK = 2**20  # as much as stays in a cache

library.define(
    "importance_histogram_(Tensor(a!) counts, Tensor(b!) totals, Tensor values) -> ()",
    cpu="compiled",
)


def bins(values: Tensor) -> Tensor:
    """Return the bin of each value: int32."""
    return (values.view(torch.int32) >> 16) & (BINS - 1)


def add_histogram_(counts: Tensor, totals: Tensor, values: Tensor) -> None:
    """Add values to a histogram, by the compiled kernel where there is one.

    Args:
        counts: int64 [32768] on the CPU; updated.
        totals: float64 [2] on the CPU, the largest value and the sum; updated.
        values: Contiguous float32 on the CPU, finite and at least 0, of any shape.
    """
    if library.choose("importance_histogram_", "cpu") == "reference":
        add_histogram_reference_(counts, totals, values)
    else:
        torch.ops.cl_optim.importance_histogram_(counts, totals, values.detach())


def add_histogram_reference_(counts: Tensor, totals: Tensor, values: Tensor) -> None:
    """Compute `add_histogram_` in plain PyTorch."""
    for chunk in torch.split(values.detach().resolve_neg().view(-1), _CHUNK):
        if chunk.numel():
            counts += torch.bincount(bins(chunk), minlength=BINS)
            totals[0] = torch.maximum(totals[0], chunk.max())
            totals[1] += chunk.sum(dtype=torch.float64)
