"""Per-sample gradients of a parameter, held in the factors that make them.

The gradient of sample n is rarely needed itself: what is added up is its square. Each class here
knows how to do that for one way of using a parameter, in O(parameter) memory beside its factors.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_optim.ops.squared_grad import squared_grad_sum_

# Bytes of per-sample gradients, or of unfolded input, formed at once.
CHUNK_BYTES = 2**24


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
        """The gradients in chunks of samples; each may be overwritten."""
        step = max(1, CHUNK_BYTES // max(1, self._size() * dtype.itemsize))
        for start in range(0, self.samples, step):
            yield self.dense(start, min(start + step, self.samples), dtype)

    def _size(self) -> int:
        """Elements formed for each sample."""
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


class Outer(PerSample):
    """Of a matrix [out, in] that maps inputs a_n [T, in]: g_n = b_nᵀ a_n.

    Args:
        inputs: a, [N, T, in], or packed, [ΣT, in].
        grads: b, [N, T, out] or [ΣT, out], the gradients of what the matrix put out.
        samples: N.
        cu_seqlens: Offsets of the packed samples.
        pad: Makes [N, longest T, ...] of something packed.
    """

    def __init__(
        self,
        inputs: Tensor,
        grads: Tensor,
        samples: int,
        cu_seqlens: Tensor | None = None,
        pad: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.inputs, self.grads, self.samples = inputs, grads, samples
        self.cu_seqlens, self.pad = cu_seqlens, pad
        self.shape = (grads.shape[-1], inputs.shape[-1])

    def padded(self) -> Outer:
        """Return the same, not packed."""
        if self.pad is None:
            return self
        return Outer(self.pad(self.inputs), self.pad(self.grads), self.samples)

    def transposed(self) -> Outer:
        """Return the gradients of the transposed matrix."""
        return Outer(self.grads, self.inputs, self.samples, self.cu_seqlens, self.pad)

    def dense(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """See :class:`PerSample`."""
        whole = self.padded()
        inputs, grads = whole.inputs[start:stop].to(dtype), whole.grads[start:stop].to(dtype)
        return torch.bmm(grads.mT, inputs)

    def add_squares_(self, out: Tensor, total: Tensor | None = None) -> None:
        """See :class:`PerSample`."""
        if out.is_contiguous():
            self._add_squares(out, total)
        elif out.mT.is_contiguous() and (total is None or total.mT.is_contiguous()):
            self.transposed()._add_squares(out.mT, None if total is None else total.mT)
        else:  # some other view of a parameter's sums
            squares = torch.zeros_like(out, memory_format=torch.contiguous_format)
            sums = None if total is None else torch.zeros_like(squares)
            self._add_squares(squares, sums)
            out += squares
            if total is not None and sums is not None:
                total += sums

    def _add_squares(self, out: Tensor, total: Tensor | None) -> None:
        inputs, grads = (_at_most(tensor, out.dtype) for tensor in (self.inputs, self.grads))
        squared_grad_sum_(out, inputs, grads, total, cu_seqlens=self.cu_seqlens)

    def sum(self, dtype: torch.dtype, weights: Tensor | None = None) -> Tensor:
        """See :class:`PerSample`."""
        if weights is None:  # as autograd would: in the dtype of the factors
            grads, inputs = self.grads.flatten(0, -2), self.inputs.flatten(0, -2)
            common = torch.promote_types(grads.dtype, inputs.dtype)
            return (grads.to(common).mT @ inputs.to(common)).to(dtype)
        whole = self.padded()
        total = torch.zeros(self.shape, dtype=dtype, device=self.grads.device)
        row = whole.inputs.shape[1] * sum(self.shape) * dtype.itemsize
        step = max(1, CHUNK_BYTES // max(1, row))
        for start in range(0, self.samples, step):
            part = slice(start, start + step)
            scaled = whole.inputs[part].to(dtype) * weights[part].to(dtype).view(-1, 1, 1)
            total.addmm_(whole.grads[part].to(dtype).flatten(0, 1).mT, scaled.flatten(0, 1))
        return total


class Rows(PerSample):
    """Of a table [V, *row] that is looked up: a few rows per sample, never N tables.

    ``index_add_`` is atomic on a GPU: sums are the same to the bit only where torch is told to use
    deterministic algorithms, and sorts the rows for each sum.

    Args:
        indices: int64 [N, T].
        grads: The gradients of what was looked up, [N, T, *row].
        table: Number of rows V.
    """

    def __init__(self, indices: Tensor, grads: Tensor, table: int) -> None:
        self.indices, self.grads, self.table = indices, grads, table
        self.samples = len(indices)
        self.shape = (table, *grads.shape[2:])

    def merged(self, dtype: torch.dtype) -> Tensor:
        """Return [N, T, *row], where what a sample has of one row is added up in one place.

        The other places of that row are zero: (Σ g)² is then Σ g², with no need to know how many
        different rows there are, which would have to wait for the device.
        """
        samples, tokens = self.indices.shape
        first = torch.arange(samples, device=self.indices.device).unsqueeze(1) * self.table
        keys, order = (first + self.indices).flatten().sort()
        begins = torch.ones_like(keys, dtype=torch.bool)
        begins[1:] = keys[1:] != keys[:-1]
        position = torch.arange(len(keys), device=keys.device)
        place = order[torch.where(begins, position, 0).cummax(0).values] if len(keys) else order
        rows = self.grads.flatten(0, 1).to(dtype)
        merged = torch.zeros_like(rows).index_add_(0, place, rows[order])
        return merged.view(samples, tokens, *self.shape[1:])

    def dense(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """See :class:`PerSample`."""
        count = stop - start
        flat = torch.zeros(
            count * self.table, *self.shape[1:], dtype=dtype, device=self.grads.device
        )
        first = torch.arange(count, device=self.indices.device).unsqueeze(1) * self.table
        places = (first + self.indices[start:stop]).flatten()
        flat.index_add_(0, places, self.grads[start:stop].flatten(0, 1).to(dtype))
        return flat.view(count, *self.shape)

    def add_squares_(self, out: Tensor, total: Tensor | None = None) -> None:
        """See :class:`PerSample`."""
        merged = self.merged(out.dtype).flatten(0, 1)
        if total is not None:
            total.index_add_(0, self.indices.flatten(), merged)
        out.index_add_(0, self.indices.flatten(), merged.square_())

    def add_magnitudes_(self, out: Tensor) -> None:
        """See :class:`PerSample`."""
        out.index_add_(0, self.indices.flatten(), self.merged(out.dtype).flatten(0, 1).abs_())

    def sum(self, dtype: torch.dtype, weights: Tensor | None = None) -> Tensor:
        """See :class:`PerSample`."""
        grads = self.grads.to(dtype)
        if weights is not None:
            grads = grads * weights.to(dtype).view(-1, *[1] * (grads.dim() - 1))
        total = torch.zeros(self.shape, dtype=dtype, device=grads.device)
        return total.index_add_(0, self.indices.flatten(), grads.flatten(0, 1))


class OuterAndRows(PerSample):
    """Of a matrix that is also looked up, as where a language model's head is its embedding.

    (B + E)² = B² + E(2B + E), where E has few rows: B² goes by the kernel, and of B in the second
    term only those rows are formed.
    """

    def __init__(self, outer: Outer, rows: Rows) -> None:
        self.outer, self.rows = outer.padded(), rows
        self.samples, self.shape = outer.samples, outer.shape

    def dense(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """See :class:`PerSample`."""
        return self.outer.dense(start, stop, dtype) + self.rows.dense(start, stop, dtype)

    def add_squares_(self, out: Tensor, total: Tensor | None = None) -> None:
        """See :class:`PerSample`."""
        self.outer.add_squares_(out, total)
        merged = self.rows.merged(out.dtype)
        indices = self.rows.indices
        if total is not None:
            total.index_add_(0, indices.flatten(), merged.flatten(0, 1))
        bytes_each = self.outer.inputs.shape[1] * indices.shape[1] * out.dtype.itemsize
        step = max(1, CHUNK_BYTES // max(1, bytes_each))
        for start in range(0, self.samples, step):
            part = slice(start, start + step)
            # b_n of just the rows that sample n looked up: [n, T_head, T_rows]
            chosen = indices[part].unsqueeze(1).expand(-1, self.outer.grads.shape[1], -1)
            grads = self.outer.grads[part].gather(2, chosen).to(out.dtype)
            product = torch.bmm(grads.mT, self.outer.inputs[part].to(out.dtype))
            both = product.mul_(2).add_(merged[part]).mul_(merged[part])
            out.index_add_(0, indices[part].flatten(), both.flatten(0, 1))
        # Where E nearly cancels B, rounding could leave a square below 0.
        out.index_copy_(0, indices.flatten(), out[indices.flatten()].clamp_min_(0.0))

    def sum(self, dtype: torch.dtype, weights: Tensor | None = None) -> Tensor:
        """See :class:`PerSample`."""
        return self.outer.sum(dtype, weights) + self.rows.sum(dtype, weights)


class Experts(PerSample):
    """Of matrices [E, in, out], one for each expert: each maps some of the samples' rows.

    Args:
        inputs: [R, in].
        grads: Of what the matrices put out, [R, out].
        expert: Of each row, int64 [R]; E for rows that no expert maps.
        sample: Of each row, int64 [R].
        samples: N.
        experts: E.
    """

    def __init__(
        self,
        inputs: Tensor,
        grads: Tensor,
        expert: Tensor,
        sample: Tensor,
        samples: int,
        experts: int,
    ) -> None:
        self.inputs, self.grads = inputs, grads
        self.expert, self.sample = expert, sample
        self.samples, self.experts = samples, experts
        self.shape = (experts, inputs.shape[1], grads.shape[1])

    def transposed(self) -> Experts:
        """Return the gradients of the transposed matrices."""
        swapped = self.grads, self.inputs
        return Experts(*swapped, self.expert, self.sample, self.samples, self.experts)

    def of(self, indices: Tensor, experts: int) -> Experts:
        """Return the gradients of E matrices, of which these are the ones at ``indices``."""
        expert = indices[self.expert]
        return Experts(self.inputs, self.grads, expert, self.sample, self.samples, experts)

    def _each(self) -> Iterator[tuple[int, Outer]]:
        """Each expert that has rows, and its gradients, transposed: [in, out]."""
        order = (self.expert * self.samples + self.sample).argsort(stable=True)
        counts = torch.bincount(self.expert, minlength=self.experts)[: self.experts]
        samples = torch.arange(self.samples + 1, device=order.device)
        start = 0
        for expert, count in enumerate(counts.tolist()):
            if count:
                rows = order[start : start + count]
                cu_seqlens = torch.searchsorted(self.sample[rows], samples).to(torch.int32)
                a, b = self.inputs[rows], self.grads[rows]
                yield (
                    expert,
                    Outer(b, a, self.samples, cu_seqlens, _padding(self.sample[rows], cu_seqlens)),
                )
            start += count

    def dense(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """See :class:`PerSample`."""
        whole = torch.zeros((stop - start, *self.shape), dtype=dtype, device=self.grads.device)
        for expert, outer in self._each():
            whole[:, expert] = outer.dense(start, stop, dtype)
        return whole

    def add_squares_(self, out: Tensor, total: Tensor | None = None) -> None:
        """See :class:`PerSample`."""
        for expert, outer in self._each():
            outer.add_squares_(out[expert], None if total is None else total[expert])

    def add_magnitudes_(self, out: Tensor) -> None:
        """See :class:`PerSample`."""
        for expert, outer in self._each():
            outer.add_magnitudes_(out[expert])

    def sum(self, dtype: torch.dtype, weights: Tensor | None = None) -> Tensor:
        """See :class:`PerSample`."""
        total = torch.zeros(self.shape, dtype=dtype, device=self.grads.device)
        for expert, outer in self._each():
            total[expert] = outer.sum(dtype, weights)
        return total


def _padding(sample: Tensor, cu_seqlens: Tensor) -> Callable[[Tensor], Tensor]:
    """What makes [N, most rows, ...] of rows that are sorted by sample; waits for the device."""

    def pad(parts: Tensor) -> Tensor:
        position = torch.arange(len(parts), device=parts.device) - cu_seqlens.long()[sample]
        longest = int(cu_seqlens.diff().max())
        padded = parts.new_zeros((len(cu_seqlens) - 1, longest, *parts.shape[1:]))
        return padded.index_put_((sample, position), parts)

    return pad


class Entries(PerSample):
    """Of a table [V, *row], some rows of which were used, each by one sample.

    Args:
        indices: Of each use, int64 [R].
        sample: Of each use, int64 [R].
        grads: [R, *row].
        samples: N.
        table: V.
    """

    def __init__(
        self, indices: Tensor, sample: Tensor, grads: Tensor, samples: int, table: int
    ) -> None:
        self.indices, self.sample, self.grads = indices, sample, grads
        self.samples, self.shape = samples, (table, *grads.shape[1:])

    def of(self, indices: Tensor, table: int) -> Entries:
        """Return the gradients of a table, of which this is what is at ``indices``."""
        chosen = indices[self.indices]
        return Entries(chosen, self.sample, self.grads, self.samples, table)

    def dense(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """See :class:`PerSample`."""
        inside = (self.sample >= start) & (self.sample < stop)
        places = (self.sample - start) * self.shape[0] + self.indices
        spare = (stop - start) * self.shape[0]  # of the other samples
        flat = self.grads.new_zeros((spare + 1, *self.shape[1:]), dtype=dtype)
        flat.index_add_(0, torch.where(inside, places, spare), self.grads.to(dtype))
        return flat[:-1].view(stop - start, *self.shape)


@dataclass(frozen=True)
class Convolution:
    """The geometry of a convolution in one, two or three dimensions."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]  # before and after, for each dimension
    dilation: tuple[int, ...]
    groups: int

    def windows(self, input: Tensor) -> Tensor:
        """What each output position sees: [N, C, *spatial] → [N, groups, C/groups·kernel, L]."""
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
        # [N, groups, C/groups, *positions, *kernel]; positions come last, in which runs are longest
        positions = range(3, 3 + spatial)
        windows = windows.permute(0, 1, 2, *range(3 + spatial, 3 + 2 * spatial), *positions)
        flat: Tensor = windows.flatten(3 + spatial).flatten(2, 2 + spatial)
        return flat


class Convolved(PerSample):
    """Of the weight [out, in/groups, *kernel] of a convolution.

    Args:
        input: [N·frames, in, *spatial]; a sample may have several frames.
        grads: The gradient of the output, [N·frames, out, *positions].
        geometry: Of the convolution.
        samples: N.
    """

    def __init__(self, input: Tensor, grads: Tensor, geometry: Convolution, samples: int) -> None:
        self.input, self.grads, self.geometry = input, grads, geometry
        self.samples, self.frames = samples, len(input) // max(1, samples)
        self.shape = (grads.shape[1], input.shape[1] // geometry.groups, *geometry.kernel)

    def _factors(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Windows [N, groups, in·kernel, L] and gradients [N, groups, out, L]."""
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
        """Samples per chunk, whose windows, and gradients if they are formed, are bounded."""
        channels = self.input.shape[1] * math.prod(self.geometry.kernel)
        size = self.frames * self.grads[:1, :1].numel() * channels
        if gradient:
            size = max(size, math.prod(self.shape))
        return max(1, CHUNK_BYTES // max(1, size * 4))

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
            squared_grad_sum_(squares, _at_most(a, out.dtype), _at_most(b, out.dtype), sums)

    def _parts(self, dtype: torch.dtype) -> Iterator[Tensor]:
        step = self._step(gradient=True)
        for start in range(0, self.samples, step):
            yield self.dense(start, min(start + step, self.samples), dtype)


# --- gradients of what a tensor was made from -----------------------------------------------------


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
        """Whether no element is in it twice."""
        reach = 0
        for stride, size in sorted(zip(self.stride, self.size, strict=True)):
            if size > 1:
                if stride <= reach:
                    return False
                reach += stride * (size - 1)
        return True

    def is_apart_from(self, other: Geometry) -> bool:
        """Whether the two surely share no element: slices of one tensor along its dimensions."""
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
        pull: Turns one of those into one with respect to the tensor.
        shape: The tensor's.
    """

    def __init__(
        self, inner: PerSample, pull: Callable[[Tensor], Tensor], shape: Sequence[int]
    ) -> None:
        self.inner, self.pull = inner, pull
        self.samples, self.shape = inner.samples, tuple(shape)

    def dense(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """See :class:`PerSample`."""
        parts = self.inner.dense(start, stop, dtype)
        pulled = parts.new_zeros((stop - start, *self.shape))
        for one, part in zip(pulled, parts, strict=True):
            one.copy_(self.pull(part))
        return pulled

    def sum(self, dtype: torch.dtype, weights: Tensor | None = None) -> Tensor:
        """See :class:`PerSample`."""
        return self.pull(self.inner.sum(dtype, weights)).to(dtype)

    def _size(self) -> int:
        return max(math.prod(self.shape), math.prod(self.inner.shape))


# --- a tensor that is used several times ----------------------------------------------------------


class Sum(PerSample):
    """Several uses of one tensor: their gradients add, for each sample, before the square."""

    def __init__(self, uses: Sequence[PerSample]) -> None:
        self.uses = list(uses)
        self.samples, self.shape = uses[0].samples, uses[0].shape

    def dense(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """See :class:`PerSample`."""
        first, *others = (use.dense(start, stop, dtype) for use in self.uses)
        for other in others:
            first += other
        return first


class Apart(PerSample):
    """Several uses, each of another part of one tensor: no element has two of them."""

    def __init__(self, uses: Sequence[PerSample]) -> None:
        self.uses = list(uses)
        self.samples, self.shape = uses[0].samples, uses[0].shape

    def dense(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """See :class:`PerSample`."""
        return Sum(self.uses).dense(start, stop, dtype)

    def add_squares_(self, out: Tensor, total: Tensor | None = None) -> None:
        """See :class:`PerSample`."""
        for use in self.uses:
            use.add_squares_(out, total)

    def add_magnitudes_(self, out: Tensor) -> None:
        """See :class:`PerSample`."""
        for use in self.uses:
            use.add_magnitudes_(out)


def combine(uses: Sequence[PerSample]) -> PerSample:
    """Return the sum of several uses of one tensor, in the form that takes the least work."""
    if len(uses) == 1:
        return uses[0]
    dense = [use for use in uses if isinstance(use, Dense)]
    outer = [use for use in uses if isinstance(use, Outer)]
    rows = [use for use in uses if isinstance(use, Rows)]
    views = [use for use in uses if isinstance(use, ViewOf)]
    if len(dense) == len(uses):
        return Dense(torch.stack([use.grads for use in dense]).sum(0))
    if len(outer) + len(rows) == len(uses):
        parts: list[PerSample] = []
        if len(outer) == 1:
            parts.append(outer[0])
        elif outer:
            whole = [use.padded() for use in outer]
            inputs = torch.cat([use.inputs for use in whole], 1)
            grads = torch.cat([use.grads for use in whole], 1)
            parts.append(Outer(inputs, grads, uses[0].samples))
        if rows:
            indices = torch.cat([use.indices for use in rows], 1)
            parts.append(Rows(indices, torch.cat([use.grads for use in rows], 1), rows[0].table))
        match parts:
            case [Outer() as both, Rows() as looked_up]:
                return OuterAndRows(both, looked_up)
            case _:
                return parts[0]
    if len(views) == len(uses):
        by_geometry: dict[Geometry, list[PerSample]] = {}
        for use in views:
            by_geometry.setdefault(use.geometry, []).append(use.inner)
        merged = [ViewOf(combine(same), view, uses[0].shape) for view, same in by_geometry.items()]
        if all(
            a.is_apart_from(b)
            for i, a in enumerate(by_geometry)
            for b in list(by_geometry)[i + 1 :]
        ):
            return Apart(merged)
        return Sum(merged)
    return Sum(uses)


def _at_most(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to ``dtype`` if it is wider: a float32 parameter may be used as float64."""
    return tensor.to(dtype) if tensor.dtype.itemsize > dtype.itemsize else tensor
