"""Of a matrix, or one matrix for each expert: outer products of inputs and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from cl_optim.fisher.per_sample.base import PerSample, at_most, samples_at_once
from cl_optim.ops.squared_grad import squared_grad_sum_


class Outer(PerSample):
    """Of a matrix [out, in] that maps inputs a_n [T, in]: g_n = b_nᵀ a_n.

    Args:
        inputs: a, [N, T, in], or packed, [ΣT, in].
        grads: b, [N, T, out] or [ΣT, out], the gradients of what the matrix put out.
        samples: N.
        cu_seqlens: Offsets of the packed samples.
        pad: Makes [N, longest T, ...] of something packed.
        flipped: a and b have changed places: ``inputs`` are the gradients. The matrix is [in, out].
    """

    def __init__(
        self,
        inputs: Tensor,
        grads: Tensor,
        samples: int,
        cu_seqlens: Tensor | None = None,
        pad: Callable[[Tensor], Tensor] | None = None,
        flipped: bool = False,
    ) -> None:
        self.inputs, self.grads, self.samples = inputs, grads, samples
        self.cu_seqlens, self.pad, self.flipped = cu_seqlens, pad, flipped
        self.shape = (grads.shape[-1], inputs.shape[-1])

    def padded(self) -> Outer:
        """Return the same, not packed."""
        if self.pad is None:
            return self
        return Outer(
            self.pad(self.inputs), self.pad(self.grads), self.samples, flipped=self.flipped
        )

    def transposed(self) -> Outer:
        """Return the gradients of the transposed matrix."""
        sides = self.grads, self.inputs
        return Outer(*sides, self.samples, self.cu_seqlens, self.pad, not self.flipped)

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
        inputs, grads = (at_most(tensor, out.dtype) for tensor in (self.inputs, self.grads))
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
        step = samples_at_once(row)
        for start in range(0, self.samples, step):
            part = slice(start, start + step)
            scaled = whole.inputs[part].to(dtype) * weights[part].to(dtype).view(-1, 1, 1)
            total.addmm_(whole.grads[part].to(dtype).flatten(0, 1).mT, scaled.flatten(0, 1))
        return total


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
        """Yield each expert that has rows, and its gradients, transposed: [in, out]."""
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
    """Return what makes [N, most rows, ...] of rows sorted by sample; that waits for the device."""

    def pad(parts: Tensor) -> Tensor:
        position = torch.arange(len(parts), device=parts.device) - cu_seqlens.long()[sample]
        longest = int(cu_seqlens.diff().max())
        padded = parts.new_zeros((len(cu_seqlens) - 1, longest, *parts.shape[1:]))
        return padded.index_put_((sample, position), parts)

    return pad
