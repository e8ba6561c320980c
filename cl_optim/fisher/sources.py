"""What watched tensors are: parameters, views of them, and functions of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from cl_optim.fisher import nested
from cl_optim.fisher.per_sample.base import PerSample
from cl_optim.fisher.per_sample.views import Geometry, ScaledBy, ViewOf

# For each parameter that a tensor was made of, by name: turns per-sample gradients of the tensor
# into those of the parameter.
Pulls: TypeAlias = Mapping[str, Callable[[PerSample], PerSample]]


@dataclass(frozen=True)
class Source:
    """What a watched tensor is: a parameter, a view of one, or a function of one or several.

    Attributes:
        pulls: Of each of the parameters.
        start: Where the tensor that this is a view of begins in its storage.
        remake: Makes the tensor once more, of the parameters' points (:class:`Points`).
        base: Shape and ``pulls`` of the tensor that this is a view of; ``None`` if it is no view.
        direct: Whether this is the parameter itself.
        doubt: What to say if the tensor turns out not to be used as a parameter is.
        each_row: Whether it is one matrix for each row of something else.
    """

    pulls: Pulls
    start: int
    remake: Callable[[], Tensor]
    base: tuple[tuple[int, ...], Pulls] | None = None
    direct: bool = False
    doubt: Exception | None = None
    each_row: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters'."""
        return tuple(self.pulls)

    @property
    def name(self) -> str:
        """The parameter's, or that of the first."""
        return next(iter(self.pulls))


def itself(grads: PerSample) -> PerSample:
    """The pull of a parameter, and of a cast of it."""
    return grads


def then(pulls: Pulls, step: Callable[[PerSample], PerSample]) -> Pulls:
    """The pulls of what was made of a tensor, whose own gradients are ``step`` of those."""

    def after(pull: Callable[[PerSample], PerSample]) -> Callable[[PerSample], PerSample]:
        return lambda grads: pull(step(grads))

    return {name: after(pull) for name, pull in pulls.items()}


def within(pulls: Pulls, geometry: Geometry, shape: Sequence[int]) -> Pulls:
    """The pulls of a view."""
    return then(pulls, lambda grads: ViewOf(grads, geometry, shape))


def scaled(pulls: Pulls, slope: Tensor) -> Pulls:
    """The pulls of an elementwise function with that derivative."""
    return then(pulls, lambda grads: ScaledBy(grads, slope))


def slope_of(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], tensor: Tensor
) -> Tensor:
    """The derivative of an elementwise function of one tensor."""
    keep = torch.autograd.graph.saved_tensors_hooks(_unchanged, _unchanged)
    with torch.enable_grad(), keep:
        point = tensor.detach().requires_grad_()
        arguments = nested.map_tensors(lambda t: point if t is tensor else t, (args, kwargs))
        value = func(*arguments[0], **arguments[1])
        (slope,) = torch.autograd.grad(value.sum(), point)
    return slope


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def share_storage(tensor: Tensor, results: Iterable[Tensor]) -> bool:
    """Whether all results are views of ``tensor``."""
    storage = tensor.untyped_storage().data_ptr()
    return all(
        result.untyped_storage().data_ptr() == storage and result.dtype == tensor.dtype
        for result in results
    )
