"""What several benchmarks do alike in training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Let this thread take numbers for 0 that are too small for all of their digits.

    Adam's moments become such numbers where gradients have ended, as for pixels that are black in a
    task, and the processor's arithmetic many times slower.

    Raises:
        RuntimeError: This processor cannot.
    """
    if not torch.set_flush_denormal(True):
        raise RuntimeError(
            "this processor cannot take denormal numbers for 0, and seconds would not be of the "
            "methods: measure on one that can (x86-64 with SSE3, or aarch64)."
        )
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


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


def tensor_bytes(value: Any) -> int:
    """Return the bytes of all tensors in nested containers, each storage once."""
    return sum(_storages(value, {}).values())


def _storages(value: Any, found: dict[int, int]) -> dict[int, int]:
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    elif isinstance(value, Mapping):
        for one in value.values():
            _storages(one, found)
    elif isinstance(value, (list, tuple)):
        for one in value:
            _storages(one, found)
    elif isinstance(getattr(value, "data", None), Tensor):  # Avalanche's ParamData
        _storages(value.data, found)
    return found
