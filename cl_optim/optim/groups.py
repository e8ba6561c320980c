"""Parameters of any optimizer's groups: their names in sentences, and what they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

Groups = Sequence[Mapping[str, Any]]


def name_of(group: Mapping[str, Any], param: Tensor) -> str:
    """Return the parameter's name; its place and shape where the optimizer was made without."""
    index = next(i for i, p in enumerate(group["params"]) if p is param)
    if "param_names" in group:
        return str(group["param_names"][index])
    return f"{index} of its group (shape {tuple(param.shape)})"
