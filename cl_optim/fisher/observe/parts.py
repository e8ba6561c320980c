"""Calls of DTensors, under tensor parallelism: each process has its part of a parameter.

What a rule needs is brought to where the part here of each sample's gradient can be made of it
alone: all of it, or those of its features that belong to that part. All tokens of a sample are
there before anything is squared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_optim.distributed import here, is_dtensor, offset_of
from cl_optim.fisher.observe.calls import Call
from cl_optim.fisher.rules.registry import Gradients, UnsupportedUseError, Use
from cl_optim.fisher.rules.tables import table_gradients
from cl_optim.fisher.samples import Samples

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.placement_types import Placement

# For functions of a matrix, by the dimension of it that is sharded: whether the input's and the
# output gradient's features are then sharded, too.
_FEATURES: dict[Callable[..., Any], dict[int, tuple[bool, bool]]] = {
    F.linear: {0: (False, True), 1: (True, False)},
    F.embedding: {0: (False, False), 1: (False, True)},
}
# torch's own, which context_parallel() puts another function in the place of.
ATTENTION = F.scaled_dot_product_attention


def use_in_parts(call: Call, use: Use) -> Use:
    """Return a use of DTensors as one of the parts here.

    Raises:
        UnsupportedUseError: Of the parts alone the gradients cannot be made.
    """
    parameters = [one for one in use.parameters if one is not None]
    if not any(map(is_dtensor, parameters)):
        return use
    mesh, placements = _placed(parameters[0])
    sharded = [_features(call.func, placement) for placement in placements]
    inputs, grads = [one for one, _ in sharded], [one for _, one in sharded]
    for vector in parameters[1:]:  # a bias is where the output's features are
        of_vector = _placed(vector)
        if of_vector[0] != mesh or [one.is_shard() for one in of_vector[1]] != grads:
            raise UnsupportedUseError(
                f"its vector has placements {list(of_vector[1])} where its matrix has "
                f"{list(placements)}"
            )
    gradients = use.gradients
    if call.func is F.embedding and any(p.is_shard(0) for p in placements):
        padding_idx = call.bound("input", "weight", "padding_idx").get("padding_idx")
        gradients = _of_rows(parameters[0], padding_idx)
    return Use(
        use.input,
        use.features,
        use.parameters,
        use.saved,
        in_parts(gradients, mesh, inputs, grads),
    )


def in_parts(
    gradients: Callable[..., Gradients],
    mesh: DeviceMesh,
    inputs: list[bool],
    grads: list[bool],
) -> Callable[..., Gradients]:
    """Return a rule's ``gradients`` of parts.

    Args:
        gradients: Of the part here, of tensors that are here.
        mesh: Of the DTensors.
        inputs: For each of its dimensions, whether what was saved has its features sharded.
        grads: Likewise of the output gradient.
    """

    def of_parts(samples: Samples, grad: Tensor, *saved: Tensor | None) -> Gradients:
        parts = (None if one is None else _bring(one, mesh, inputs) for one in saved)
        return gradients(samples, _bring(grad, mesh, grads), *parts)

    return of_parts


def in_all(tensor: Tensor, gradients: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Return ``gradients`` of a parameter that each process has all of, of all that there is.

    Raises:
        UnsupportedUseError: Each has a part.
    """
    if not is_dtensor(tensor):
        return gradients
    mesh, placements = _placed(tensor)
    if not all(placement.is_replicate() for placement in placements):
        raise _no_parts(placements)
    everywhere = [False] * mesh.ndim
    return in_parts(gradients, mesh, everywhere, everywhere)


def refuse_context_parallelism(tensors: Iterable[Tensor]) -> None:
    """Raise NotImplementedError where attention is of sequences that processes share."""
    parts: list[Any] = [tensor for tensor in tensors if is_dtensor(tensor)]
    if any(placement.is_shard(one.ndim - 2) for one in parts for placement in one.placements):
        raise NotImplementedError(
            "each process has a part of each sequence, as under context parallelism, and so a part "
            "of each sample's gradient: the square of the sum is not the sum of squares. Estimate "
            "the Fisher information of whole sequences, without context_parallel, and "
            "consolidate() that."
        )


def _features(func: Callable[..., Any], placement: Placement) -> tuple[bool, bool]:
    """Return whether input and output gradient have their features sharded over a dimension."""
    if placement.is_replicate():
        return False, False
    known = _FEATURES.get(func, {})
    dim = getattr(placement, "dim", None)
    if not placement.is_shard() or dim not in known:
        raise _no_parts([placement])
    return known[cast(int, dim)]


def _no_parts(placements: Any) -> UnsupportedUseError:
    return UnsupportedUseError(
        f"of a parameter with placements {list(placements)} this process has a part, and only "
        "those of linear (ColwiseParallel, RowwiseParallel) and embedding have a rule"
    )


def _placed(parameter: Tensor) -> tuple[DeviceMesh, tuple[Placement, ...]]:
    if not is_dtensor(parameter):
        raise UnsupportedUseError("of its parameters some are DTensors, and some are not")
    there: Any = parameter
    return there.device_mesh, there.placements


def _bring(tensor: Tensor, mesh: DeviceMesh, sharded: list[bool]) -> Tensor:
    """Return what is needed here of a tensor that was used: all, or a part of its features."""
    if not is_dtensor(tensor):
        return tensor
    from torch.distributed.tensor import Replicate, Shard

    there: Any = tensor
    if there.device_mesh != mesh:
        raise UnsupportedUseError("it is called with DTensors of several meshes")
    placements = [Shard(there.ndim - 1) if one else Replicate() for one in sharded]
    local: Tensor = there.redistribute(placements=placements).to_local()
    return local


def _of_rows(table: Tensor, padding_idx: int | None) -> Callable[..., Gradients]:
    """Return the gradients of a table whose rows are spread: of those that are here."""
    start, length, total = offset_of(table)[0], len(here(table)), len(table)

    def gradients(samples: Samples, grad: Tensor, indices: Tensor) -> Gradients:
        inside = (indices >= start) & (indices < start + length)
        if padding_idx is not None:
            inside &= indices != padding_idx % total
        rows = torch.where(inside, indices - start, 0)
        grad = grad.masked_fill(~inside.unsqueeze(-1), 0.0)
        return (table_gradients(samples, rows, grad, length, None),)

    return gradients
