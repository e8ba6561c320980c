"""Checks that the rows of what parameters meet are samples: reversed samples must reverse them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cl_optim.fisher import nested
from cl_optim.fisher.observe.observation import Observation
from cl_optim.fisher.observe.self_check import tolerance
from cl_optim.fisher.samples import Samples
from cl_optim.ops.passes import eval_mode, unobserved

# Of one, two rows might have the same by chance.
_PROJECTIONS = 8


@dataclass(frozen=True)
class _Met:
    """What parameters met in one call.

    Attributes:
        names: The parameters'.
        prints: Random projections of each sample's part of the input, [N, 8].
        size: The largest norm of a sample's part.
        dtype: Of the input.
    """

    names: tuple[str, ...]
    prints: Tensor
    size: Tensor
    dtype: torch.dtype


def not_samples(
    model: nn.Module,
    args: Any,
    kwargs: dict[str, Any],
    count: int,
    observe: Callable[[Samples], Observation],
) -> list[str]:
    """Name the parameters that meet inputs whose rows are not the samples.

    Calls the model twice with what it was called with, without a backward pass and without keeping
    activations: once as it is, once with the samples reversed. What each parameter meets must be
    reversed likewise: rows that were routed to an expert are not, nor are positions.

    Args:
        model: Is run in eval mode, without randomness that others would miss; its buffers and
            training flags are what they were afterwards.
        args: Positional arguments; tensors whose leading dimension is ``count`` are reversed.
        kwargs: Keyword arguments, likewise.
        count: Number of samples N, at least 2.
        observe: Makes an observation of samples that adds to nothing.

    Raises:
        RuntimeError: The model could not be called so.
    """
    # In reverse, no two neighbours follow one another as before; but two tokens of one sample do,
    # so that rows gathered from tokens never pass for samples.
    order = torch.arange(count - 1, -1, -1, device="cpu")
    plain = _meet(model, args, kwargs, order.flip(0), observe)
    backwards = _meet(model, args, kwargs, order, observe)
    wrong: dict[str, None] = {}
    dtypes = [met.dtype for met in (*plain, *backwards)]
    limit = max(map(tolerance, dtypes), default=0.0)
    for a, b in zip(plain, backwards, strict=False):
        if a.names != b.names:
            return [*wrong, *dict.fromkeys((*a.names, *b.names))]
        difference = (a.prints[order.to(a.prints.device)] - b.prints).abs().max()
        if float(difference) > limit * float(a.size):
            wrong |= dict.fromkeys(a.names)
    both = min(len(plain), len(backwards))
    return [*wrong, *(n for met in (*plain[both:], *backwards[both:]) for n in met.names)]


def _meet(
    model: nn.Module,
    args: Any,
    kwargs: dict[str, Any],
    order: Tensor,
    observe: Callable[[Samples], Observation],
) -> list[_Met]:
    """Call the model with the samples in that order; return what its parameters met."""

    def take(tensor: Tensor) -> Tensor:
        if tensor.dim() == 0 or len(tensor) != len(order):
            return tensor
        return tensor.detach().index_select(0, order.to(tensor.device))

    samples = Samples(len(order))
    args, kwargs = nested.map_tensors(take, tuple(args)), nested.map_tensors(take, dict(kwargs))
    for tensor in nested.tensors((args, kwargs)):
        samples.see(tensor.shape)
    met: list[_Met] = []

    def witness(names: list[str], input: Tensor, features: int) -> None:
        parts = samples.split(input.detach(), features).flatten(1)
        wide = parts.double() if _is_exact(parts.dtype) else parts.float()
        generator = torch.Generator().manual_seed(wide.shape[1])
        weights = torch.randn(wide.shape[1], _PROJECTIONS, generator=generator, device="cpu").to(
            wide
        )
        met.append(_Met(tuple(names), wide @ weights, wide.norm(dim=1).max(), input.dtype))

    observation = observe(samples)
    observation.witness = witness
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    try:
        with _without_traces(inner), torch.enable_grad(), observation:
            inner(*args, **kwargs)
    except Exception as error:
        raise RuntimeError(
            "the check that the rows of each input are samples calls the model in eval mode with "
            "its samples reversed, and that failed; verify=False turns the check off."
        ) from error
    finally:
        observation.close()
    return met


def _is_exact(dtype: torch.dtype) -> bool:
    return dtype == torch.float64 or not dtype.is_floating_point


@contextmanager
def _without_traces(model: nn.Module) -> Iterator[None]:
    """Run in eval mode and keep no activations; flags, buffers and random states are restored."""
    buffers = [
        (module._buffers, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}

    def refuse(_: None) -> NoReturn:
        raise AssertionError("there is no backward pass")

    # Copies take their place: the graph of the batch has saved these, and minds if they change.
    copies = {id(buffer): buffer.clone() for _, _, buffer in buffers}
    for owner, name, buffer in buffers:
        owner[name] = copies[id(buffer)]
    try:
        with (
            eval_mode(model),
            torch.random.fork_rng(list(devices)),
            torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, refuse),
            unobserved(),
        ):
            yield
    finally:
        for owner, name, buffer in buffers:
            owner[name] = buffer
