"""Batches of any structure, taken apart into tensors."""

from __future__ import annotations

import copy
import json
from collections import UserDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cl_optim.ops.checks import dtype_name

_DTYPES = {
    dtype_name(dtype): dtype
    for dtype in (
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
        *(torch.complex64, torch.complex128),
    )
}


def flatten(batch: Any) -> tuple[dict[str, Tensor], Any]:
    """Take a batch apart: its tensors by their place, and its structure as JSON can hold it.

    Raises:
        TypeError: Something in it is no tensor, mapping with strings as keys, list or tuple.
    """
    leaves: dict[str, Tensor] = {}

    def visit(tree: Any, place: str) -> Any:
        if isinstance(tree, Tensor):
            leaves[place] = tree
            return None
        if isinstance(tree, Mapping):
            if not all(isinstance(key, str) for key in tree):
                raise TypeError(f"{place} must have strings as keys, not {list(tree)!r}.")
            return {key: visit(value, f"{place}[{key!r}]") for key, value in tree.items()}
        if isinstance(tree, (list, tuple)):
            return [visit(value, f"{place}[{i}]") for i, value in enumerate(tree)]
        raise TypeError(
            f"{place} must be a tensor, or a mapping, list or tuple of them, not "
            f"{type(tree).__name__}."
        )

    structure = visit(batch, "batch")
    if not leaves:
        raise TypeError("batch must contain a tensor.")
    return leaves, structure


def unflatten(leaves: Mapping[str, Tensor], structure: Any, place: str = "batch") -> Any:
    """Put together what :func:`flatten` took apart; lists and named tuples become tuples."""
    if structure is None:
        return leaves[place]
    if isinstance(structure, dict):
        return {k: unflatten(leaves, sub, f"{place}[{k!r}]") for k, sub in structure.items()}
    return tuple(unflatten(leaves, sub, f"{place}[{i}]") for i, sub in enumerate(structure))


def replace(batch: Any, leaves: Mapping[str, Tensor], place: str = "batch") -> Any:
    """Return the batch with other tensors in it, in the same kinds of containers if known."""
    if isinstance(batch, Tensor):
        return leaves[place]
    if isinstance(batch, Mapping):
        values = {k: replace(v, leaves, f"{place}[{k!r}]") for k, v in batch.items()}
        if isinstance(batch, UserDict):  # a BatchEncoding, say
            other = copy.copy(batch)
            other.update(values)
            return other
        return values
    parts = [replace(value, leaves, f"{place}[{i}]") for i, value in enumerate(batch)]
    if hasattr(batch, "_fields"):
        return type(batch)(*parts)
    return parts if isinstance(batch, list) else tuple(parts)


def count(leaves: Mapping[str, Tensor]) -> int:
    """Count the samples in a batch.

    Raises:
        ValueError: A tensor has no first dimension, or not as long a one as the others.
    """
    sizes = {place: leaf.shape[0] if leaf.ndim else None for place, leaf in leaves.items()}
    first = next(iter(sizes.values()))
    for place, size in sizes.items():
        if size is None or size != first:
            found = "is 0-dimensional" if size is None else f"has {size} samples, others {first}"
            raise ValueError(
                f"{place} must have the batch's samples as first dimension: it {found}."
            )
    assert first is not None
    return first


@dataclass(frozen=True)
class Layout:
    """What the samples of a buffer look like.

    Attributes:
        structure: As :func:`flatten` has it.
        leaves: Place → dtype's name, shape of one sample.
    """

    structure: Any
    leaves: Mapping[str, tuple[str, tuple[int, ...]]]

    @classmethod
    def of(cls, leaves: Mapping[str, Tensor], structure: Any) -> Layout:
        """Make the layout of a batch.

        Raises:
            TypeError: A dtype that cannot be kept.
        """
        for place, leaf in leaves.items():
            if leaf.dtype not in _DTYPES.values():
                raise TypeError(f"{place} must have one of the dtypes {list(_DTYPES)}.")
        return cls(
            structure,
            {
                place: (dtype_name(leaf.dtype), tuple(leaf.shape[1:]))
                for place, leaf in leaves.items()
            },
        )

    @classmethod
    def loads(cls, text: str) -> Layout:
        """Read what :meth:`dumps` wrote."""
        structure, leaves = json.loads(text)
        return cls(
            structure, {place: (dtype, tuple(shape)) for place, (dtype, shape) in leaves.items()}
        )

    def dumps(self) -> str:
        """Write it as JSON."""
        return json.dumps([self.structure, self.leaves])

    def check(self, other: Layout) -> None:
        """Raise ValueError unless the other is the same."""
        if other.structure != self.structure:
            raise ValueError(
                f"batch must have the structure {json.dumps(self.structure)} of the samples in "
                f"the buffer, not {json.dumps(other.structure)} (null: a tensor)."
            )
        for place, (dtype, shape) in self.leaves.items():
            if other.leaves[place] != (dtype, shape):
                found_dtype, found_shape = other.leaves[place]
                raise ValueError(
                    f"{place} must have samples of shape {list(shape)}, {dtype}, like those in the "
                    f"buffer, not {list(found_shape)}, {found_dtype}; pad what varies in length."
                )

    def allocate(self, capacity: int) -> dict[str, Tensor]:
        """Make tensors [capacity, *shape] in memory, by place."""
        return {
            place: torch.empty(capacity, *shape, dtype=dtype, device="cpu")
            for place, (shape, dtype) in self.shapes().items()
        }

    def shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return the shape and the dtype of one sample's tensors, by place."""
        return {place: (shape, _DTYPES[dtype]) for place, (dtype, shape) in self.leaves.items()}
