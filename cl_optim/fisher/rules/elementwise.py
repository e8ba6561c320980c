"""Functions of each element, with broadcasting: their rules, and gradients of what is broadcast.

A parameter that takes part is expanded to the output's shape first, and its per-sample gradients
are sums over parts of the gradient of that.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from cl_optim.fisher.per_sample.base import Dense, PerSample
from cl_optim.fisher.per_sample.tables import Entries
from cl_optim.fisher.rules.families import named
from cl_optim.fisher.rules.registry import (
    Gradients,
    UnsupportedUseError,
    Use,
    channels_last,
    refuse_packed,
    rule,
    wide,
)
from cl_optim.fisher.samples import Samples


@rule(*named("prelu"))
def prelu(input: Tensor, weight: Tensor) -> Use:
    """Describe ``torch.nn.functional.prelu``: one slope, or one for each channel."""
    channels = weight.numel() > 1

    def gradients(samples: Samples, grad: Tensor, input: Tensor) -> Gradients:
        slopes = grad * input.clamp(max=0)
        if not channels:
            return (samples.sum(slopes, 0, wide(grad)).unsqueeze(1),)
        return (samples.sum(channels_last(slopes), 1, wide(grad)),)

    if channels and input.dim() > 2:  # [N, C, ...]: positions are no tokens

        def of_images(samples: Samples, grad: Tensor, input: Tensor) -> Gradients:
            refuse_packed(samples, "prelu")
            return gradients(samples, grad, input)

        return Use(input, input.dim() - 1, (weight,), (input,), of_images)
    return Use(input, int(channels), (weight,), (input,), gradients)


def expand_gradient(samples: Samples, grad: Tensor, *, shape: Sequence[int]) -> tuple[PerSample]:
    """Return the gradients of a tensor of ``shape`` that was broadcast to that of ``grad``."""
    kept = list(shape)
    while kept and (kept[0] == 1 or len(kept) > grad.dim()):
        kept.pop(0)
    sums = samples.sum(grad, len(kept), wide(grad))  # [N, *trailing dimensions of grad]
    broadcast = [i + 1 for i, size in enumerate(kept) if size == 1 and sums.shape[i + 1] != 1]
    if broadcast:
        sums = sums.sum(broadcast, keepdim=True)
    return (Dense(sums.reshape(samples.count, *shape)),)


def each_row(samples: Samples, grad: Tensor) -> tuple[PerSample]:
    """Return the gradients of something [R, D] that was used by rows of several samples."""
    rows = torch.arange(len(grad), device=grad.device)
    return (Entries(rows, samples.of_each(grad, 1), grad, samples.count, len(grad)),)


def promoted(tensors: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype that an elementwise function of these has."""
    floats = [tensor for tensor in tensors if tensor.dtype != torch.bool]
    dtypes = [torch.result_type(floats[0], tensor) for tensor in floats]
    dimensioned = [t.dtype for t in floats if t.dim() > 0 and t.is_floating_point()]
    return functools.reduce(torch.promote_types, dimensioned or dtypes)


def features_after_broadcast(shape: Sequence[int], output: Sequence[int]) -> int:
    """Return how many trailing dimensions of ``output`` a tensor of ``shape`` has an extent in."""
    kept = list(shape)
    while kept and kept[0] == 1:
        kept.pop(0)
    if len(kept) > len(output):
        raise UnsupportedUseError(f"shape {list(shape)} does not broadcast to {list(output)}")
    return len(kept)
