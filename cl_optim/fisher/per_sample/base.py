"""What per-sample gradients are; and those that are held themselves."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

# Bytes of per-sample gradients, or of unfolded input, formed at once.
CHUNK_BYTES = 2**24


def samples_at_once(bytes_each: int) -> int:
    """Return how many samples are worked on at once, of which each needs so much memory."""
    return max(1, CHUNK_BYTES // max(1, bytes_each))


class PerSample(ABC):
    """Gradients g_n of N samples with respect to one tensor.

    Attributes:
        samples: N.
        shape: The tensor's shape.
    """

    samples: int
    shape: tuple[int, ...]

    @abstractmethod
    def dense(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return the gradients of some samples themselves, [stop − start, *shape]."""

    def add_squares_(self, out: Tensor, total: Tensor | None = None) -> None:
        """Add Σ_n g_n² to ``out``, and Σ_n g_n to ``total``."""
        for part in self._parts(out.dtype):
            if total is not None:
                total += part.sum(0)
            out += part.square_().sum(0)

    def add_magnitudes_(self, out: Tensor) -> None:
        """Add Σ_n |g_n| to ``out``."""
        for part in self._parts(out.dtype):
            out += part.abs_().sum(0)

    def sum(self, dtype: torch.dtype, weights: Tensor | None = None) -> Tensor:
        """Return Σ_n w_n g_n; w_n = 1 by default. ``weights``: [N]."""
        total: Tensor | None = None
        start = 0
        for part in self._parts(dtype):
            stop = start + len(part)
            if weights is None:
                term = part.sum(0)
            else:
                term = torch.tensordot(weights[start:stop].to(dtype), part, 1)
            total = term if total is None else total.add_(term)
            start = stop
        return self.dense(0, 0, dtype).sum(0) if total is None else total

    def _parts(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """Yield the gradients in chunks of samples; each may be overwritten."""
        step = samples_at_once(self._size() * dtype.itemsize)
        for start in range(0, self.samples, step):
            yield self.dense(start, min(start + step, self.samples), dtype)

    def _size(self) -> int:
        """Return how many elements are formed for each sample."""
        return math.prod(self.shape)


class Dense(PerSample):
    """The gradients themselves, [N, *shape]: of biases and other small parameters."""

    def __init__(self, grads: Tensor) -> None:
        self.grads = grads
        self.samples, *shape = grads.shape
        self.shape = tuple(shape)

    def dense(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """See :class:`PerSample`."""
        return self.grads[start:stop].to(dtype, copy=True)

    def add_squares_(self, out: Tensor, total: Tensor | None = None) -> None:
        """See :class:`PerSample`."""
        grads = self.grads.to(out.dtype)
        out += grads.square().sum(0)
        if total is not None:
            total += grads.sum(0)


class Bias(Dense):
    """Of what is added to each output of a matrix, in the call that multiplies by that."""


def at_most(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to ``dtype`` what is wider: a float32 parameter may be used as float64."""
    return tensor.to(dtype) if tensor.dtype.itemsize > dtype.itemsize else tensor
