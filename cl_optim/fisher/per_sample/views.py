"""Of a tensor of which a view or a function was used, from the gradients of that."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cl_optim.fisher.per_sample.base import PerSample
from cl_optim.fisher.per_sample.matrices import Experts


@dataclass(frozen=True)
class Geometry:
    """A view of a contiguous tensor: which of its elements, in which order."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, tensor: Tensor, leading: int | None = None) -> Tensor:
        """View ``tensor`` so; with ``leading``, each tensor along its leading dimension."""
        offset = tensor.storage_offset() + self.offset
        if leading is None:
            return tensor.as_strided(self.size, self.stride, offset)
        each = tensor[0].numel() if leading else 0
        return tensor.as_strided((leading, *self.size), (each, *self.stride), offset)

    def is_injective(self) -> bool:
        """Return whether no element is in it twice."""
        reach = 0
        for stride, size in sorted(zip(self.stride, self.size, strict=True)):
            if size > 1:
                if stride <= reach:
                    return False
                reach += stride * (size - 1)
        return True

    def is_apart_from(self, other: Geometry) -> bool:
        """Return whether the two surely share no element: slices along the same dimensions."""
        if self._end() <= other.offset or other._end() <= self.offset:
            return True
        if self.stride != other.stride or 0 in self.stride:
            return False
        # Both offsets as steps along the common dimensions, the longest stride first.
        a, b, apart, room = self.offset, other.offset, False, math.inf
        for i in sorted(range(len(self.stride)), key=lambda i: -self.stride[i]):
            stride = self.stride[i]
            start_a, a = divmod(a, stride)
            start_b, b = divmod(b, stride)
            stop_a, stop_b = start_a + self.size[i], start_b + other.size[i]
            if max(stop_a, stop_b) * stride > room:
                return False  # one of them runs over the end of a dimension
            room = stride
            apart |= stop_a <= start_b or stop_b <= start_a
        return apart or (a != b and all(stride % room == 0 for stride in self.stride))

    def _end(self) -> int:
        return (
            self.offset + 1 + sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True))
        )


class ViewOf(PerSample):
    """Of a tensor some view of which was used."""

    def __init__(self, inner: PerSample, geometry: Geometry, shape: Sequence[int]) -> None:
        self.inner, self.geometry = inner, geometry
        self.samples, self.shape = inner.samples, tuple(shape)

    def dense(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """See :class:`PerSample`."""
        part = self.inner.dense(start, stop, dtype)
        whole = part.new_zeros((stop - start, *self.shape))
        self.geometry.of(whole, stop - start).copy_(part)
        return whole

    def add_squares_(self, out: Tensor, total: Tensor | None = None) -> None:
        """See :class:`PerSample`."""
        sums = None if total is None else self.geometry.of(total)
        self.inner.add_squares_(self.geometry.of(out), sums)

    def add_magnitudes_(self, out: Tensor) -> None:
        """See :class:`PerSample`."""
        self.inner.add_magnitudes_(self.geometry.of(out))

    def sum(self, dtype: torch.dtype, weights: Tensor | None = None) -> Tensor:
        """See :class:`PerSample`."""
        part = self.inner.sum(dtype, weights)
        whole = part.new_zeros(self.shape)
        self.geometry.of(whole).copy_(part)
        return whole


def as_experts(grads: PerSample) -> Experts | None:
    """Return gradients of a stack of matrices, which may have been used transposed, as Experts."""
    if isinstance(grads, Experts):
        return grads
    if isinstance(grads, ViewOf) and isinstance(grads.inner, Experts):
        count, rows, columns = grads.shape
        transposed = Geometry((count, columns, rows), (rows * columns, 1, columns), 0)
        if grads.geometry == transposed:
            return grads.inner.transposed()
    return None


class ScaledBy(PerSample):
    """Of a tensor of which an elementwise function was used, whose derivative is ``slope``."""

    def __init__(self, inner: PerSample, slope: Tensor) -> None:
        self.inner, self.slope = inner, slope
        self.samples, self.shape = inner.samples, inner.shape

    def dense(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """See :class:`PerSample`."""
        return self.inner.dense(start, stop, dtype) * self.slope.to(dtype)

    def add_squares_(self, out: Tensor, total: Tensor | None = None) -> None:
        """See :class:`PerSample`."""
        squares = torch.zeros(self.shape, dtype=out.dtype, device=out.device)
        sums = None if total is None else torch.zeros_like(squares)
        self.inner.add_squares_(squares, sums)
        slope = self.slope.to(out.dtype)
        out.addcmul_(squares, slope.square())
        if total is not None and sums is not None:
            total.addcmul_(sums, slope)

    def sum(self, dtype: torch.dtype, weights: Tensor | None = None) -> Tensor:
        """See :class:`PerSample`."""
        return self.inner.sum(dtype, weights) * self.slope.to(dtype)


class FunctionOf(PerSample):
    """Of a tensor of which some function was used.

    Args:
        inner: The gradients with respect to what the function returned.
        pullback: Turns one of those into one with respect to the tensor.
        shape: The tensor's.
    """

    def __init__(
        self, inner: PerSample, pullback: Callable[[Tensor], Tensor], shape: Sequence[int]
    ) -> None:
        self.inner, self.pullback = inner, pullback
        self.samples, self.shape = inner.samples, tuple(shape)

    def dense(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """See :class:`PerSample`."""
        parts = self.inner.dense(start, stop, dtype)
        pulled = parts.new_zeros((stop - start, *self.shape))
        for one, part in zip(pulled, parts, strict=True):
            one.copy_(self.pullback(part))
        return pulled

    def sum(self, dtype: torch.dtype, weights: Tensor | None = None) -> Tensor:
        """See :class:`PerSample`."""
        return self.pullback(self.inner.sum(dtype, weights)).to(dtype)

    def _size(self) -> int:
        return max(math.prod(self.shape), math.prod(self.inner.shape))
