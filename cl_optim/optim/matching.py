"""Which importance, and which mask, is of which parameter; and which parameters have none."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from cl_optim.distributed import here, is_dtensor, reshard
from cl_optim.importance.names import compare_names, match_names
from cl_optim.ops import formats
from cl_optim.ops.checks import listed
from cl_optim.ops.warn import warn
from cl_optim.optim.groups import Groups, name_of

_LOGGER = logging.getLogger(__name__)

# Each parameter with what there is for it: an importance, if any; a mask.
Matched: TypeAlias = "list[tuple[Tensor, Tensor | None]]"
Masks: TypeAlias = "list[tuple[Tensor, Tensor]]"


def named_params(groups: Groups, model: torch.nn.Module | None) -> dict[str, Tensor]:
    """Return the groups' parameters by their names in the model; without one, by their own.

    Raises:
        ValueError: A parameter has no name, or one that another has, too.
    """
    if model is not None:
        reshard(model)
        names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        params = [param for group in groups for param in group["params"]]
        absent = [p for p in params if p not in names]
        if absent:
            raise ValueError(
                f"model must hold the optimizer's parameters; {len(absent)} of them are not in it, "
                f"the first of shape {tuple(absent[0].shape)}."
            )
        return {names[param]: param for param in params}
    named: dict[str, Tensor] = {}
    for group in groups:
        if "param_names" not in group:
            raise ValueError(
                "the optimizer was made without parameter names: make it from "
                "model.named_parameters(), or pass model=model to consolidate()."
            )
        for name, param in zip(group["param_names"], group["params"], strict=True):
            if name in named:
                raise ValueError(
                    f"two parameters have the name {name!r}: make the optimizer from the "
                    "named_parameters() of one model, or pass model=model to consolidate()."
                )
            named[name] = param
    return named


# --- importance -----------------------------------------------------------------------------------


def equal_importance(params: list[Tensor], part: Callable[[Tensor], Tensor]) -> Matched:
    """Give each parameter F = 1, and None to those that cannot move.

    Args:
        params: The parameters.
        part: Returns the part of one that is in this process, of whose shape the importance is.
    """
    fixed = _cannot_move(params)
    ones = (torch.ones((), device=param.device).expand(part(param).shape) for param in params)
    return [(p, None if p in fixed else one) for p, one in zip(params, ones, strict=True)]


def refuse_dtensors(named: Mapping[str, Tensor]) -> None:
    """Raise ValueError where a parameter is spread over processes, for Kronecker importance."""
    for name, param in named.items():
        if is_dtensor(param):
            raise ValueError(
                f"parameter {name!r} is a DTensor, spread over processes, and Kronecker importance "
                "needs whole matrices: consolidate importance.diagonal(), or train with "
                "DistributedDataParallel."
            )


def match_importance(
    importance: Mapping[str, Tensor], named: dict[str, Tensor], *, strict: bool
) -> Matched:
    """Give each parameter its importance, which is checked, and None where there is none for it.

    Of a DTensor it is that of the part which is in this process.

    Raises:
        ValueError: An importance is of no parameter or does not fit it, or a parameter that can
            move has none.
    """
    names = {meaning: name for name, meaning in match_names(importance, named).items()}
    match = compare_names(importance, named)
    fixed = _cannot_move(list(named.values()))
    match = match._replace(new=[name for name in match.new if named[name] not in fixed])
    if strict and match.vanished:
        raise ValueError(
            f"importance names {listed(match.vanished)}, which this optimizer does not have "
            "(strict=False ignores it)."
        )
    if strict and match.new:
        raise ValueError(
            f"importance has nothing for parameter {listed(match.new)} "
            "(strict=False leaves it without)."
        )
    matched, resized = [], []
    for name, param in named.items():
        new = importance[names[name]] if name in names else None
        if not strict and isinstance(new, Tensor) and new.shape != param.shape:
            resized.append(name)
            new = None
        if new is not None:
            _check_form(name, new, param)
            new = here(new, param)
        matched.append((param, new))
    # Where processes differ, none may stop before what all have to do together.
    for (name, param), (_, new) in zip(named.items(), matched, strict=True):
        if new is not None:
            _check_values(name, new, param)
    if match.new or match.vanished or resized:
        match = match._replace(resized=resized)
        _LOGGER.warning("Consolidated with strict=False: %s", match)
    return matched


def _check_form(name: str, importance: Tensor, param: Tensor) -> None:
    if (
        not isinstance(importance, Tensor)
        or importance.is_complex()
        or importance.layout is not torch.strided
    ):
        raise ValueError(f"the importance of {name!r} must be a real, dense tensor.")
    if importance.shape != param.shape:
        raise ValueError(
            f"the importance of {name!r} must have the parameter's shape {tuple(param.shape)}, "
            f"not {tuple(importance.shape)}."
        )


def _check_values(name: str, importance: Tensor, param: Tensor) -> None:
    if importance.numel() == 0:
        return
    # As they will be stored, at most.
    values = importance.detach().to(formats.arithmetic_dtype(param))
    low, high = (bound.item() for bound in values.aminmax())  # NaN shows in both
    if not (low >= 0.0 and high < float("inf")):
        raise ValueError(
            f"the importance of {name!r} must be finite and at least 0; it reaches from {low} "
            f"to {high}."
        )


# --- masks ----------------------------------------------------------------------------------------


def match_masks(masks: Mapping[str, Tensor], named: Mapping[str, Tensor], *, strict: bool) -> Masks:
    """Return each parameter with its mask; what fits none is an error, or is left out.

    Of a DTensor it is that of the part which is in this process.
    """
    names = match_names(masks, named)
    matched = []
    for name, mask in masks.items():
        param = named[names[name]] if name in names else None
        if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
            raise TypeError(f"the mask of {name!r} must be a bool tensor.")
        if param is not None and mask.shape == param.shape:
            matched.append((param, here(mask, param).to(param.device)))
        elif strict and param is None:
            raise ValueError(f"a mask names {name!r}, which this optimizer does not have.")
        elif strict:
            raise ValueError(
                f"the mask of {name!r} must have the parameter's shape, not {tuple(mask.shape)}."
            )
    return matched


# --- what cannot move -----------------------------------------------------------------------------


def _cannot_move(params: list[Tensor]) -> set[Tensor]:
    """Return what requires no gradient and has none; nothing where all are set by hand."""
    if not any(param.requires_grad for param in params):
        return set()
    return {param for param in params if not param.requires_grad and param.grad is None}


def unprotected(groups: Groups, state: Mapping[Tensor, Mapping[str, Any]]) -> list[Tensor]:
    """Return what consolidate() left without importance because it cannot move."""
    fixed = _cannot_move([param for group in groups for param in group["params"]])
    return [
        param
        for group in groups
        for param in group["params"]
        if group["consolidations"] and param in fixed and "importance" not in state.get(param, {})
    ]


def warn_of_moving(moving: list[Tensor], groups: Groups) -> None:
    """Say that parameters move now which consolidate() left without importance."""
    names = [
        name_of(group, param)
        for group in groups
        for param in group["params"]
        if any(param is one for one in moving)
    ]
    warn(
        f"parameter {listed(names)} did not require a gradient at the last consolidate(), and is "
        "trained now without protection: call consolidate() with its importance once it requires "
        "one."
    )
