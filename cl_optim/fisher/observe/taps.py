"""Taps in the graph of a forward pass: the identity, through which output gradients are seen."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cl_optim.fisher.observe.sources import Graph, Pending
from cl_optim.fisher.observe.squares import Squares
from cl_optim.fisher.rules.registry import Use


def in_backward() -> bool:
    """Return whether this runs inside a backward pass."""
    return torch._C._current_graph_task_id() != -1


class Taps:
    """Leaves the taps of one forward pass, which hand to the squares what they see.

    Args:
        squares: What is handed to.
        device: Of the parameters.

    Attributes:
        graph: What all taps hold; ``None`` once it is theirs alone.
    """

    def __init__(self, squares: Squares, device: torch.device) -> None:
        self._squares = squares
        # Without gradients of parameters, this is what makes the graph reach back to each use.
        self._anchor = (
            torch.empty(0, device=device, requires_grad=True) if squares.own_pass else None
        )
        self.graph: Graph | None = Graph()
        self._seen = weakref.ref(self.graph)

    def release(self) -> Graph:
        """Let the graph alone keep the forward pass alive, and what holds what is returned."""
        assert self.graph is not None
        graph, self.graph = self.graph, None
        return graph

    def is_alive(self) -> bool:
        """Return whether a backward pass may still come."""
        return self._seen() is not None

    def tap(self, output: Tensor, use: Use, pending: Pending) -> Tensor:
        """Return a call's output, tapped."""
        tensors = use.parameters if self._squares.makes_gradients else ()
        # Detached, so that the tap is not a second path back to them; autograd still notices if
        # they are changed in place before backward.
        saved = (None if tensor is None else tensor.detach() for tensor in use.saved)
        tapped: Tensor = Tap.apply(
            output, self._anchor, self._squares, pending, len(tensors), *tensors, *saved
        )
        return tapped

    def expand(self, tensor: Tensor, shape: Sequence[int], pending: Pending) -> Tensor:
        """Return a parameter in the shape that it broadcasts to, tapped."""
        given = tensor.detach() if self._squares.own_pass else tensor
        expanded: Tensor = Expand.apply(given, self._anchor, self._squares, pending, tuple(shape))
        return expanded


class Tap(torch.autograd.Function):
    """The identity; its backward hands the gradient and the saved tensors to the squares."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        anchor: Tensor | None,
        squares: Squares,
        pending: Pending,
        count: int,
        *tensors: Tensor | None,
    ) -> Tensor:
        """Return ``output``; of the tensors, ``count`` are parameters, and the rest is saved."""
        ctx.squares, ctx.pending, ctx.count = squares, pending, count
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors[:count]]
        ctx.save_for_backward(*tensors[count:])
        # "Changed in place" rather than returned as it came: the latter would make it a view, and
        # a ReLU(inplace=True) after it an error.
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        """Let the squares capture the gradient, and pass it on."""
        saved = ctx.saved_tensors
        made = ctx.squares.capture(ctx.pending, grad_output, saved)
        wanted = ctx.needs_input_grad[5 : 5 + ctx.count]
        grads = [
            grad.to(dtype) if needed and grad is not None else None
            for grad, needed, dtype in zip(made[: ctx.count], wanted, ctx.dtypes, strict=True)
        ]
        return grad_output, None, None, None, None, *grads, *[None] * len(saved)


class Expand(torch.autograd.Function):
    """A parameter expanded to the shape that it broadcasts to, tapped on the way back."""

    @staticmethod
    def forward(
        ctx: Any,
        tensor: Tensor,
        anchor: Tensor | None,
        squares: Squares,
        pending: Pending,
        shape: tuple[int, ...],
    ) -> Tensor:
        """Return ``tensor`` in that shape."""
        ctx.squares, ctx.pending = squares, pending
        ctx.shape, ctx.dtype = tensor.shape, tensor.dtype
        return tensor.expand(shape)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        """Let the squares capture the gradient, and pass it on."""
        (made,) = ctx.squares.capture(ctx.pending, grad_output, ())
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        grad = grad_output.sum_to_size(ctx.shape) if made is None else made.to(ctx.dtype)
        return grad, None, None, None, None
