"""Rules of convolutions."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from cl_optim.fisher.per_sample.base import Bias
from cl_optim.fisher.per_sample.convolutions import Convolution, Convolved
from cl_optim.fisher.rules.registry import (
    Gradients,
    UnsupportedUseError,
    Use,
    if_trained,
    refuse_packed,
    rule,
    wide,
)
from cl_optim.fisher.samples import Samples


def _repeated(value: int | Sequence[int], dimensions: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dimensions if len(values) == 1 else values


def _spatial_dimensions(input: Tensor, weight: Tensor) -> int:
    if input.dim() != weight.dim():
        raise UnsupportedUseError(
            f"its input must have {weight.dim()} dimensions, the first for samples, not "
            f"{input.dim()}"
        )
    return weight.dim() - 2


@rule(F.conv1d, F.conv2d, F.conv3d)
def convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Use:
    """Describe ``torch.nn.functional.conv1d``, ``conv2d`` and ``conv3d``."""
    spatial = _spatial_dimensions(input, weight)
    kernel = tuple(weight.shape[2:])
    dilations = _repeated(dilation, spatial)
    if padding == "same":
        reach = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
        around = tuple((r // 2, r - r // 2) for r in reach)
    elif isinstance(padding, str):  # "valid"
        around = ((0, 0),) * spatial
    else:
        around = tuple((p, p) for p in _repeated(padding, spatial))
    geometry = Convolution(kernel, _repeated(stride, spatial), around, dilations, groups)
    return _convolved(input, weight, bias, geometry, transposed=False)


@rule(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
def transposed_convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Use:
    """Describe ``conv_transpose1d`` to ``3d``: input and output of a convolution change places."""
    spatial = _spatial_dimensions(input, weight)
    # Without what output_padding adds, each position of the input has a window in the output.
    added = zip(_repeated(padding, spatial), _repeated(output_padding, spatial), strict=True)
    geometry = Convolution(
        tuple(weight.shape[2:]),
        _repeated(stride, spatial),
        tuple((p, p - more) for p, more in added),
        _repeated(dilation, spatial),
        groups,
    )
    return _convolved(input, weight, bias, geometry, transposed=True)


def _convolved(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Convolution, transposed: bool
) -> Use:
    bias_trained = bias is not None and bias.requires_grad

    def gradients(samples: Samples, grad: Tensor, input: Tensor | None) -> Gradients:
        refuse_packed(samples, "a convolution")
        weights = None
        if input is not None:
            ends = (grad, input) if transposed else (input, grad)
            weights = Convolved(*ends, geometry, samples.count, transposed)
        if not bias_trained:
            return weights, None
        return weights, Bias(samples.sum(grad.flatten(2).sum(2, dtype=wide(grad)), 1))

    saved = (if_trained(input, weight),)
    return Use(input, input.dim() - 1, (weight, bias), saved, gradients)
