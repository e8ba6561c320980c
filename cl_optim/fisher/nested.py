"""Tensors inside nested tuples, lists and mappings: arguments of a function, or a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor


def tensors(value: object) -> Iterator[Tensor]:
    """Yield the tensors in ``value``, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return ``value`` with ``function`` applied to each tensor in it."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(function, item) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(function, item) for item in value)
    if isinstance(value, Mapping):
        return {key: map_tensors(function, item) for key, item in value.items()}
    return value


def replace(arguments: Any, others: Mapping[int, Tensor]) -> Any:
    """Return ``arguments``, a tuple or a dict, with others in place of tensors with those ids."""
    if isinstance(arguments, dict):
        return {key: _replaced(value, others) for key, value in arguments.items()}
    return tuple([_replaced(value, others) for value in arguments])


def _replaced(value: Any, others: Mapping[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return others.get(id(value), value)
    if isinstance(value, (tuple, list, Mapping)):
        return map_tensors(lambda tensor: others.get(id(tensor), tensor), value)
    return value
