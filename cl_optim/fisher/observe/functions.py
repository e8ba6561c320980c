"""Functions of parameters alone: weights that are normalised, concatenated, indexed, products, ...

Such a function is called once more of *points*, the parameters' values without their history. What
comes out has a graph of its own, which stays when autograd frees that of the model: through it the
gradients of single samples are pulled back, one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from cl_optim.fisher.observe.sources import Pullback, Pullbacks
from cl_optim.fisher.per_sample.views import FunctionOf


class Points:
    """Leaves of graphs of functions of parameters, made when they are needed."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = parameters
        self._points: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._points:
            self._points[name] = self._parameters[name].detach().requires_grad_()
        return self._points[name]

    def pullbacks(self, made: Tensor, names: tuple[str, ...]) -> Pullbacks:
        """Return those through the graph of ``made`` to each of the parameters."""
        return {name: self._pullback(made, name) for name in names}

    def _pullback(self, made: Tensor, name: str) -> Pullback:
        point = self[name]
        version = point._version

        def back(grad: Tensor) -> Tensor:
            if point._version != version:
                raise RuntimeError(
                    f"parameter {name!r} was changed in place between the forward and the backward "
                    f"pass; change it after the backward pass."
                )
            return _gradients(made, [point], grad)[0]

        return lambda grads: FunctionOf(grads, back, point.shape)


def _gradients(made: Tensor, points: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Pull a gradient of what was made back to the points; zero where it does not depend on one."""
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
        return None, None, *_gradients(ctx.made(), ctx.points, grad)
