"""Functions of parameters alone: weights that are normalised, concatenated, indexed, products, ...

Such a function is called once more of *points*, the parameters' values without their history. What
comes out has a graph of its own, which stays when autograd frees that of the model: through it the
gradients of single samples are pulled back, one by one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from cl_optim.fisher import nested
from cl_optim.fisher.per_sample.base import PerSample
from cl_optim.fisher.per_sample.views import FunctionOf
from cl_optim.fisher.sources import Pulls, Source

# Methods whose result is the tensor, or about it, and which must be called of that one.
_OF_THE_TENSOR = {"requires_grad_", "retain_grad", "register_hook"}


class Points:
    """Leaves of graphs of functions of parameters, made when they are needed."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = parameters
        self._points: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._points:
            self._points[name] = self._parameters[name].detach().requires_grad_()
        return self._points[name]

    def pulls(self, made: Tensor, names: tuple[str, ...]) -> Pulls:
        """Through the graph of ``made`` back to each of the parameters."""
        return {name: self._pull(made, name) for name in names}

    def _pull(self, made: Tensor, name: str) -> Callable[[PerSample], PerSample]:
        point = self[name]
        version = point._version

        def back(grad: Tensor) -> Tensor:
            if point._version != version:
                raise RuntimeError(
                    f"parameter {name!r} was changed in place between the forward and the backward "
                    f"pass; change it after the backward pass."
                )
            return gradients(made, [point], grad)[0]

        return lambda grads: FunctionOf(grads, back, point.shape)


def gradients(made: Tensor, points: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Of what was made, pulled back to the points; zero where it does not depend on one."""
    found = torch.autograd.grad(
        made, points, grad.to(made.dtype), retain_graph=True, allow_unused=True
    )
    return [
        torch.zeros_like(point) if one is None else one
        for point, one in zip(points, found, strict=True)
    ]


class Link(torch.autograd.Function):
    """What was made of the points, as if it had been made of the parameters."""

    @staticmethod
    def forward(ctx: Any, made: Callable[[], Tensor], points: list[Tensor], *_: Tensor) -> Tensor:
        """Return what was made."""
        ctx.made, ctx.points = made, points
        return made().detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Pull the gradient back to the parameters."""
        return None, None, *gradients(ctx.made(), ctx.points, grad)


def remake(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    found: Mapping[int, Source],
) -> Any:
    """Call ``func`` of points; what it keeps is out of reach of activation checkpointing."""
    points = {
        id(tensor): found[id(tensor)].remake()
        for tensor in nested.tensors((args, kwargs))
        if id(tensor) in found
    }
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(Tensor.detach, _same):
        return func(*nested.replace(args, points), **nested.replace(kwargs, points))


def part_of(make: Callable[[], Any], index: int) -> Callable[[], Tensor]:
    """One of the tensors that a function returns."""
    return lambda: list(nested.tensors(make()))[index]


def remaking(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    found: Mapping[int, Source],
) -> Callable[[], Any]:
    """:func:`remake`, to be called when it is needed."""
    return functools.partial(remake, func, args, kwargs, found)


def is_of_the_tensor(func: Callable[..., Any]) -> bool:
    """Whether ``func`` is about the very tensor that it is called of, and not its values."""
    return getattr(func, "__name__", "") in _OF_THE_TENSOR


def changes_in_place(func: Callable[..., Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether ``func`` writes into a tensor that it is given."""
    name: str = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in _NO_CHANGE)
    return (name.endswith("_") and not is_of_the_tensor(func)) or kwargs.get("out") is not None


_NO_CHANGE = {"__invert__", "__index__", "__int__"}


def _same(tensor: Tensor) -> Tensor:
    return tensor
