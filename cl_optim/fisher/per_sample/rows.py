"""The rows whose outer products make a matrix's gradients: inputs, and gradients of outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from cl_optim.fisher.per_sample.base import Bias, Dense, PerSample
from cl_optim.fisher.per_sample.convolutions import Convolved
from cl_optim.fisher.per_sample.matrices import Experts, Outer
from cl_optim.fisher.per_sample.tables import Entries, LookedUp
from cl_optim.fisher.per_sample.views import ViewOf


class Way(NamedTuple):
    """How a parameter [R, ...], seen as a matrix [R, C], is used by rows.

    Attributes:
        start: The first of the R that the use concerns.
        size: How many of them a group has.
        groups: Number of groups, one after another; each has inputs of its own.
        forward: The matrix's rows are outputs; else its columns are.
        looked_up: What went in is one-hot: an index.
    """

    start: int
    size: int
    groups: int = 1
    forward: bool = True
    looked_up: bool = False


@dataclass(frozen=True)
class Rows:
    """The rows of one use.

    Attributes:
        way: How they make the gradient.
        leading: The shape that they had: [N, T], or [ΣT] where packed; () where none is known.
        parts: Yields inputs [groups, rows, in], or indices int64 [rows] of lookups, and gradients
            [groups, rows, out], a part of the rows at a time.
        counted: Of lookups: which there are, bool; ``None``: all.
    """

    way: Way
    leading: tuple[int, ...]
    parts: Callable[[], Iterator[tuple[Tensor, Tensor]]]
    counted: Tensor | None = None


def rows_of(grads: PerSample) -> Rows | str:
    """Return the rows that make the gradients of a parameter; or, in short, why there are none."""
    shape = grads.shape
    if len(shape) < 2:
        return "not a matrix"
    length, width = shape[0], math.prod(shape[1:])
    inner, start = grads, 0
    if isinstance(grads, ViewOf):
        inner, size, strides = grads.inner, grads.geometry.size, grads.geometry.stride
        start, rest = divmod(grads.geometry.offset, max(1, width))
        whole = rest == 0 and math.prod(size[1:]) == width and strides == _contiguous(size)
        turned = rest == 0 and size[:1] == (width,) and strides == (1, width)
        if turned and isinstance(inner, Outer) and not whole:
            inner = inner.transposed()
        elif not whole:
            return "a view of it is used that is no slice of rows"
    if isinstance(inner, Outer):
        return _products(inner, start, length, len(shape))
    if isinstance(inner, LookedUp):
        return _lookups(inner, start, length, len(shape))
    if isinstance(inner, Convolved):
        if inner.transposed:
            return "a transposed convolution"
        groups = inner.geometry.groups
        return Rows(Way(start, inner.shape[0] // groups, groups), (), inner.rows)
    for kind, why in _WHY_NOT:
        if isinstance(inner, kind):
            return why
    return "a function of it is used"


_WHY_NOT = (
    (Dense, "not used as a matrix"),
    (Experts, "one matrix for each expert"),
    (Entries, "rows of it are used"),
)


def _products(outer: Outer, start: int, length: int, dimensions: int) -> Rows | str:
    if outer.flipped and (outer.shape[0] != length or dimensions > 2):
        return "a part of its inputs is used"
    a, b = (outer.grads, outer.inputs) if outer.flipped else (outer.inputs, outer.grads)
    way = Way(start, outer.shape[0], forward=not outer.flipped)

    def parts() -> Iterator[tuple[Tensor, Tensor]]:
        yield a.flatten(0, -2).unsqueeze(0), b.flatten(0, -2).unsqueeze(0)

    return Rows(way, tuple(a.shape[:-1]), parts)


def _lookups(table: LookedUp, start: int, length: int, dimensions: int) -> Rows | str:
    if dimensions > 2:
        return "a table of more than two dimensions"

    def parts() -> Iterator[tuple[Tensor, Tensor]]:
        yield table.indices.flatten() + start, table.grads.flatten(0, 1).unsqueeze(0)

    way = Way(0, length, forward=False, looked_up=True)
    return Rows(way, tuple(table.indices.shape), parts, table.counted)


def bias_range(grads: PerSample) -> tuple[int, int] | None:
    """Return which outputs a bias, or a slice of it, is added to; None of what is none."""
    if isinstance(grads, Bias):
        return 0, grads.shape[0]
    if isinstance(grads, ViewOf) and isinstance(grads.inner, Bias) and len(grads.shape) == 1:
        geometry = grads.geometry
        return (geometry.offset, geometry.size[0]) if geometry.stride == (1,) else None
    return None


def output_range(rows: Rows, grads: PerSample) -> tuple[int, int]:
    """Return which outputs a use of a matrix concerns: the first, and how many."""
    if not rows.way.forward:
        return 0, math.prod(grads.shape[1:])
    return rows.way.start, rows.way.size * rows.way.groups


def _contiguous(size: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(size[i + 1 :]) for i in range(len(size)))
