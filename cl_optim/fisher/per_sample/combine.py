"""Of a tensor that is used several times: its uses in the form that takes the least work."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cl_optim.fisher.per_sample.base import Dense, PerSample
from cl_optim.fisher.per_sample.matrices import Outer
from cl_optim.fisher.per_sample.tables import LookedUp, OuterAndLookedUp
from cl_optim.fisher.per_sample.views import Geometry, ViewOf


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


class Apart(Sum):
    """Several uses, each of another part of one tensor: no element has two of them."""

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
    looked_up = [use for use in uses if isinstance(use, LookedUp)]
    views = [use for use in uses if isinstance(use, ViewOf)]
    if len(dense) == len(uses):
        return Dense(torch.stack([use.grads for use in dense]).sum(0))
    if len(outer) + len(looked_up) == len(uses):
        parts: list[PerSample] = []
        if len(outer) == 1:
            parts.append(outer[0])
        elif outer:
            whole = [use.padded() for use in outer]
            inputs = torch.cat([use.inputs for use in whole], 1)
            grads = torch.cat([use.grads for use in whole], 1)
            parts.append(Outer(inputs, grads, uses[0].samples))
        if looked_up:
            indices = torch.cat([use.indices for use in looked_up], 1)
            grads = torch.cat([use.grads for use in looked_up], 1)
            parts.append(LookedUp(indices, grads, looked_up[0].table))
        match parts:
            case [Outer() as products, LookedUp() as rows]:
                return OuterAndLookedUp(products, rows)
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
