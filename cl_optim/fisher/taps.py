"""Functions of autograd through which an observation hears of gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cl_optim.fisher.per_sample.base import PerSample
from cl_optim.fisher.samples import Samples
from cl_optim.fisher.sources import Source

if TYPE_CHECKING:
    from cl_optim.fisher.observation import Observation


class Graph:
    """Is alive as long as a part of the graph of one forward pass."""


@dataclass
class Call:
    """What is kept of a call until its gradient comes; no tensors of the graph."""

    gradients: Callable[..., Sequence[PerSample | Tensor | None]]
    sources: tuple[Source | None, ...]
    made: bool  # whether the parameters' own gradients are made here, or by autograd
    recomputed: bool  # in a backward pass, by activation checkpointing
    samples: Samples
    done: bool = False
    graph: Graph | None = None  # of a forward pass that the graph alone keeps alive


class Tap(torch.autograd.Function):
    """The identity; its backward hands the gradient and the saved tensors to the observation."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        anchor: Tensor | None,
        observation: Observation,
        call: Call,
        count: int,
        *tensors: Tensor | None,
    ) -> Tensor:
        """Return ``output``; of the tensors, ``count`` are parameters, and the rest is saved."""
        ctx.observation, ctx.call, ctx.count = observation, call, count
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors[:count]]
        ctx.save_for_backward(*tensors[count:])
        # "Changed in place" rather than returned as it came: the latter would make it a view, and
        # a ReLU(inplace=True) after it an error.
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        """Let the observation capture the gradient, and pass it on."""
        saved = ctx.saved_tensors
        made = ctx.observation.capture(ctx.call, grad_output, saved)
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
        observation: Observation,
        call: Call,
        shape: tuple[int, ...],
    ) -> Tensor:
        """Return ``tensor`` in that shape."""
        ctx.observation, ctx.call = observation, call
        ctx.shape, ctx.dtype = tensor.shape, tensor.dtype
        return tensor.expand(shape)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        """Let the observation capture the gradient, and pass it on."""
        (made,) = ctx.observation.capture(ctx.call, grad_output, ())
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        grad = grad_output.sum_to_size(ctx.shape) if made is None else made.to(ctx.dtype)
        return grad, None, None, None, None
