"""What watched tensors are: parameters, views of them, and elementwise functions of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cl_optim.fisher import nested
from cl_optim.fisher.per_sample import Geometry, PerSample, ScaledBy, ViewOf


@dataclass(frozen=True)
class Source:
    """What a watched tensor is: a parameter, a view of one, or an elementwise function of one.

    Attributes:
        name: The parameter's.
        pull: Turns per-sample gradients of this tensor into those of the parameter.
        start: Where the tensor that this is a view of begins in its storage.
        base: Shape and ``pull`` of the tensor that this is a view of; ``None`` if it is no view.
        direct: Whether this is the parameter itself.
    """

    name: str
    pull: Callable[[PerSample], PerSample]
    start: int
    base: tuple[tuple[int, ...], Callable[[PerSample], PerSample]] | None = None
    direct: bool = False


def itself(grads: PerSample) -> PerSample:
    """The ``pull`` of a parameter, and of a cast of it."""
    return grads


def within(
    pull: Callable[[PerSample], PerSample], geometry: Geometry, shape: Sequence[int]
) -> Callable[[PerSample], PerSample]:
    """The ``pull`` of a view."""
    return lambda grads: pull(ViewOf(grads, geometry, shape))


def scaled(
    pull: Callable[[PerSample], PerSample], slope: Tensor
) -> Callable[[PerSample], PerSample]:
    """The ``pull`` of an elementwise function with that derivative."""
    return lambda grads: pull(ScaledBy(grads, slope))


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
