"""Rules of tables that are looked up."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_optim.fisher.per_sample.tables import LookedUp
from cl_optim.fisher.rules.registry import TAKEN_APART, Gradients, UnsupportedUseError, Use, rule
from cl_optim.fisher.samples import Samples


def check_embedding(
    max_norm: float | None = None, scale_grad_by_freq: bool = False, sparse: bool = False
) -> None:
    """Refuse what changes the table, or its gradient, by more than the lookup."""
    for option, given in (
        ("max_norm", max_norm is not None),
        ("scale_grad_by_freq", scale_grad_by_freq),
        ("sparse", sparse),
    ):
        if given:
            raise UnsupportedUseError(f"{option} is not supported")


def table_gradients(
    samples: Samples, indices: Tensor, grads: Tensor, table: int, padding_idx: int | None
) -> LookedUp:
    """Return gradients of a table from those of what was looked up; ``padding_idx`` has none."""
    indices, grads = samples.split(indices), samples.split(grads, 1)
    counted = None
    if samples.packed:  # what pads has no gradient
        counted = samples.pad(torch.ones_like(indices, dtype=torch.bool))
        indices, grads = samples.pad(indices), samples.pad(grads)
    if padding_idx is not None:
        used = indices != padding_idx % table
        grads = grads.masked_fill(~used.unsqueeze(-1), 0.0)
        counted = used if counted is None else counted & used
    return LookedUp(indices.long(), grads, table, counted)


@rule(F.embedding)
def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Use:
    """Describe ``torch.nn.functional.embedding``; ``padding_idx`` has no gradient."""
    check_embedding(max_norm, scale_grad_by_freq, sparse)
    table = len(weight)

    def gradients(samples: Samples, grad: Tensor, input: Tensor) -> Gradients:
        return (table_gradients(samples, input, grad, table, padding_idx),)

    return Use(input, 0, (weight,), (input,), gradients)


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Do what ``embedding_bag`` does by an embedding [B, L, D] and what is made of it.

    Bags that are given by offsets are padded, for which the host waits for the longest.
    """
    check_embedding(max_norm, scale_grad_by_freq, sparse)
    kept = torch.ones_like(input, dtype=torch.bool)
    if input.dim() == 1:
        assert offsets is not None
        ends = offsets[1:] if include_last_offset else F.pad(offsets[1:], (0, 1), value=len(input))
        lengths = ends - offsets[: len(ends)]
        kept = torch.arange(max(1, int(lengths.max())), device=input.device) < lengths.unsqueeze(1)
        input = torch.zeros_like(kept, dtype=input.dtype).masked_scatter(kept, input)
        if per_sample_weights is not None:
            spread = torch.zeros_like(kept, dtype=per_sample_weights.dtype)
            per_sample_weights = spread.masked_scatter(kept, per_sample_weights)
    if padding_idx is not None:
        kept = kept & (input != padding_idx % len(weight))
    looked_up = F.embedding(input, weight)
    if mode == "max":
        looked_up = looked_up.masked_fill(~kept.unsqueeze(-1), -math.inf)
        return torch.where(kept.any(1, keepdim=True), looked_up.max(1).values, 0.0)
    share = kept.to(looked_up.dtype)
    if mode == "mean":
        share = share / share.sum(1, keepdim=True).clamp_min(1.0)
    if per_sample_weights is not None:
        share = share * per_sample_weights
    return (looked_up * share.unsqueeze(-1)).sum(1)


TAKEN_APART[F.embedding_bag] = embedding_bag


def is_lookup(func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Return whether it is ``table[indices]`` with a tensor of integers."""
    if func is not Tensor.__getitem__ or not isinstance(args[1], Tensor):
        return False
    table, indices = args
    integers = not indices.is_floating_point() and indices.dtype not in (torch.bool, torch.uint8)
    return table.dim() in (1, 2) and indices.dim() > 0 and integers


def is_choice_of_matrices(func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Return whether it is ``matrices[indices]`` with a tensor of integers [R]."""
    if func is not Tensor.__getitem__ or not isinstance(args[1], Tensor):
        return False
    matrices, indices = args
    integers = not indices.is_floating_point() and indices.dtype not in (torch.bool, torch.uint8)
    return matrices.dim() == 3 and indices.dim() == 1 and integers


def lookup(table: Tensor, indices: Tensor) -> Tensor:
    """Look up ``table[indices]`` by an embedding."""
    indices = indices.long() % len(table)  # they may count from the end
    if table.dim() == 1:
        return F.embedding(indices, table.unsqueeze(1)).squeeze(-1)
    return F.embedding(indices, table)
