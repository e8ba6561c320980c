"""Of a table that is looked up: a few rows for each sample."""

from __future__ import annotations

import torch
from torch import Tensor

from cl_optim.fisher.per_sample.base import PerSample, samples_at_once
from cl_optim.fisher.per_sample.matrices import Outer


class LookedUp(PerSample):
    """Of a table [V, *row] that is looked up: a few rows per sample, never N tables.

    ``index_add_`` is atomic on a GPU: sums are the same to the bit only where torch is told to use
    deterministic algorithms, and sorts the rows for each sum.

    Args:
        indices: int64 [N, T].
        grads: The gradients of what was looked up, [N, T, *row].
        table: Number of rows V.
        counted: Which of the lookups there are, bool [N, T]: the others only fill up, and have no
            gradient. Default: all.
    """

    def __init__(
        self, indices: Tensor, grads: Tensor, table: int, counted: Tensor | None = None
    ) -> None:
        self.indices, self.grads, self.table, self.counted = indices, grads, table, counted
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


class OuterAndLookedUp(PerSample):
    """Of a matrix that is also looked up, as where a language model's head is its embedding.

    (B + E)² = B² + E(2B + E), where E has few rows: B² goes by the kernel, and of B in the second
    term only those rows are formed.
    """

    def __init__(self, outer: Outer, looked_up: LookedUp) -> None:
        self.outer, self.looked_up = outer.padded(), looked_up
        self.samples, self.shape = outer.samples, outer.shape

    def dense(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """See :class:`PerSample`."""
        return self.outer.dense(start, stop, dtype) + self.looked_up.dense(start, stop, dtype)

    def add_squares_(self, out: Tensor, total: Tensor | None = None) -> None:
        """See :class:`PerSample`."""
        self.outer.add_squares_(out, total)
        merged = self.looked_up.merged(out.dtype)
        indices = self.looked_up.indices
        if total is not None:
            total.index_add_(0, indices.flatten(), merged.flatten(0, 1))
        products = self.outer.inputs.shape[1] * indices.shape[1]
        step = samples_at_once(products * out.dtype.itemsize)
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
        return self.outer.sum(dtype, weights) + self.looked_up.sum(dtype, weights)


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
