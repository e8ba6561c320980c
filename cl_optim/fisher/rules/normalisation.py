"""Rules of layer, RMS, group and batch norm.

x̂ is computed anew: inverting (output − bias) / weight breaks where the weight is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_optim.fisher.rules.registry import (
    Gradients,
    Use,
    channels_last,
    if_trained,
    refuse_packed,
    rule,
    wide,
)
from cl_optim.fisher.samples import Samples


def _affine(
    samples: Samples, grad: Tensor, normalized: Tensor | None, features: int
) -> tuple[Tensor | None, Tensor]:
    """Return per-sample gradients of weight and bias in x̂·weight + bias."""
    dtype = wide(grad)
    weight = None
    if normalized is not None:
        weight = samples.sum(grad.to(dtype) * normalized, features, dtype)
    return weight, samples.sum(grad, features, dtype)


@rule(F.layer_norm)
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Use:
    """Describe ``torch.nn.functional.layer_norm``."""
    shape = tuple(normalized_shape)

    def gradients(samples: Samples, grad: Tensor, input: Tensor | None) -> Gradients:
        normalized = None
        if input is not None:
            normalized = F.layer_norm(input.to(wide(grad)), shape, eps=eps)
        return _affine(samples, grad, normalized, len(shape))

    saved = (if_trained(input, weight),)
    return Use(input, len(shape), (weight, bias), saved, gradients)


@rule(F.rms_norm)
def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Use:
    """Describe ``torch.nn.functional.rms_norm``."""
    shape = tuple(normalized_shape)
    # The default depends on the input's dtype, not on the wider one used below.
    epsilon = torch.finfo(input.dtype).eps if eps is None else eps

    def gradients(samples: Samples, grad: Tensor, input: Tensor) -> Gradients:
        normalized = F.rms_norm(input.to(wide(grad)), shape, eps=epsilon)
        return _affine(samples, grad, normalized, len(shape))[:1]

    return Use(input, len(shape), (weight,), (input,), gradients)


@rule(F.group_norm)
def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Use:
    """Describe ``torch.nn.functional.group_norm``."""

    def gradients(samples: Samples, grad: Tensor, input: Tensor | None) -> Gradients:
        refuse_packed(samples, "group_norm")
        normalized = None
        if input is not None:
            normalized = F.group_norm(input.to(wide(grad)), num_groups, eps=eps)
            normalized = channels_last(normalized)
        return _affine(samples, channels_last(grad), normalized, 1)

    features = input.dim() - 1  # positions are no tokens: the statistics mix them
    return Use(input, features, (weight, bias), (if_trained(input, weight),), gradients)


@rule(F.batch_norm)
def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Use:
    """Describe ``torch.nn.functional.batch_norm`` with the running statistics."""

    def gradients(
        samples: Samples,
        grad: Tensor,
        input: Tensor | None,
        mean: Tensor | None,
        variance: Tensor | None,
    ) -> Gradients:
        refuse_packed(samples, "batch_norm")
        normalized = None
        if input is not None and mean is not None and variance is not None:
            dtype = wide(grad)
            scale = (variance.to(dtype) + eps).rsqrt()
            normalized = (channels_last(input).to(dtype) - mean.to(dtype)) * scale
        return _affine(samples, channels_last(grad), normalized, 1)

    # Copies: a later training pass updates the statistics in place.
    statistics = [None if s is None else s.detach().clone() for s in (running_mean, running_var)]
    saved = (if_trained(input, weight), *statistics)
    return Use(input, input.dim() - 1, (weight, bias), saved, gradients)


def refuse_batch_statistics(
    packed: bool,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    *_: Any,
    **__: Any,
) -> None:
    """Refuse a batch_norm that makes samples depend on one another.

    What has a leading dimension of 1 and no running statistics has no samples to mix: a weight that
    is standardised.
    """
    if training and (packed or running_mean is not None or len(input) > 1):
        raise ValueError(
            "batch_norm in training mode makes a sample's gradient depend on the whole batch; put "
            "the BatchNorm modules in eval mode, with track_running_stats=True."
        )
