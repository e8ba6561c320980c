"""One AdamW step with an EWC penalty, in place, over lists of tensors.

:func:`foreach` is the reference: plain PyTorch on any device. :func:`fused` is the compiled
operator ``torch.ops.cl_optim.ewc_adamw_``. Both take the same arguments and do the same arithmetic
(``csrc/ewc_adamw.h``): float64 tensors in float64, all others in float32.

State may be narrower than the arithmetic: :mod:`cl_optim.ops.importance_codec` has the formats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from cl_optim.ops import importance_codec as codec
from cl_optim.ops import library
from cl_optim.ops.gram import DTYPES, combine_, is_dense

Penalty: TypeAlias = Literal["gradient", "decoupled", "proximal"]
PENALTIES: tuple[str, ...] = get_args(Penalty)

_PIECE = 2**22  # weights whose penalty is summed at once

library.define(
    "ewc_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
    "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] max_exp_avg_sqs, Tensor[] importances, "
    "Tensor[] anchors, Tensor(e!)[] compensations, Tensor(f!)[] steps, Tensor[] memories, "
    "Tensor[] coefficients, Tensor? lr_tensor, Tensor? grad_scale, Tensor? found_inf, "
    "Tensor(g!)? sums, *, float lr, float beta1, float beta2, float eps, float weight_decay, "
    "float ewc_lambda, float damping, str penalty, bool amsgrad, bool maximize, "
    "bool stochastic) -> ()",
    cpu="compiled",
    cuda="compiled",
)


def state_dtype(param: Tensor) -> torch.dtype:
    """The dtype of a parameter's arithmetic, and of its state unless that is to be narrower."""
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
    damping: float = 0.0
    penalty: str = "gradient"
    amsgrad: bool = False
    maximize: bool = False
    stochastic: bool = False

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "weight_decay", "ewc_lambda", "damping"):
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


class State(NamedTuple):
    """What is kept of the parameters, in lists of their order. An empty list: none has it.

    Moments and importance have the parameter's `state_dtype`, bfloat16, or (uint8) the codes of
    :mod:`~cl_optim.ops.importance_codec`; moments of one parameter alike.

    Attributes:
        exp_avgs: First moments; updated.
        exp_avg_sqs: Second moments; updated.
        max_exp_avg_sqs: Their running maxima for AMSGrad; updated.
        importances: Fisher diagonals. A sign bit, or the code of frozen ones, marks a weight that
            keeps its bits.
        anchors: θ* for each importance, in the parameter's dtype, its `state_dtype` or bfloat16.
        compensations: For Kahan summation, what each bfloat16 parameter lacks of the weight;
            updated. An empty tensor where a parameter has none.
        steps: Step counts before this step, one float32 number each, on the parameter's device;
            advanced by one.
    """

    exp_avgs: TensorList
    exp_avg_sqs: TensorList
    max_exp_avg_sqs: TensorList
    importances: TensorList
    anchors: TensorList
    compensations: TensorList
    steps: TensorList


class Inputs(NamedTuple):
    """What a step takes besides, none of which the compiled step reads on the host.

    The gradients are used as it says, and stay as they are.

    Attributes:
        memories: For each gradient the rows that GEM adds to it, [t, ...] of its shape and strides,
            of any floating dtype no wider than its arithmetic; or empty.
        coefficients: How much of them, [t] float64 for each gradient. A row with 0 is not read.
        lr: In place of the hyperparameter; one float32, and so the next two.
        grad_scale: The gradients are this times too large (``torch.amp.GradScaler``).
        found_inf: Not 0: nothing is updated, and no step counted.
        sums: float64 [2], written: λ Σ F (θ − θ*)² over the weights that are not frozen, and
            Σ (θ − θ*)² over all, from before the step.
    """

    memories: TensorList = ()
    coefficients: TensorList = ()
    lr: Tensor | None = None
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    sums: Tensor | None = None


NO_INPUTS = Inputs()


class MisfitError(ValueError, RuntimeError):
    """The tensors of a step do not fit together; nothing has been written.

    A RuntimeError, too, since that is what the operator raises.
    """


def check(
    params: TensorList, grads: TensorList, state: State, amsgrad: bool, inputs: Inputs = NO_INPUTS
) -> None:
    """Refuse what a step cannot take, by the rules of ``csrc/ewc_adamw_arguments.h``.

    Arguments as `foreach`; gradients, and whatever else is only read, may be lazily negated.

    Raises:
        MisfitError: Naming the argument and what it should be.
    """
    n = len(params)
    protected = n if len(state.importances) else 0
    for name, tensors, length in (
        ("grads", grads, n),
        ("exp_avgs", state.exp_avgs, n),
        ("exp_avg_sqs", state.exp_avg_sqs, n),
        ("max_exp_avg_sqs", state.max_exp_avg_sqs, n if amsgrad else 0),
        ("importances", state.importances, protected),
        ("anchors", state.anchors, protected),
        ("compensations", state.compensations, n if len(state.compensations) else 0),
        ("steps", state.steps, n),
        ("memories", inputs.memories, n if len(inputs.memories) else 0),
        ("coefficients", inputs.coefficients, n if len(inputs.memories) else 0),
    ):
        if len(tensors) != length:
            raise MisfitError(f"{name} must hold {length} tensors, not {len(tensors)}.")
    for i, param in enumerate(params):
        _check_one(i, param, params[0].device, grads, state)
        if len(inputs.memories):
            stored = [t[i].dtype for t in (state.exp_avgs, state.importances) if len(t)]
            codes = torch.uint8 in stored
            _check_rows(i, param, codes, inputs.memories[i], inputs.coefficients[i])
    if n:
        _check_numbers(inputs, params[0].device)


def _check_one(
    i: int, param: Tensor, device: torch.device, grads: TensorList, state: State
) -> None:
    if param.dtype not in DTYPES:
        raise MisfitError(
            f"params[{i}] must be float32, float64, bfloat16 or float16, not {param.dtype}."
        )
    if param.device != device:
        raise MisfitError(f"params[{i}] is on {param.device}, but params[0] is on {device}.")
    _check_like("params", i, param, param, (param.dtype,), written=True)
    wide = state_dtype(param)
    narrow = () if wide == torch.float64 else (torch.bfloat16, torch.uint8)
    _check_like("grads", i, grads[i], param, (param.dtype,))
    _check_like("exp_avgs", i, state.exp_avgs[i], param, (wide, *narrow), written=True)
    moments = (state.exp_avgs[i].dtype,)
    _check_like("exp_avg_sqs", i, state.exp_avg_sqs[i], param, moments, written=True)
    if len(state.max_exp_avg_sqs):
        _check_like("max_exp_avg_sqs", i, state.max_exp_avg_sqs[i], param, moments, written=True)
    if len(state.importances):
        _check_like("importances", i, state.importances[i], param, (wide, *narrow))
        _check_like("anchors", i, state.anchors[i], param, (wide, param.dtype, *narrow[:1]))
    if len(state.compensations) and state.compensations[i].numel():
        if param.dtype != torch.bfloat16:
            raise MisfitError(
                f"compensations[{i}] must be empty: params[{i}] is not bfloat16 but {param.dtype}."
            )
        compensation = state.compensations[i]
        _check_like("compensations", i, compensation, param, (torch.bfloat16,), written=True)
    step = state.steps[i]
    if step.numel() != 1 or step.dtype != torch.float32 or step.device != param.device:
        raise MisfitError(
            f"steps[{i}] must be one float32 number on the device of params[{i}], not "
            f"{_described(step)}."
        )
    if step.is_neg():
        raise MisfitError(_negated(f"steps[{i}]"))


def _check_like(
    name: str,
    i: int,
    tensor: Tensor,
    param: Tensor,
    dtypes: tuple[torch.dtype, ...],
    *,
    written: bool = False,
) -> None:
    if tensor.layout is not torch.strided:
        raise MisfitError(f"{name}[{i}] must be a dense tensor, not {tensor.layout}.")
    if tensor.dtype not in dtypes:
        allowed = " or ".join(_dtype_name(dtype) for dtype in dict.fromkeys(dtypes))
        raise MisfitError(f"{name}[{i}] must be {allowed}, not {tensor.dtype}.")
    if tensor.dtype == torch.uint8:
        if tensor.shape != codec.packed_shape(param.numel()) or not tensor.is_contiguous():
            raise MisfitError(
                f"{name}[{i}] must be {codec.PACKED_BLOCK} bytes for each {codec.BLOCK} elements "
                f"of params[{i}], not {_described(tensor)}."
            )
    elif tensor.shape != param.shape:
        raise MisfitError(
            f"{name}[{i}] must have the shape of params[{i}], {list(param.shape)}, not "
            f"{list(tensor.shape)}."
        )
    if tensor.device != param.device:
        raise MisfitError(
            f"{name}[{i}] must be on the device of params[{i}], {param.device}, not "
            f"{tensor.device}."
        )
    if written and tensor.is_neg():
        raise MisfitError(_negated(f"{name}[{i}]"))


def _check_rows(i: int, param: Tensor, codes: bool, rows: Tensor, coefficients: Tensor) -> None:
    # Where the parameter takes part as a copy, so do its rows.
    in_place = param.is_contiguous() or (not codes and is_dense(param.shape, param.stride()))
    if (
        rows.dim() == 0
        or rows.shape[1:] != param.shape
        or (in_place and rows.stride()[1:] != param.stride())
    ):
        raise MisfitError(
            f"memories[{i}] must be rows of the shape and strides of params[{i}], "
            f"{list(param.shape)}, not {list(rows.shape)} of strides {list(rows.stride())}."
        )
    if rows.dtype not in DTYPES:
        raise MisfitError(
            f"memories[{i}] must be float32, float64, bfloat16 or float16, not {rows.dtype}."
        )
    if rows.dtype == torch.float64 and param.dtype != torch.float64:
        raise MisfitError(f"memories[{i}] may be float64 only where params[{i}] is.")
    if rows.device != param.device or coefficients.device != param.device:
        raise MisfitError(
            f"memories[{i}] and coefficients[{i}] must be on the device of params[{i}], "
            f"{param.device}, not {rows.device} and {coefficients.device}."
        )
    if (
        coefficients.shape != rows.shape[:1]
        or coefficients.dtype != torch.float64
        or not coefficients.is_contiguous()
    ):
        raise MisfitError(
            f"coefficients[{i}] must be contiguous float64, one for each row of memories[{i}], "
            f"not {_described(coefficients)}."
        )


def _check_numbers(inputs: Inputs, device: torch.device) -> None:
    for name, number in (
        ("lr_tensor", inputs.lr),
        ("grad_scale", inputs.grad_scale),
        ("found_inf", inputs.found_inf),
    ):
        # A learning rate that autograd looks at may be of any dtype: the reference takes it.
        if number is not None and (
            number.numel() != 1
            or number.device != device
            or (number.dtype != torch.float32 and not torch.is_grad_enabled())
        ):
            raise MisfitError(
                f"{name} must be one float32 number on the parameters' device, not "
                f"{_described(number)}."
            )
    sums = inputs.sums
    if sums is None:
        return
    if sums.numel() != 2 or sums.dtype != torch.float64 or not sums.is_contiguous():
        raise MisfitError(f"sums must be two float64 numbers, not {_described(sums)}.")
    if sums.device != device:
        raise MisfitError(f"sums must be on the parameters' device, not {sums.device}.")


def _described(tensor: Tensor) -> str:
    strides = "" if tensor.is_contiguous() else f" with strides {list(tensor.stride())}"
    return f"{tensor.dtype} {list(tensor.shape)}{strides} on {tensor.device}"


def _dtype_name(dtype: torch.dtype) -> str:
    return "codes (uint8)" if dtype == torch.uint8 else str(dtype).removeprefix("torch.")


def _negated(name: str) -> str:
    return f"{name} is written and must not be lazily negated: pass what resolve_neg() returns."


def fused(
    params: TensorList,
    grads: TensorList,
    state: State,
    hyper: Hyperparameters,
    inputs: Inputs = NO_INPUTS,
) -> None:
    """The compiled step; all tensors on one device that has kernels. Arguments as `foreach`."""
    torch.ops.cl_optim.ewc_adamw_(params, grads, *state, *inputs, **vars(hyper))
    _increment_versions(params)


class Plan:
    """The compiled step for some parameters of a group, again and again.

    Handing a tensor to an operator takes longer than updating a small one. What stays as it is is
    therefore checked once and kept as addresses; :func:`take_step` looks whether every tensor is
    still the same, of the same layout and in the same memory, and reads anew where parameters and
    gradients are. It keeps the tensors alive.

    Args:
        device: Where the tensors are.
        group: All parameters of the group.
        members: Which of them take the step.
        skipped: Which have no gradient.
        states: The members' state: dicts of tensors with the names of `State`'s fields, without
            their plural.
    """

    def __init__(
        self,
        device: torch.device,
        group: list[Tensor],
        members: list[int],
        skipped: list[int],
        states: list[dict[str, Any]],
    ) -> None:
        self.device = device
        self.params = [group[index] for index in members]
        self.compiled = library.extension(device.type).Plan(group, members, skipped, states)

    @property
    def possible(self) -> bool:
        """Whether the tensors are such that there is one: dense, state in its parameter's order."""
        return bool(self.compiled.possible)

    def workspace(self, inputs: Inputs) -> Tensor | None:
        """Memory that a step needs for the time being."""
        size = self.compiled.workspace(inputs.sums is not None)
        return torch.empty(size, dtype=torch.uint8, device=self.device) if size else None


class Call(NamedTuple):
    """What a planned step takes for one plan.

    Attributes:
        plan: The plan.
        group: All parameters of its group, as they are now.
        hyper: The group's hyperparameters.
        inputs: What the step takes besides.
    """

    plan: Plan
    group: list[Tensor]
    hyper: Hyperparameters
    inputs: Inputs


def take_step(calls: Sequence[Call]) -> bool:
    """Take a step by plans of one device type, if all of them may.

    Returns:
        Whether they may. If not, nothing has changed, and `fused` says what is wrong, or takes the
        step where the kernels cannot read a tensor as it lies: lazily negated, in other strides.
    """
    arguments = [
        (
            group,
            list(inputs.memories),
            list(inputs.coefficients),
            plan.workspace(inputs),
            *inputs[2:],
            vars(hyper),
        )
        for plan, group, hyper, inputs in calls
    ]
    extension = library.extension(calls[0].plan.device.type)
    if not extension.take_step([call.plan.compiled for call in calls], arguments):
        return False
    for call in calls:
        _increment_versions(call.plan.params)
    return True


def snapshot(state: dict[Any, Any]) -> Any:
    """What can say, by ``matches(state)``, whether a dict has the same keys and values, quickly."""
    return library.extension("cpu").Snapshot(state)


def _increment_versions(params: TensorList) -> None:
    # Writes through raw pointers pass by what tells autograd that a saved tensor has changed.
    torch.autograd.graph.increment_version(params)


def foreach(
    params: TensorList,
    grads: TensorList,
    state: State,
    hyper: Hyperparameters,
    inputs: Inputs = NO_INPUTS,
) -> None:
    """The reference step, with ``torch._foreach_*``.

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

    loaded = map(codec.load_importance, state.importances, params)
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
        _proximal_(theta, importances, anchors, pulls)

    random = [
        partial(_random, grad, count, any(s.dtype == torch.uint8 for s in stored))
        for grad, count, *stored in zip(
            grads, counts, state.exp_avgs, state.importances or params, strict=True
        )
    ]
    _store_moments(state.exp_avgs, exp_avgs, random, use=1)
    _store_moments(state.exp_avg_sqs, exp_avg_sqs, random, use=2)
    _store_moments(state.max_exp_avg_sqs, max_exp_avg_sqs, random, use=3)
    if penalty:
        theta = [torch.where(*each) for each in zip(frozen, before, theta, strict=True)]
    _store_weights(params, theta, frozen, state.compensations, random, hyper.stochastic)


def _weights(params: TensorList, state: State) -> list[Tensor]:
    """The weights in the dtype of the arithmetic; the parameter itself if that is its own."""
    weights = [p.to(state_dtype(p)) for p in params]
    for weight, compensation in zip(weights, state.compensations, strict=False):
        if compensation.numel():
            weight += compensation
    return weights


def _moments(stored: TensorList, params: TensorList, *, signed: bool = False) -> list[Tensor]:
    pairs = zip(stored, params, strict=True)
    return [codec.load_moment(moment, param, signed=signed) for moment, param in pairs]


Random: TypeAlias = Callable[[int], Tensor]  # random numbers for the elements, for each use


def _random(grad: Tensor, count: Any, row_major: bool, use: int) -> Tensor:
    grad = torch.empty_like(grad, dtype=torch.float32).copy_(grad)
    return codec.hashed(grad.contiguous() if row_major else grad, count, use)


def _store_moments(
    stored: TensorList, values: TensorList, random: Sequence[Random], use: int
) -> None:
    # Without AMSGrad there is nothing to store for it.
    for moment, value, numbers in zip(stored, values, random, strict=False):
        codec.store_moment(moment, value, partial(numbers, use), signed=use == 1)


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
            low = codec.stochastic_bfloat16(value - high, random[i](0))
            kept = frozen[i] if frozen else torch.zeros((), dtype=torch.bool, device=param.device)
            param.copy_(torch.where(kept, param, high))
            compensations[i].copy_(torch.where(kept, compensations[i], low))
        elif stochastic and param.dtype == torch.bfloat16:
            param.copy_(codec.stochastic_bfloat16(value, random[i](0)))
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


def _proximal_(
    theta: TensorList, importances: TensorList, anchors: TensorList, pulls: Sequence[Any]
) -> None:
    for value, importance, anchor, pull in zip(theta, importances, anchors, pulls, strict=True):
        c = importance * pull
        # The same number twice: the first leaves F = 0 unmoved, the second survives c = inf.
        toward = value + c / (1 + c) * (anchor - value)
        from_anchor = anchor + (value - anchor) / (1 + c)
        value.copy_(torch.where(c < 1, toward, from_anchor))


Step: TypeAlias = Callable[..., None]  # with the arguments of `foreach`


def choose(
    device_type: str, *, use_foreach: bool | None, use_fused: bool | None
) -> tuple[str, Step]:
    """Choose who computes the step on a device, by the user's ``foreach`` and ``fused``.

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
    reason = library.why_not("ewc_adamw_", device_type) if use_fused else ""
    if reason:
        raise RuntimeError(f"fused=True is not possible: {reason}")
    if use_fused or (use_fused is None and use_foreach is None):
        warning = (
            "EWC-AdamW runs on its slower reference: {} Pass foreach=True to choose the reference "
            "without this warning."
        )
        backend = library.choose("ewc_adamw_", device_type, warning)
        if backend != "reference":
            return backend, fused
    return "foreach", foreach
