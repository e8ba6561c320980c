"""One AdamW step with an EWC penalty, in place, over lists of tensors.

:func:`fused` is the compiled operator ``torch.ops.cl_optim.ewc_adamw_``, :func:`foreach` the
reference. Both take the same arguments and do the same arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import TypeAlias

import torch

from cl_optim.ops import library
from cl_optim.ops.ewc_adamw_arguments import NO_INPUTS, Hyperparameters, Inputs, State, TensorList
from cl_optim.ops.ewc_adamw_reference import foreach

_OPTIONS = ", ".join(f"{field.type} {field.name}" for field in fields(Hyperparameters))

library.define(
    "ewc_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
    "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] max_exp_avg_sqs, Tensor[] importances, "
    "Tensor[] anchors, Tensor(e!)[] compensations, Tensor(f!)[] steps, Tensor[] memories, "
    "Tensor[] coefficients, Tensor? lr_tensor, Tensor? grad_scale, Tensor? found_inf, "
    f"Tensor(g!)? sums, *, {_OPTIONS}) -> ()",
    cpu="compiled",
    cuda="compiled",
)


def fused(
    params: TensorList,
    grads: TensorList,
    state: State,
    hyper: Hyperparameters,
    inputs: Inputs = NO_INPUTS,
) -> None:
    """Take the compiled step; all tensors are on one device that has kernels. See `foreach`."""
    torch.ops.cl_optim.ewc_adamw_(params, grads, *state, *inputs, **vars(hyper))
    # Writes through raw pointers pass by what tells autograd that a saved tensor has changed.
    torch.autograd.graph.increment_version(params)


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
