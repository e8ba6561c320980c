"""What watched tensors are: parameters, views of them, and functions of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from cl_optim.fisher.kronecker.padding import Kept
from cl_optim.fisher.per_sample.base import PerSample
from cl_optim.fisher.per_sample.views import Geometry, ScaledBy, ViewOf
from cl_optim.fisher.samples import Samples

# Turns per-sample gradients of a tensor into those of what it was made of.
Pullback: TypeAlias = Callable[[PerSample], PerSample]
# For each parameter that a tensor was made of, by name.
Pullbacks: TypeAlias = Mapping[str, Pullback]


@dataclass(frozen=True)
class Source:
    """What a watched tensor is: a parameter, a view of one, or a function of one or several.

    Attributes:
        pullbacks: To each of the parameters.
        start: Where the tensor that this is a view of begins in its storage.
        remake: Makes the tensor once more, of the parameters' points (:class:`Points`).
        base: Shape and ``pullbacks`` of the tensor that this is a view of; ``None`` if it is none.
        direct: Whether this is the parameter itself.
        doubt: What to say if the tensor turns out not to be used as a parameter is.
        each_row: Whether it is one matrix for each row of something else.
    """

    pullbacks: Pullbacks
    start: int
    remake: Callable[[], Tensor]
    base: tuple[tuple[int, ...], Pullbacks] | None = None
    direct: bool = False
    doubt: Exception | None = None
    each_row: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters'."""
        return tuple(self.pullbacks)

    @property
    def name(self) -> str:
        """The parameter's, or that of the first."""
        return next(iter(self.pullbacks))


class Graph:
    """Is alive as long as a part of the graph of one forward pass."""


@dataclass
class Pending:
    """What is kept of a use until its gradient comes; no tensors of the graph.

    Attributes:
        gradients: As of a rule's :class:`Use`.
        sources: Of each tensor that ``gradients`` returns something for, if it is watched.
        recomputed: Whether the use is in a backward pass, by activation checkpointing.
        samples: Where the samples are in what was used.
        graph: Of the forward pass, while the graph alone keeps that alive.
        kept: Which rows are no padding, by the shape of their leading dimensions.
        done: Whether the gradient has come.
    """

    gradients: Callable[..., Sequence[PerSample | Tensor | None]]
    sources: tuple[Source | None, ...]
    recomputed: bool
    samples: Samples
    graph: Graph | None
    kept: Kept
    done: bool = False


def names_of(sources: Iterable[Source]) -> list[str]:
    """List the parameters' names, each once."""
    return list(dict.fromkeys(name for source in sources for name in source.names))


def itself(grads: PerSample) -> PerSample:
    """Pull back to a parameter from itself, or from a cast of it."""
    return grads


def then(pullbacks: Pullbacks, step: Pullback) -> Pullbacks:
    """Return the pullbacks of what was made of a tensor, which ``step`` pulls back to that."""

    def after(pullback: Pullback) -> Pullback:
        return lambda grads: pullback(step(grads))

    return {name: after(pullback) for name, pullback in pullbacks.items()}


def within(pullbacks: Pullbacks, geometry: Geometry, shape: Sequence[int]) -> Pullbacks:
    """Return the pullbacks of a view."""
    return then(pullbacks, lambda grads: ViewOf(grads, geometry, shape))


def scaled(pullbacks: Pullbacks, slope: Tensor) -> Pullbacks:
    """Return the pullbacks of an elementwise function with that derivative."""
    return then(pullbacks, lambda grads: ScaledBy(grads, slope))
