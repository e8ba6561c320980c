"""What an EWC-AdamW step takes, and what it refuses: ``csrc/ewc_adamw_arguments.h`` in Python."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from cl_optim.ops import formats
from cl_optim.ops import importance_codec as codec
from cl_optim.ops.gram import DTYPES, is_dense

Penalty: TypeAlias = Literal["gradient", "decoupled", "proximal"]
PENALTIES: tuple[str, ...] = get_args(Penalty)


@dataclass
class Hyperparameters:
    """What all tensors of one call share; checked on construction. Do not change one afterwards.

    The operator's last arguments are its fields, in their order: ``EWCAdamWOptions::for_each`` in
    ``csrc/ewc_adamw.h`` has the same.

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
        """Return 2λ, times lr unless the penalty goes into the gradient; at most dtype's maximum.

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

    :mod:`cl_optim.ops.formats` says what dtypes they may have; moments of one parameter alike.

    Attributes:
        exp_avgs: First moments; updated.
        exp_avg_sqs: Second moments; updated.
        max_exp_avg_sqs: Their running maxima for AMSGrad; updated.
        importances: Fisher diagonals. Weights that they mark as frozen keep their bits.
        anchors: θ* for each importance.
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
            stored = [t[i] for t in (state.exp_avgs, state.importances) if len(t)]
            codes = any(map(formats.is_codes, stored))
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
    stored = formats.stored_dtypes(param)
    _check_like("grads", i, grads[i], param, (param.dtype,))
    _check_like("exp_avgs", i, state.exp_avgs[i], param, stored, written=True)
    moments = (state.exp_avgs[i].dtype,)
    _check_like("exp_avg_sqs", i, state.exp_avg_sqs[i], param, moments, written=True)
    if len(state.max_exp_avg_sqs):
        _check_like("max_exp_avg_sqs", i, state.max_exp_avg_sqs[i], param, moments, written=True)
    if len(state.importances):
        _check_like("importances", i, state.importances[i], param, stored)
        _check_like("anchors", i, state.anchors[i], param, formats.anchor_dtypes(param))
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
        allowed = " or ".join(map(formats.described, dict.fromkeys(dtypes)))
        raise MisfitError(f"{name}[{i}] must be {allowed}, not {tensor.dtype}.")
    fits = tensor.shape == formats.stored_shape(tensor, param)
    if formats.is_codes(tensor):
        if not fits or not tensor.is_contiguous():
            raise MisfitError(
                f"{name}[{i}] must be {codec.PACKED_BLOCK} bytes for each {codec.BLOCK} elements "
                f"of params[{i}], not {_described(tensor)}."
            )
    elif not fits:
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


def _negated(name: str) -> str:
    return f"{name} is written and must not be lazily negated: pass what resolve_neg() returns."
