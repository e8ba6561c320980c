"""How each torch function turns an output gradient into squared per-sample gradients.

A rule is called with the arguments of its torch function and describes that call as a :class:`Use`.
To support another function, write a rule for it and add it to :data:`RULES`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_optim.ops.squared_grad import squared_grad_sum_

Sums: TypeAlias = Sequence[Tensor | None]


class UnsupportedUseError(NotImplementedError):
    """A rule does not cover this way of calling its function; the message says which."""


@dataclass(frozen=True)
class Use:
    """One call of a torch function that has parameters among its arguments.

    Attributes:
        input: The argument whose leading dimension runs over the samples. What lies between that
            and its feature dimensions are tokens of one sample.
        features: Number of trailing feature dimensions of ``input``.
        parameters: The arguments that may be parameters.
        saved: What ``add_squares`` needs of the forward pass.
        add_squares: Called in backward as ``add_squares(sums, grad_output, *saved)``. ``sums`` goes
            with ``parameters``, ``None`` where one is not wanted; ``grad_output`` has the dtype of
            the sums. Adds Σ_n g_n² to each sum in place.
    """

    input: Tensor
    features: int
    parameters: tuple[Tensor | None, ...]
    saved: tuple[Tensor | None, ...]
    add_squares: Callable[..., None]


Rule: TypeAlias = Callable[..., Use]


def _by_token(tensor: Tensor, features: int) -> Tensor:
    """View [N, ..., *features] as [N, T, *features]."""
    split = tensor.dim() - features
    tokens = math.prod(tensor.shape[1:split])
    return tensor.reshape(tensor.shape[0], tokens, *tensor.shape[split:])


def _if_trained(tensor: Tensor, parameter: Tensor | None) -> Tensor | None:
    """What only the gradient of ``parameter`` needs: not kept for a frozen one."""
    return tensor if parameter is not None and parameter.requires_grad else None


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Use:
    """``torch.nn.functional.linear``."""
    if weight.dim() != 2:
        raise UnsupportedUseError(f"its weight must have 2 dimensions, not {weight.dim()}")
    return Use(input, 1, (weight, bias), (_if_trained(input, weight),), _add_linear)


def _add_linear(sums: Sums, grad_output: Tensor, input: Tensor) -> None:
    weight, bias = sums
    grads = _by_token(grad_output, 1)
    if weight is not None:
        squared_grad_sum_(weight, _by_token(input, 1), grads)
    if bias is not None:
        bias += grads.sum(1).square_().sum(0)


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Use:
    """``torch.nn.functional.embedding``; ``padding_idx`` has no gradient."""
    for option, given in (
        ("max_norm", max_norm is not None),
        ("scale_grad_by_freq", scale_grad_by_freq),
        ("sparse", sparse),
    ):
        if given:
            raise UnsupportedUseError(f"{option} is not supported")
    add = functools.partial(_add_embedding, padding_idx=padding_idx)
    return Use(input, 0, (weight,), (input,), add)


def _add_embedding(
    sums: Sums, grad_output: Tensor, input: Tensor, *, padding_idx: int | None
) -> None:
    (weight,) = sums
    if weight is None:
        return
    vocabulary = weight.shape[0]
    tokens, grads = _by_token(input, 0), _by_token(grad_output, 1)
    if padding_idx is not None:
        padding = tokens == padding_idx % vocabulary
        grads = grads.masked_fill(padding.unsqueeze(-1), 0.0)
    # A token's gradients within one sample add before the square. Sorted by (sample, token), they
    # are runs; the sums over runs fill the first rows, and the rest stay zero. (torch.unique would
    # size its result by the number of runs, and so wait for the device.)
    sample = torch.arange(tokens.shape[0], device=tokens.device).unsqueeze(1)
    pairs, order = (sample * vocabulary + tokens).flatten().sort()
    starts = torch.ones_like(pairs)
    starts[1:] = pairs[1:] != pairs[:-1]
    run = starts.cumsum(0) - 1
    rows = grads.flatten(0, 1)
    row_sums = torch.zeros_like(rows).index_add_(0, run, rows[order])
    row_token = torch.zeros_like(pairs).scatter_(0, run, pairs % vocabulary)
    weight.index_add_(0, row_token, row_sums.square_())


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Use:
    """``torch.nn.functional.layer_norm``."""
    add = functools.partial(_add_layer_norm, normalized_shape=tuple(normalized_shape), eps=eps)
    saved = (_if_trained(input, weight),)
    return Use(input, len(normalized_shape), (weight, bias), saved, add)


def _add_layer_norm(
    sums: Sums,
    grad_output: Tensor,
    input: Tensor,
    *,
    normalized_shape: tuple[int, ...],
    eps: float,
) -> None:
    weight, bias = sums
    features = len(normalized_shape)
    grads = _by_token(grad_output, features)
    if weight is not None:
        # Recomputed: inverting (output − bias) / weight breaks where the weight is 0.
        normalized = F.layer_norm(input.to(weight.dtype), normalized_shape, eps=eps)
        weight += (grads * _by_token(normalized, features)).sum(1).square_().sum(0)
    if bias is not None:
        bias += grads.sum(1).square_().sum(0)


RULES: dict[Callable[..., Any], Rule] = {
    F.linear: linear,
    F.embedding: embedding,
    F.layer_norm: layer_norm,
}
