"""What the benchmarks on texts and budgets do alike in training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def take_step(optimizer: torch.optim.Optimizer, value: Tensor) -> None:
    """Step down a loss."""
    optimizer.zero_grad()
    torch.autograd.backward(value)
    optimizer.step()


def rate_factor(steps: int, warm_up: int = 0, *, decay: bool = True) -> Callable[[int], float]:
    """Return the learning rate's factor by the step: it falls to 0 after the first fifth.

    Args:
        steps: How many there are.
        warm_up: Steps in which it rises to 1, from the start.
        decay: Whether it falls.
    """
    begin = steps // 5

    def factor(step: int) -> float:
        warm = min(1.0, (step + 1) / max(1, warm_up))
        left = (steps - step) / (steps - begin) if decay else 1.0
        return warm * min(1.0, max(0.0, left))

    return factor


def part_of(batch: int, fraction: float, rounding: torch.Generator) -> int:
    """Return how many windows of a batch a fraction is: right on average, not in each batch."""
    share = fraction * batch
    return int(share) + int(torch.rand((), generator=rounding).item() < share % 1)
