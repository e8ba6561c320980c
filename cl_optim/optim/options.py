"""What a group of EWCAdamW asks for: every check of it, and what a step takes of it."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cl_optim.ops import ewc_adamw as ops
from cl_optim.ops import formats
from cl_optim.ops.checks import check_whole
from cl_optim.ops.ewc_adamw_arguments import Hyperparameters
from cl_optim.optim.groups import name_of


def check_group(group: dict[str, Any]) -> Hyperparameters:
    """Check a group's options, and write formats by name where they are dtypes.

    Returns:
        The options that a step's arithmetic takes.

    Raises:
        ValueError: An option is out of range; the message names it.
    """
    beta1, beta2 = group["betas"]
    mean = group["importance_mean"]
    damping = group["importance_damping"] / mean if mean > 0.0 else 0.0
    hyper = Hyperparameters(
        lr=0.0 if lr_stays_tensor(group) else float(group["lr"]),
        beta1=float(beta1),
        beta2=float(beta2),
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        ewc_lambda=group["ewc_lambda"],
        damping=min(damping, sys.float_info.max),
        penalty=group["penalty"],
        amsgrad=group["amsgrad"],
        maximize=group["maximize"],
        stochastic=group["rounding"] == "stochastic",
    )
    formats.settle(group)
    check_whole("every", group["every"])
    if not 0.0 <= group["importance_damping"] < math.inf:
        raise ValueError(
            f"importance_damping must be finite and at least 0, not {group['importance_damping']}."
        )
    if group["strength"] is not None and not 0.0 <= group["strength"] < math.inf:
        raise ValueError(
            f"strength must be finite and at least 0, or None, not {group['strength']}."
        )
    return hyper


def check_param(group: Mapping[str, Any], param: Tensor) -> None:
    """Raise ValueError where a parameter is not one that a group can hold."""
    if not param.is_floating_point():
        raise ValueError(
            f"parameter {name_of(group, param)} must be of a real floating-point dtype, not "
            f"{param.dtype}."
        )
    check_rounding(group, param, name_of(group, param))


def check_rounding(group: Mapping[str, Any], param: Tensor, name: str) -> None:
    """Raise ValueError where a parameter's dtype does not have the group's rounding."""
    if group.get("rounding", "nearest") != "nearest" and param.dtype == torch.float16:
        raise ValueError(
            f"rounding must be 'nearest' for parameter {name}, which is float16: the others are "
            "for bfloat16."
        )


def choose(group: Mapping[str, Any], device: torch.device) -> tuple[str, ops.Step]:
    """Choose who computes a group's step on a device; as `cl_optim.ops.ewc_adamw.choose`."""
    differentiable = group["differentiable"]
    if differentiable and group["fused"]:
        raise ValueError("differentiable=True and fused=True exclude each other: choose one.")
    return ops.choose(
        device.type, use_foreach=differentiable or group["foreach"], use_fused=group["fused"]
    )


def lr_stays_tensor(group: Mapping[str, Any]) -> bool:
    """Tell where the learning rate must not be read: on a device, or for a gradient through it."""
    lr = group["lr"]
    return isinstance(lr, Tensor) and (lr.device.type != "cpu" or bool(group.get("differentiable")))


def lr_tensor(group: Mapping[str, Any], device: torch.device) -> Tensor | None:
    """Return the learning rate where it stays a tensor, on a device; None where it is a number."""
    if not lr_stays_tensor(group):
        return None
    lr: Tensor = group["lr"]
    return lr.to(device) if group.get("differentiable") else lr.to(device, torch.float32)
