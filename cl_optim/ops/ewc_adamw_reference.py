"""The EWC-AdamW step in plain PyTorch, on any device: the formulas that the kernels compute.

AdamW (Loshchilov & Hutter 2019) on L(θ) + λ Σ F (θ − θ*)² (Kirkpatrick et al. 2017, without their
½). With Δ = θ − θ* from before the step and c = 2·lr·λ·F:

- gradient: g ← g + 2λFΔ, then AdamW;
- decoupled: AdamW on g, and θ ← θ − lr·2λFΔ;
- proximal: AdamW on g gives θ′, then θ ← θ* + (θ′ − θ*)/(1 + c).

``csrc/ewc_adamw.h`` does the same arithmetic: float64 tensors in float64, all others in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from cl_optim.ops import formats
from cl_optim.ops import importance_codec as codec
from cl_optim.ops.ewc_adamw_arguments import (
    NO_INPUTS,
    Hyperparameters,
    Inputs,
    State,
    TensorList,
)
from cl_optim.ops.gram import combine_
from cl_optim.ops.importance_codec import Use

_PIECE = 2**22  # weights whose penalty is summed at once


def foreach(
    params: TensorList,
    grads: TensorList,
    state: State,
    hyper: Hyperparameters,
    inputs: Inputs = NO_INPUTS,
) -> None:
    """Take the reference step, with ``torch._foreach_*``.

    Args:
        params: float32, float64, bfloat16 or float16 tensors of any shapes; updated.
        grads: Same dtypes and shapes.
        state: What is kept of them.
        hyper: The step's hyperparameters.
        inputs: What the step takes besides.
    """
    if not params:
        return
    memories, coefficients, lr_tensor, grad_scale, found_inf, sums = inputs
    lr = hyper.lr if lr_tensor is None else lr_tensor.double()
    if found_inf is not None and found_inf.item() != 0.0:
        return
    if memories:
        grads = [grad.clone() for grad in grads]
        combine_(grads, memories, torch.stack(list(coefficients)), range(len(grads)))
    penalty = hyper.penalty if state.importances else None
    torch._foreach_add_(list(state.steps), 1.0)
    theta = _weights(params, state)
    before = [t.clone() for t in theta] if penalty else []
    exp_avgs = _moments(state.exp_avgs, params, signed=True)
    exp_avg_sqs = _moments(state.exp_avg_sqs, params)
    max_exp_avg_sqs = _moments(state.max_exp_avg_sqs, params) if hyper.amsgrad else []
    gradient = [g.to(t.dtype, copy=True) for g, t in zip(grads, theta, strict=True)]
    if grad_scale is not None:
        torch._foreach_mul_(gradient, 1.0 / grad_scale.double())
    if hyper.maximize:
        torch._foreach_neg_(gradient)

    loaded = map(formats.load_importance, state.importances, params)
    importances, frozen = map(list, zip(*loaded, strict=True)) if penalty else ([], [])
    anchors = [a.to(t.dtype) for a, t in zip(state.anchors, theta, strict=bool(penalty))]
    if sums is not None:
        sums.copy_(_sums(theta, importances, frozen, anchors, hyper.ewc_lambda))
    drift: Sequence[Tensor] = []  # θ − θ* from before the step
    pulls = [hyper.pull(t.dtype, lr) for t in theta]
    if penalty in ("gradient", "decoupled"):
        drift = torch._foreach_mul(torch._foreach_sub(_saved(theta), anchors), importances)
        drift = torch._foreach_mul(drift, pulls)
    if penalty == "gradient":
        torch._foreach_add_(gradient, list(drift))

    torch._foreach_lerp_(exp_avgs, gradient, 1.0 - hyper.beta1)
    torch._foreach_mul_(exp_avg_sqs, hyper.beta2)
    torch._foreach_addcmul_(exp_avg_sqs, gradient, gradient, 1.0 - hyper.beta2)
    second_moments = _saved(exp_avg_sqs)
    if hyper.amsgrad:
        torch._foreach_maximum_(max_exp_avg_sqs, second_moments)
        second_moments = _saved(max_exp_avg_sqs)
    counts = [_count(step) for step in state.steps]
    corrections = [(1.0 - hyper.beta2**count) ** -0.5 for count in counts]
    denominators = torch._foreach_mul(torch._foreach_sqrt(second_moments), corrections)
    torch._foreach_add_(denominators, hyper.eps)
    if penalty:
        damping = [min(hyper.damping, torch.finfo(t.dtype).max) for t in theta]
        dampings = torch._foreach_add(torch._foreach_mul(importances, damping), 1.0)
        torch._foreach_mul_(denominators, dampings)

    torch._foreach_sub_(theta, torch._foreach_mul(_saved(theta), lr * hyper.weight_decay))
    if penalty == "decoupled":
        torch._foreach_sub_(theta, list(drift))
    step_sizes = [-lr / (1.0 - hyper.beta1**count) for count in counts]
    updates = torch._foreach_div(_saved(exp_avgs), denominators)
    torch._foreach_mul_(updates, step_sizes)
    torch._foreach_add_(theta, updates)
    if penalty == "proximal":
        proximal_(theta, importances, anchors, pulls)

    random = [
        partial(_random, grad, count, any(map(formats.is_codes, stored)))
        for grad, count, *stored in zip(
            grads, counts, state.exp_avgs, state.importances or params, strict=True
        )
    ]
    _store_moments(state.exp_avgs, exp_avgs, random, Use.EXP_AVG)
    _store_moments(state.exp_avg_sqs, exp_avg_sqs, random, Use.EXP_AVG_SQ)
    _store_moments(state.max_exp_avg_sqs, max_exp_avg_sqs, random, Use.MAX_EXP_AVG_SQ)
    if penalty:
        theta = [torch.where(*each) for each in zip(frozen, before, theta, strict=True)]
    _store_weights(params, theta, frozen, state.compensations, random, hyper.stochastic)


def _weights(params: TensorList, state: State) -> list[Tensor]:
    """Return the weights in the dtype of the arithmetic; the parameter if that is its own."""
    weights = [p.to(formats.arithmetic_dtype(p)) for p in params]
    for weight, compensation in zip(weights, state.compensations, strict=False):
        if compensation.numel():
            weight += compensation
    return weights


def _moments(stored: TensorList, params: TensorList, *, signed: bool = False) -> list[Tensor]:
    pairs = zip(stored, params, strict=True)
    return [formats.load_moment(moment, param, signed=signed) for moment, param in pairs]


Random: TypeAlias = Callable[[Use], Tensor]  # random numbers for the elements, for each use


def _random(grad: Tensor, count: Any, row_major: bool, use: Use) -> Tensor:
    grad = torch.empty_like(grad, dtype=torch.float32).copy_(grad)
    return codec.hashed(grad.contiguous() if row_major else grad, count, use)


def _store_moments(
    stored: TensorList, values: TensorList, random: Sequence[Random], use: Use
) -> None:
    # Without AMSGrad there is nothing to store for it.
    for moment, value, numbers in zip(stored, values, random, strict=False):
        formats.store_moment(moment, value, partial(numbers, use), signed=use is Use.EXP_AVG)


def _store_weights(
    params: TensorList,
    theta: TensorList,
    frozen: TensorList,
    compensations: TensorList,
    random: Sequence[Random],
    stochastic: bool,
) -> None:
    for i, (param, value) in enumerate(zip(params, theta, strict=True)):
        if compensations and compensations[i].numel():
            high = value.to(param.dtype)
            low = codec.stochastic_bfloat16(value - high, random[i](Use.PARAM))
            kept = frozen[i] if frozen else torch.zeros((), dtype=torch.bool, device=param.device)
            param.copy_(torch.where(kept, param, high))
            compensations[i].copy_(torch.where(kept, compensations[i], low))
        elif stochastic and param.dtype == torch.bfloat16:
            param.copy_(codec.stochastic_bfloat16(value, random[i](Use.PARAM)))
        elif param is not value:
            param.copy_(value)


def _sums(
    theta: TensorList,
    importances: TensorList,
    frozen: TensorList,
    anchors: TensorList,
    lambda_: float,
) -> Tensor:
    if not importances:
        return torch.zeros(2, dtype=torch.float64, device="cpu")
    each = map(penalty_sums, theta, importances, frozen, anchors)
    penalty, drift = torch.stack(list(each)).sum(0)
    return torch.stack([lambda_ * penalty, drift])


def penalty_sums(weight: Tensor, importance: Tensor, frozen: Tensor, anchor: Tensor) -> Tensor:
    """Sum F (θ − θ*)² over the weights that are not frozen, and (θ − θ*)² over all.

    In float64, which a product of float32 numbers cannot overflow; a piece at a time, so that no
    copy of the whole is as wide.

    Args:
        weight: θ, of any shape and real floating-point dtype, as the others.
        importance: F.
        frozen: Bool.
        anchor: θ*.

    Returns:
        float64 [2], on the weights' device.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=weight.device)
    flat = (tensor.reshape(-1) for tensor in (weight, importance, frozen, anchor))
    for theta, f, keeps, theta_star in zip(*(torch.split(t, _PIECE) for t in flat), strict=True):
        squares = (theta.double() - theta_star.double()).square()
        penalty = (f.double() * squares).masked_fill(keeps, 0.0).sum()
        sums = sums + torch.stack([penalty, squares.sum()])
    return sums


def _saved(tensors: TensorList) -> list[Tensor]:
    # Where autograd looks on (differentiable=True), what it saves may not be written in place by
    # the next step.
    return [t.clone() for t in tensors] if torch.is_grad_enabled() else list(tensors)


def _count(step: Tensor) -> Any:
    # A count on a GPU stays there, since reading it would wait for the GPU; in float64, where
    # 1 − β² loses nothing.
    return step.double() if step.is_cuda else step.item()


def proximal_(
    theta: TensorList, importances: TensorList, anchors: TensorList, pulls: Sequence[Any]
) -> None:
    """Set θ to θ* + (θ − θ*)/(1 + pull·F), all in the dtype of the arithmetic."""
    for value, importance, anchor, pull in zip(theta, importances, anchors, pulls, strict=True):
        c = importance * pull
        # The same number twice: the first leaves F = 0 unmoved, the second survives c = inf.
        toward = value + c / (1 + c) * (anchor - value)
        from_anchor = anchor + (value - anchor) / (1 + c)
        value.copy_(torch.where(c < 1, toward, from_anchor))
