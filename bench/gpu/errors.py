"""How far results are from their references."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def relative(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """‖actual − expected‖ / ‖expected‖ over all tensors, in float64."""
    difference, size = 0.0, 0.0
    for a, b in zip(actual, expected, strict=True):
        difference += float((a.double() - b.double()).square().sum())
        size += float(b.double().square().sum())
    return math.sqrt(difference / size) if size > 0 else math.sqrt(difference)


def largest(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest `relative` of a tensor; of tiny ones relative to 1e-6 of the largest norm."""
    floor = 1e-6 * max(float(value.norm()) for value in expected.values())
    errors = [
        float((actual[name].double() - value.double()).norm()) / max(float(value.norm()), floor)
        for name, value in expected.items()
    ]
    return math.nan if any(map(math.isnan, errors)) else max(errors)
