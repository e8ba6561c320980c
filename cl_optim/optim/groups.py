"""Parameter groups of any optimizer: names of parameters, and whether a state dict is for them."""

from __future__ import annotations

import sys
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


def is_dtensor(param: Tensor) -> bool:
    """Tell whether it is a DTensor, without importing what that takes a second to import."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(param, module.DTensor)


def check_groups(state_dict: Mapping[str, Any], param_groups: Groups) -> None:
    """Raise ValueError unless the state dict's groups have as many parameters as these."""
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(f"the state dict is truncated: it has no {key!r}.")
    saved = [len(group.get("params", ())) for group in state_dict["param_groups"]]
    here = [len(group["params"]) for group in param_groups]
    if saved != here:
        raise ValueError(
            f"the state dict belongs to other parameters: its groups have {saved} parameters, "
            f"this optimizer's have {here}."
        )
