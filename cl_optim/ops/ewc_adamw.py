"""One AdamW step with an EWC penalty, in place, over lists of tensors.

:func:`foreach` is the reference: plain PyTorch on any device. :func:`fused` is the compiled
operator ``torch.ops.cl_optim.ewc_adamw_``. Both take the same arguments and do the same arithmetic
(``csrc/ewc_adamw.h``): float64 tensors in float64, all others in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from cl_optim.ops import library
from cl_optim.ops.gram import combine_

Penalty: TypeAlias = Literal["gradient", "decoupled", "proximal"]
PENALTIES: tuple[str, ...] = get_args(Penalty)


def state_dtype(param: Tensor) -> torch.dtype:
    """The dtype of a parameter's moments and importance: that of the arithmetic."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


@dataclass
class Hyperparameters:
    """What all tensors of one call share; checked on construction. Do not change one afterwards.

    Raises:
        ValueError: A value is outside its range; the message names it.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    ewc_lambda: float = 0.0
    penalty: str = "gradient"
    amsgrad: bool = False
    maximize: bool = False

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "weight_decay", "ewc_lambda"):
            value = getattr(self, name)
            if not (0.0 <= value < math.inf):
                raise ValueError(f"{name} must be finite and at least 0, not {value}.")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            if not (0.0 <= value < 1.0):
                raise ValueError(f"{name} (of betas) must be in [0, 1), not {value}.")
        if self.penalty not in PENALTIES:
            raise ValueError(f"penalty must be one of {PENALTIES}, not {self.penalty!r}.")

    def pull(self, dtype: torch.dtype, lr: float | Tensor) -> Any:
        """2λ, times lr unless the penalty goes into the gradient; saturates at dtype's maximum.

        An infinite factor would turn an importance of 0 into NaN. A tensor if lr is one.
        """
        pull: float | Tensor = 2.0 * self.ewc_lambda
        if self.penalty != "gradient":
            pull = pull * lr
        largest = torch.finfo(dtype).max
        return pull.clamp(max=largest) if isinstance(pull, Tensor) else min(pull, largest)


TensorList: TypeAlias = Sequence[Tensor]


class Inputs(NamedTuple):
    """What a step takes besides, none of which the compiled step reads on the host.

    The gradients are used as it says, and stay as they are.

    Attributes:
        memories: For each gradient the rows that GEM adds to it, [t, ...] of its shape and strides,
            of any floating dtype no wider than its arithmetic; or empty.
        coefficients: How much of them, [t] float64 for each gradient. A row with 0 is not read.
        lr: In place of the hyperparameter; one float32, and so the rest.
        grad_scale: The gradients are this times too large (``torch.amp.GradScaler``).
        found_inf: Not 0: nothing is updated, and no step counted.
    """

    memories: TensorList = ()
    coefficients: TensorList = ()
    lr: Tensor | None = None
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


NO_INPUTS = Inputs()


def fused(
    params: TensorList,
    grads: TensorList,
    exp_avgs: TensorList,
    exp_avg_sqs: TensorList,
    max_exp_avg_sqs: TensorList,
    importances: TensorList,
    anchors: TensorList,
    steps: TensorList,
    hyper: Hyperparameters,
    inputs: Inputs = NO_INPUTS,
) -> None:
    """The compiled step; all tensors on one device that has kernels. Arguments as `foreach`."""
    states = (exp_avgs, exp_avg_sqs, max_exp_avg_sqs, importances, anchors, steps)
    torch.ops.cl_optim.ewc_adamw_(params, grads, *states, *inputs, **vars(hyper))
    _increment_versions(params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps)


class Plan:
    """The compiled step for the same parameters and state again and again.

    Handing a tensor to an operator takes longer than updating a small one. What stays where it is
    is therefore checked once and kept as a table of addresses; a step hands over the parameters
    and gradients alone, whose addresses, dtypes, shapes and strides are read again each time.

    Args:
        params: As for `foreach`, and so the rest. The plan keeps these tensors alive.
        exp_avgs: First moments.
        exp_avg_sqs: Second moments.
        max_exp_avg_sqs: Their running maxima, or empty.
        importances: Fisher diagonals, or empty.
        anchors: θ*, or empty.
        steps: Step counts.
    """

    def __init__(
        self,
        params: TensorList,
        exp_avgs: TensorList,
        exp_avg_sqs: TensorList,
        max_exp_avg_sqs: TensorList,
        importances: TensorList,
        anchors: TensorList,
        steps: TensorList,
    ) -> None:
        self.states = (exp_avgs, exp_avg_sqs, max_exp_avg_sqs, importances, anchors, steps)
        self._addresses = self._state_addresses()
        self._table = torch.ops.cl_optim.ewc_adamw_plan(params, *self.states)

    def _state_addresses(self) -> list[int]:
        return [address for tensors in self.states for address in map(Tensor.data_ptr, tensors)]

    def step(
        self,
        params: TensorList,
        grads: TensorList,
        hyper: Hyperparameters,
        inputs: Inputs = NO_INPUTS,
    ) -> bool:
        """Take one step.

        Returns:
            Whether it was taken. It was not, and nothing has changed, where a parameter's dtype or
            layout is not what it was, a state tensor was given other memory (``t.data = …``), or
            one is not laid out like its parameter.
        """
        if len(self._table) != len(params) or self._addresses != self._state_addresses():
            return False
        planned = torch.ops.cl_optim.ewc_adamw_planned_
        if not planned(params, grads, self._table, *inputs, **vars(hyper)):
            return False
        exp_avgs, exp_avg_sqs, max_exp_avg_sqs, _, _, steps = self.states
        _increment_versions(params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps)
        return True


def _increment_versions(*lists: TensorList) -> None:
    # Writes through raw pointers pass autograd's version counters by.
    for written in lists:
        if written:
            torch.autograd.graph.increment_version(written)


def foreach(
    params: TensorList,
    grads: TensorList,
    exp_avgs: TensorList,
    exp_avg_sqs: TensorList,
    max_exp_avg_sqs: TensorList,
    importances: TensorList,
    anchors: TensorList,
    steps: TensorList,
    hyper: Hyperparameters,
    inputs: Inputs = NO_INPUTS,
) -> None:
    """The reference step, with ``torch._foreach_*``.

    Args:
        params: float32, float64, bfloat16 or float16 tensors of any shapes; updated.
        grads: Same dtypes and shapes.
        exp_avgs: First moments in `state_dtype`; updated.
        exp_avg_sqs: Second moments in `state_dtype`; updated.
        max_exp_avg_sqs: Their running maxima, empty unless ``hyper.amsgrad``; updated.
        importances: Fisher diagonals in `state_dtype`, or an empty list for plain AdamW.
        anchors: θ* for each importance, in the parameter's dtype or in `state_dtype`.
        steps: Step counts before this step, one float32 number each, on the parameter's device;
            advanced by one.
        hyper: The step's hyperparameters.
        inputs: What the step takes besides.
    """
    if not params:
        return
    memories, coefficients, lr_tensor, grad_scale, found_inf = inputs
    lr = hyper.lr if lr_tensor is None else lr_tensor.double()
    if found_inf is not None and found_inf.item() != 0.0:
        return
    if memories:
        grads = [grad.clone() for grad in grads]
        combine_(grads, memories, torch.stack(list(coefficients)), range(len(grads)))
    penalty = hyper.penalty if importances else None
    torch._foreach_add_(list(steps), 1.0)
    theta = [p.to(state_dtype(p)) for p in params]
    gradient = [g.to(t.dtype, copy=True) for g, t in zip(grads, theta, strict=True)]
    if grad_scale is not None:
        torch._foreach_mul_(gradient, 1.0 / grad_scale.double())
    if hyper.maximize:
        torch._foreach_neg_(gradient)

    drift: Sequence[Tensor] = []  # θ − θ* from before the step
    pulls = [hyper.pull(t.dtype, lr) for t in theta]
    if penalty in ("gradient", "decoupled"):
        wide = [a.to(t.dtype) for a, t in zip(anchors, theta, strict=True)]
        drift = torch._foreach_mul(torch._foreach_sub(_saved(theta), wide), list(importances))
        drift = torch._foreach_mul(drift, pulls)
    if penalty == "gradient":
        torch._foreach_add_(gradient, list(drift))

    torch._foreach_lerp_(list(exp_avgs), gradient, 1.0 - hyper.beta1)
    torch._foreach_mul_(list(exp_avg_sqs), hyper.beta2)
    torch._foreach_addcmul_(list(exp_avg_sqs), gradient, gradient, 1.0 - hyper.beta2)
    second_moments = _saved(exp_avg_sqs)
    if hyper.amsgrad:
        torch._foreach_maximum_(list(max_exp_avg_sqs), second_moments)
        second_moments = _saved(max_exp_avg_sqs)
    counts = [_count(step) for step in steps]
    corrections = [(1.0 - hyper.beta2**count) ** -0.5 for count in counts]
    denominators = torch._foreach_mul(torch._foreach_sqrt(second_moments), corrections)
    torch._foreach_add_(denominators, hyper.eps)

    torch._foreach_sub_(theta, torch._foreach_mul(_saved(theta), lr * hyper.weight_decay))
    if penalty == "decoupled":
        torch._foreach_sub_(theta, list(drift))
    step_sizes = [-lr / (1.0 - hyper.beta1**count) for count in counts]
    updates = torch._foreach_div(_saved(exp_avgs), denominators)
    torch._foreach_mul_(updates, step_sizes)
    torch._foreach_add_(theta, updates)
    if penalty == "proximal":
        _proximal_(theta, importances, anchors, pulls)
    for param, value in zip(params, theta, strict=True):
        if param is not value:
            param.copy_(value)


def _saved(tensors: TensorList) -> list[Tensor]:
    # Where autograd looks on (differentiable=True), what it saves may not be written in place by
    # the next step.
    return [t.clone() for t in tensors] if torch.is_grad_enabled() else list(tensors)


def _count(step: Tensor) -> Any:
    # A count on a GPU stays there, since reading it would wait for the GPU; in float64, where
    # 1 − β² loses nothing.
    return step.double() if step.is_cuda else step.item()


def _proximal_(
    theta: TensorList, importances: TensorList, anchors: TensorList, pulls: Sequence[Any]
) -> None:
    for value, importance, anchor, pull in zip(theta, importances, anchors, pulls, strict=True):
        c = importance * pull
        anchor = anchor.to(value.dtype)
        # The same number twice: the first leaves F = 0 unmoved, the second survives c = inf.
        toward = value + c / (1 + c) * (anchor - value)
        from_anchor = anchor + (value - anchor) / (1 + c)
        value.copy_(torch.where(c < 1, toward, from_anchor))


Step: TypeAlias = Callable[..., None]  # with the arguments of `foreach`


def choose(
    device_type: str, *, use_foreach: bool | None, use_fused: bool | None
) -> tuple[str, Step]:
    """Who computes the step on a device, by the ``foreach`` and ``fused`` that a user asked for.

    ``None`` for both takes the compiled kernels, or the reference with one warning where there are
    none.

    Returns:
        A name (the device type for compiled kernels, else ``"foreach"``) and the function.

    Raises:
        ValueError: Both are ``True``.
        RuntimeError: ``use_fused=True`` where there are no compiled kernels; the message says why.
    """
    if use_foreach and use_fused:
        raise ValueError("foreach=True and fused=True exclude each other: choose one.")
    if use_fused and not library.available(device_type):
        raise RuntimeError(f"fused=True is not possible: {library.explain(device_type)}")
    wants_fused = use_fused or (use_fused is None and use_foreach is None)
    if wants_fused and library.available(device_type):
        return device_type, fused
    if wants_fused:
        library.warn_once(
            f"EWC-AdamW runs on its slower reference: {library.explain(device_type)} "
            "Pass foreach=True to choose the reference without this warning."
        )
    return "foreach", foreach
