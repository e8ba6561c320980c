"""Of the weight of a convolution."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_optim.fisher.per_sample.base import PerSample, at_most, samples_at_once
from cl_optim.ops.squared_grad import squared_grad_sum_


@dataclass(frozen=True)
class Convolution:
    """The geometry of a convolution in one, two or three dimensions."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]  # before and after, for each dimension
    dilation: tuple[int, ...]
    groups: int

    def windows(self, input: Tensor) -> Tensor:
        """Return what each position sees: [N, C, *spatial] → [N, groups, C/groups·kernel, L]."""
        windows = self._unfolded(input)
        return windows.flatten(3 + len(self.kernel)).flatten(2, 2 + len(self.kernel))

    def all_windows(self, input: Tensor) -> Tensor:
        """Return the same of all samples together: [groups, C/groups·kernel, N·L]."""
        kernel = len(self.kernel)
        windows = self._unfolded(input).movedim(0, 2 + kernel)
        return windows.flatten(2 + kernel).flatten(1, 1 + kernel)

    def _unfolded(self, input: Tensor) -> Tensor:
        """Return a view: [N, groups, C/groups, *kernel, *positions]."""
        around = [side for pair in reversed(self.padding) for side in pair]
        windows = F.pad(input, around) if any(around) else input
        spatial = len(self.kernel)
        for i, (kernel, stride, dilation) in enumerate(
            zip(self.kernel, self.stride, self.dilation, strict=True)
        ):
            windows = windows.unfold(2 + i, (kernel - 1) * dilation + 1, stride)
        steps: Any = (..., *(slice(None, None, dilation) for dilation in self.dilation))
        windows = windows[steps]
        windows = windows.view(len(input), self.groups, -1, *windows.shape[2:])
        # Positions come last, in which runs are longest: copies are of runs.
        positions = range(3, 3 + spatial)
        return windows.permute(0, 1, 2, *range(3 + spatial, 3 + 2 * spatial), *positions)


class Convolved(PerSample):
    """Of the weight [out, in/groups, *kernel] of a convolution.

    Args:
        input: [N·frames, in, *spatial]; a sample may have several frames.
        grads: The gradient of the output, [N·frames, out, *positions].
        geometry: Of the convolution.
        samples: N.
        transposed: Input and gradient have changed places, as for a transposed convolution.
    """

    def __init__(
        self,
        input: Tensor,
        grads: Tensor,
        geometry: Convolution,
        samples: int,
        transposed: bool = False,
    ) -> None:
        self.input, self.grads, self.geometry = input, grads, geometry
        self.transposed = transposed
        self.samples, self.frames = samples, len(input) // max(1, samples)
        self.shape = (grads.shape[1], input.shape[1] // geometry.groups, *geometry.kernel)

    def _factors(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return windows [N, groups, in·kernel, L] and gradients [N, groups, out, L]."""
        part = slice(start * self.frames, stop * self.frames)
        windows = self.geometry.windows(self.input[part])
        count, groups, frames = stop - start, self.geometry.groups, self.frames
        positions = windows.shape[3]
        grads = self.grads[part].reshape(count * frames, groups, -1, positions)
        if frames == 1:
            return windows, grads
        return (
            windows.view(count, frames, groups, -1, positions).movedim(1, 3).flatten(3),
            grads.view(count, frames, groups, -1, positions).movedim(1, 3).flatten(3),
        )

    def _step(self, gradient: bool) -> int:
        """Return how many samples have windows, and gradients if they are formed, at once."""
        channels = self.input.shape[1] * math.prod(self.geometry.kernel)
        size = self.frames * self.grads[:1, :1].numel() * channels
        if gradient:
            size = max(size, math.prod(self.shape))
        return samples_at_once(size * 4)

    def rows(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield, some samples at a time, windows [groups, N·L, ...] and gradients likewise."""
        step = self._step(gradient=False)
        for start in range(0, self.samples, step):
            part = slice(start * self.frames, min(start + step, self.samples) * self.frames)
            windows = self.geometry.all_windows(self.input[part])
            grads = self.grads[part].flatten(2)
            grads = grads.reshape(len(grads), self.geometry.groups, -1, grads.shape[2])
            yield windows.mT, grads.movedim(0, 2).flatten(2).mT

    def dense(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """See :class:`PerSample`."""
        windows, grads = self._factors(start, stop)
        return (grads.to(dtype) @ windows.to(dtype).mT).reshape(stop - start, *self.shape)

    def add_squares_(self, out: Tensor, total: Tensor | None = None) -> None:
        """See :class:`PerSample`."""
        if self.geometry.groups > 1 or not out.is_contiguous():
            super().add_squares_(out, total)
            return
        matrix = (self.shape[0], math.prod(self.shape[1:]))
        squares, sums = out.view(matrix), None if total is None else total.view(matrix)
        step = self._step(gradient=False)
        for start in range(0, self.samples, step):
            windows, grads = self._factors(start, min(start + step, self.samples))
            a, b = windows.squeeze(1).mT, grads.squeeze(1).mT
            squared_grad_sum_(squares, at_most(a, out.dtype), at_most(b, out.dtype), sums)

    def _parts(self, dtype: torch.dtype) -> Iterator[Tensor]:
        step = self._step(gradient=True)
        for start in range(0, self.samples, step):
            yield self.dense(start, min(start + step, self.samples), dtype)
