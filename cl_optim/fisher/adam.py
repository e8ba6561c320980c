"""Adam's second moment as an importance that costs nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cl_optim.distributed import here, is_dtensor, like
from cl_optim.fisher.checks import check_integer
from cl_optim.fisher.model import provenance
from cl_optim.importance.importance import Importance
from cl_optim.ops import formats


def importance_from_adam(
    optimizer: torch.optim.Optimizer, model: nn.Module, *, batch_size: int = 1
) -> Importance:
    """Take the running mean of squared gradients that Adam keeps: the "Squisher".

    It is what the Fisher information would be if a batch were a sample: v̂ = v/(1 − β₂ᵗ) averages
    squared *batch-mean* gradients over about 1/(1 − β₂) steps, with the data's labels, at weights
    that were still moving. Compare it with :func:`estimate_fisher` before relying on it.

    Args:
        optimizer: Adam, AdamW, EWCAdamW or another that keeps ``exp_avg_sq`` and ``step``.
        model: Names the parameters.
        batch_size: Multiplies v̂: squares of means over b samples whose gradients are mostly noise
            are smaller by b.

    Returns:
        An importance of one "sample", F = batch_size · v̂, for each parameter that was stepped.

    Raises:
        ValueError: The optimizer keeps no second moment, or in a format that is not known, or
            holds none of the model's parameters; or what it keeps is not the task's alone: after
            ``consolidate`` the gradients include the penalty's, under GEM they are projected.

    References:
        Li et al. 2025, arXiv:2507.18807.
    """
    check_integer("batch_size", batch_size, 1)
    layer: Any = optimizer
    while hasattr(layer, "optimizer"):  # a wrapper
        if hasattr(type(layer), "last_projection"):
            raise ValueError(
                "under GEM, Adam's second moment is that of projected gradients, not of the "
                "task's; use estimate_fisher."
            )
        penalties = {group.get("penalty") for group in layer.param_groups}
        if "gradient" in penalties and any(True for _ in getattr(layer, "protected", tuple)()):
            raise ValueError(
                "after consolidate() with penalty='gradient', Adam's second moment includes the "
                "penalty's gradient (2λFΔ)²; use estimate_fisher."
            )
        layer = layer.optimizer
    sums: dict[str, Tensor] = {}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state: dict[str, Any] = optimizer.state.get(parameter, {})
            name = names.get(parameter)
            if "importance" in state:
                raise ValueError(
                    f"parameter {name!r} is protected: after consolidate(), Adam's second moment "
                    f"includes the penalty's gradient (2λFΔ)²; use estimate_fisher."
                )
            if name is None or not state:
                continue
            if "exp_avg_sq" not in state or "step" not in state:
                raise ValueError(
                    f"{type(optimizer).__name__} keeps no exp_avg_sq for parameter {name!r}: it "
                    f"must be Adam or a relative of it."
                )
            beta = float(group["betas"][1])
            stored = state["exp_avg_sq"].detach()
            if is_dtensor(parameter) and not is_dtensor(stored):  # EWCAdamW has the part itself
                part = _second_moment(stored, here(parameter), group, name)
                moment = like(parameter, part)
            else:
                moment = _second_moment(stored, parameter, group, name)
            sums[name] = moment * (batch_size / (1 - beta ** float(state["step"])))
    if not sums:
        raise ValueError("the optimizer has taken no step on a parameter of the model.")
    metadata = {
        "estimator": "importance_from_adam",
        "kind": "adam",
        "labels": "empirical",
        "sample": "batch",
        "batch_size": batch_size,
        **provenance(model, {name: p for p, name in names.items() if name in sums}),
    }
    return Importance(sums, 1, None, metadata)


def _second_moment(stored: Tensor, parameter: Tensor, group: dict[str, Any], name: str) -> Tensor:
    if formats.is_codes(stored) and "state_dtype" in group:  # EWCAdamW's codes
        return formats.load_moment(stored, parameter, signed=False)
    if stored.shape != parameter.shape or not stored.is_floating_point():
        raise ValueError(
            f"the second moment of parameter {name!r} must be floating-point numbers of its shape "
            f"{tuple(parameter.shape)}, not {stored.dtype} of shape {tuple(stored.shape)}: use "
            "estimate_fisher."
        )
    return stored.to(torch.promote_types(stored.dtype, torch.float32))
