"""What a group of EWC asks for: its options, and every check of them and of what is wrapped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cl_optim.ops import formats
from cl_optim.ops.checks import check_whole, dtype_name
from cl_optim.ops.ewc_adamw_arguments import PENALTIES
from cl_optim.ops.ewc_pull import Options
from cl_optim.ops.warn import warn
from cl_optim.optim.options import check_param, lr_stays_tensor
from cl_optim.optim.protecting import Protecting
from cl_optim.optim.wrapper import layers

# What a user may choose for each group, and what consolidate() leaves there.
OPTIONS = (
    "ewc_lambda", "penalty", "importance_dtype", "anchor_dtype", "strength", "every", "rounding",
    "basis_dtype", "importance_damping",
)  # fmt: skip
LEFT = {"importance_mean": 0.0, "tasks": 0.0, "consolidations": 0}
# What EWCAdamW's groups have besides, and a group here cannot choose.
FIXED = {"track_penalty": False, "state_dtype": "float32"}
OWN = (*OPTIONS, *LEFT, *FIXED)
_ROUNDING = ("nearest", "stochastic")


def given(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that a group has."""
    return {
        key: dtype_name(group[key]) if key.endswith("_dtype") else group[key]
        for key in OPTIONS
        if key in group
    }


def chosen(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the options that a user has given each group, and not those of an EWC before this."""
    found = [(given(group), FIXED.keys() <= group.keys()) for group in groups]
    before = [options for options, is_of_another in found if is_of_another]
    if any(options != before[0] for options in before):
        warn(
            "the optimizer has been in an EWC before, whose options of single groups are replaced "
            "by those of the new one: give them to the groups again, as "
            "optimizer.param_groups[0]['ewc_lambda'] = 10.0."
        )
    return [{} if is_of_another else options for options, is_of_another in found]


def check_wrapped(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError where a pull beside an optimizer would be wrong, or one too many."""
    name = type(optimizer).__name__
    for layer in layers(optimizer):
        if isinstance(layer, Protecting):
            raise ValueError(
                f"optimizer must not be an {type(layer).__name__}, nor around one, which has a "
                "pull of its own: consolidate() that."
            )
    if name == "CPUOffloadOptimizer":
        raise ValueError(
            f"optimizer must not be a {name}: it steps copies of the weights in host memory, which "
            "a pull would not reach; use an optimizer with 8-bit states instead."
        )
    taken = [key for key in OWN if key in optimizer.defaults]
    if taken:
        raise ValueError(
            f"optimizer must not have an option {taken[0]!r} of its own, as {name} has: EWC's has "
            "the same name in the groups."
        )


def check_group(group: dict[str, Any]) -> None:
    """Raise ValueError where a group's options or parameters are none that can be protected."""
    check_options(group)
    for param in group["params"]:
        check_param(group, param)


def check_options(group: dict[str, Any]) -> Options:
    """Check a group's options, and write formats by name where they are dtypes.

    Returns:
        What a pull takes of them.
    """
    formats.settle(group)
    penalty, rounding, strength = group["penalty"], group["rounding"], group["strength"]
    if penalty not in PENALTIES:
        raise ValueError(f"penalty must be one of {PENALTIES}, not {penalty!r}.")
    if rounding not in _ROUNDING:
        raise ValueError(f"rounding must be one of {_ROUNDING}, not {rounding!r}.")
    if strength is not None and not 0.0 <= strength < math.inf:
        raise ValueError(f"strength must be finite and at least 0, or None, not {strength}.")
    damping = group["importance_damping"]
    if not 0.0 <= damping < math.inf:
        raise ValueError(f"importance_damping must be finite and at least 0, not {damping}.")
    check_whole("every", group["every"])
    if penalty != "proximal" and group["every"] > 1:
        raise ValueError(
            f"every must be 1 with penalty={penalty!r}, not {group['every']}: only the proximal "
            "pull can be taken of several steps at once."
        )
    if group.get("differentiable"):
        raise ValueError(
            "optimizer must not be made with differentiable=True: a pull is none of the operations "
            "that autograd sees."
        )
    lr = 0.0
    if penalty != "gradient":
        if "train_mode" in group and "weight_sum" in group:
            raise ValueError(
                f"penalty must be 'gradient' around a schedule-free optimizer, not {penalty!r}: "
                "its parameters are a mixture of two sequences, of which a pull would reach one."
            )
        lr = _learning_rate(group)
    return Options(
        lr, group["ewc_lambda"], penalty, bool(group.get("maximize")), rounding == "stochastic"
    )


def _learning_rate(group: Mapping[str, Any]) -> float:
    """Return a group's learning rate; 0 where it stays on a device."""
    if group.get("lr") is None:
        raise ValueError(
            f"penalty must be 'gradient', not {group['penalty']!r}, where a group has no learning "
            "rate 'lr': give it one (relative_step=False of Adafactor)."
        )
    return 0.0 if lr_stays_tensor(group) else float(group["lr"])
