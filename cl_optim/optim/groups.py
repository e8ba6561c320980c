"""Parameters of any optimizer's groups: their names in sentences, and what they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any

from torch import Tensor

Groups = Sequence[Mapping[str, Any]]


def are_of(groups: Groups, seen: Sequence[Sequence[Tensor]]) -> bool:
    """Tell whether groups have the parameters that were seen."""
    return len(groups) == len(seen) and all(
        len(group["params"]) == len(params) and all(map(is_, group["params"], params))
        for group, params in zip(groups, seen, strict=True)
    )


def renumbered(seen: Sequence[Sequence[Tensor]], groups: Groups) -> dict[int, int]:
    """Return by the number that a group had when it was seen the one that it has now."""
    now = {tuple(map(id, group["params"])): number for number, group in enumerate(groups)}
    numbers = {number: now.get(tuple(map(id, params))) for number, params in enumerate(seen)}
    return {old: new for old, new in numbers.items() if new is not None}


def name_of(group: Mapping[str, Any], param: Tensor) -> str:
    """Return the parameter's name; its place and shape where the optimizer was made without."""
    index = next(i for i, p in enumerate(group["params"]) if p is param)
    if "param_names" in group:
        return str(group["param_names"][index])
    return f"{index} of its group (shape {tuple(param.shape)})"
