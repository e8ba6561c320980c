"""The exact scale of Kronecker factors: squares of per-sample gradients in their bases (EKFAC)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cl_optim.fisher.kronecker.sums import Matrices
from cl_optim.fisher.kronecker.used import Used
from cl_optim.fisher.per_sample.base import PerSample
from cl_optim.fisher.per_sample.combine import combine
from cl_optim.fisher.per_sample.matrices import Outer
from cl_optim.fisher.per_sample.tables import LookedUp
from cl_optim.fisher.per_sample.views import Geometry, ViewOf
from cl_optim.importance.kronecker.factors import Factors
from cl_optim.importance.kronecker.side import Side


class Scales(Matrices):
    """Adds S = Σ_n (U_Gᵀ g̃_n U_A)², and nothing of parameters without factors.

    What lies beyond the directions that are kept, in a tail, keeps the scale of the factors'
    product.

    Args:
        factors: Of each matrix, by the name of its weight.
    """

    def __init__(self, factors: Mapping[str, Factors]) -> None:
        self._factors = factors
        # Contiguous, without the tails' row and column.
        self._sums = {
            name: torch.zeros_like(one.scale[:-1, :-1], memory_format=torch.contiguous_format)
            for name, one in factors.items()
        }

    def add(self, name: str, uses: Sequence[Used], again: bool) -> bool:
        """See :class:`Matrices`."""
        if name in self._factors:
            factors, sums = self._factors[name], self._sums[name]
            if all(_turned(use.grads) is not None for use in uses):
                # The weight as it lies: its rows are the matrix's inputs, where it is transposed.
                rotated = combine([_rotated(use, factors) for use in uses])
                rotated.add_squares_(sums.mT if factors.layout.transposed else sums)
            else:
                _Rotated(uses, factors).add_squares_(sums)
        return True

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """See :class:`Matrices`."""
        yield from self._sums.items()

    def exact(self, samples: float) -> dict[str, Factors]:
        """Return the factors with their scale as summed here, over so many samples."""
        exact = {}
        for name, one in self._factors.items():
            scale = one.scale.clone()
            scale[:-1, :-1] = self._sums[name] / samples
            exact[name] = replace(one, scale=scale)
        return exact


class _Rotated(PerSample):
    """UᵀG̃U of gradients of any kind, formed one by one."""

    def __init__(self, uses: Sequence[Used], factors: Factors) -> None:
        self._factors = factors
        self._weight = combine([use.grads for use in uses])
        biases = [use.bias for use in uses if use.bias is not None]
        inside = factors.layout.bias is not None
        self._bias = combine(biases) if inside else None
        self.samples, self.shape = (
            self._weight.samples,
            (
                factors.output.rank,
                factors.input.rank,
            ),
        )

    def dense(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """See :class:`PerSample`."""
        layout = self._factors.layout
        grads = self._weight.dense(start, stop, dtype)
        matrix = grads.mT if layout.transposed else grads.flatten(2)
        if self._bias is not None:
            matrix = torch.cat([matrix, self._bias.dense(start, stop, dtype).unsqueeze(2)], 2)
        return self._factors.coordinates(matrix)

    def _size(self) -> int:
        layout = self._factors.layout
        return max(math.prod(self.shape), layout.outputs * layout.inputs)


def _turned(grads: PerSample) -> Outer | LookedUp | None:
    """Return gradients of a whole matrix as what they are, if it was used the other way round."""
    if isinstance(grads, (Outer, LookedUp)):
        return grads
    if isinstance(grads, ViewOf) and isinstance(grads.inner, Outer):
        length, width = grads.shape[0], math.prod(grads.shape[1:])
        if grads.geometry == Geometry((length, width), (width, 1), 0):
            return grads.inner
        if grads.geometry == Geometry((width, length), (1, width), 0):
            return grads.inner.transposed()
    return None


def _rotated(use: Used, factors: Factors) -> PerSample:
    """Return the gradients of the weight [R, C] in the coordinates of both of its sides."""
    grads, layout = _turned(use.grads), factors.layout
    rows, columns = factors.output, factors.input
    if layout.transposed:
        rows, columns = columns, rows
    if isinstance(grads, LookedUp):
        inside = layout.bias is not None  # and then nothing was added to what is looked up
        right = _coordinates(grads.grads, columns, 0.0 if inside else None)
        if rows.basis is None:
            return LookedUp(grads.indices, right, rows.size)
        return Outer(right, _rows_of_basis(grads.indices, rows), grads.samples)
    assert isinstance(grads, Outer)
    last: float | None = None
    if layout.bias is not None:
        last = 1.0 if use.partner == layout.bias else 0.0
    left = _coordinates(grads.grads, rows, last if layout.transposed else None)
    right = _coordinates(grads.inputs, columns, None if layout.transposed else last)
    return Outer(right, left, grads.samples, grads.cu_seqlens, grads.pad)


def _coordinates(x: Tensor, side: Side, last: float | None) -> Tensor:
    """Return Uᵀx; ``last`` is the input of the bias."""
    x = x.float()
    return side.coordinates(x if last is None else torch.nn.functional.pad(x, (0, 1), value=last))


def _rows_of_basis(indices: Tensor, side: Side) -> Tensor:
    """Return Uᵀe of one-hot e: [N, T] → [N, T, rank]."""
    assert side.basis is not None
    blocks, width, _ = side.basis.shape
    rows = side.basis[indices // width, indices % width]  # [N, T, r]
    if blocks == 1:
        return rows
    among = torch.nn.functional.one_hot(indices // width, blocks).to(rows.dtype)
    return (among.unsqueeze(-1) * rows.unsqueeze(-2)).flatten(-2)
