"""The λ at which the penalty's pull is as large as what the task does to the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from cl_optim.ops import formats
from cl_optim.optim import protection

Member = tuple[str, Tensor, Mapping[str, Any], Mapping[str, Any]]


def suggest_lambda(members: Iterable[Member], drift: float) -> float:
    """Solve ‖2λFδ‖ = ‖g‖ in float64; :meth:`EWCAdamW.suggest_lambda` says what each is.

    Args:
        members: Name, parameter, state and group of each protected parameter.
        drift: |δ| as a fraction of a tensor's root mean square.
    """
    if not 0.0 < drift < math.inf:
        raise ValueError(f"drift must be positive and finite, not {drift}.")
    members = [member for member in members if member[1].numel()]
    if not members:
        raise RuntimeError("suggest_lambda() needs importance: call consolidate() first.")
    forms = {group["penalty"] for *_, group in members}
    if len(forms) > 1:
        raise ValueError(
            f"suggest_lambda() needs one form of the penalty in all groups, not {sorted(forms)}: "
            "their λ are not on one scale."
        )
    of_gradients = forms == {"gradient"}
    task = pull = 0.0
    for name, param, state, group in members:
        term = param.grad if of_gradients else _adam_direction(param, state, group)
        if term is None:  # a step would skip it, its pull included
            continue
        importance, frozen = protection.read(state, param)
        size = _square_sum(term.double().masked_fill(frozen, 0.0))
        if not math.isfinite(size):
            raise ValueError(
                f"the gradient of parameter {name} must be finite: call suggest_lambda() after a "
                "backward pass that did not overflow."
            )
        task += size
        mean_square = _square_sum(state["anchor"].double()) / param.numel()
        pull += mean_square * _square_sum(importance.double().masked_fill(frozen, 0.0))
    if not task > 0.0:
        missing = "a gradient: call it after backward()" if of_gradients else "a step of the task"
        raise RuntimeError(f"suggest_lambda() needs {missing}; without, every λ is too large.")
    if not pull > 0.0:
        raise ValueError(
            "no λ balances the gradient: the importance, or the weights that drift is relative to, "
            "are 0 wherever there is a gradient and nothing is frozen."
        )
    return math.sqrt(task) / (2.0 * drift * math.sqrt(pull))


def _square_sum(values: Tensor) -> float:
    return float(values.square().sum())


def _adam_direction(
    param: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]
) -> Tensor | None:
    """Return m̂/(√v̂ + ε) of the last step; None before the first."""
    steps = float(state.get("step", 0.0))
    if steps == 0.0:
        return None
    beta1, beta2 = (float(beta) for beta in group["betas"])
    second = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
    first = formats.load_moment(state["exp_avg"], param, signed=True).double() / (1 - beta1**steps)
    second = formats.load_moment(second, param, signed=False).double() / (1 - beta2**steps)
    direction: Tensor = first / (second.sqrt() + group["eps"])
    return direction
