"""What EWCAdamW keeps of each parameter: formats, beginnings, what a state dict must have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from cl_optim.ops import ewc_adamw as ops
from cl_optim.ops import importance_codec as codec

# What a group may ask for.
FORMATS: dict[str, tuple[str | None, ...]] = {
    "importance_dtype": ("float32", "bfloat16", "log8"),
    "anchor_dtype": (None, "float32", "bfloat16"),
    "state_dtype": ("float32", "bfloat16", "8bit"),
    "rounding": ("nearest", "stochastic", "kahan"),
}
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
PROTECTION = ("importance", "anchor")

# Eight bits are for the moments of large tensors; those of norms and biases weigh nothing and
# matter most.
SMALLEST_8BIT = 4096

# What a saved group must have.
_HYPERPARAMETERS = (
    "lr",
    "betas",
    "eps",
    "weight_decay",
    "ewc_lambda",
    "penalty",
    "amsgrad",
    "maximize",
)

_FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def check_formats(group: Mapping[str, Any]) -> None:
    """Raise ValueError where a group asks for a format that there is not."""
    for option, allowed in FORMATS.items():
        if group[option] not in allowed:
            raise ValueError(f"{option} must be one of {allowed}, not {group[option]!r}.")


def like(param: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor laid out like the parameter; in the dtype of its arithmetic, if in none."""
    dtype = dtype or ops.state_dtype(param)
    return torch.empty_like(param, dtype=dtype, memory_format=torch.preserve_format)


def float_dtype(param: Tensor, name: str) -> torch.dtype:
    """What a float format means for a parameter: float64 ones keep everything in float64."""
    return torch.float64 if param.dtype == torch.float64 else _FLOATS[name]


# --- moments --------------------------------------------------------------------------------------


def start_moments(state: dict[str, Any], param: Tensor, group: Mapping[str, Any]) -> None:
    """Add what a step needs and the state does not have yet."""
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
        state["exp_avg"] = _zeros(param, group)
        state["exp_avg_sq"] = _zeros(param, group)
    if group["amsgrad"] and "max_exp_avg_sq" not in state:
        state["max_exp_avg_sq"] = _zeros(param, group)
    if _is_compensated(param, group) and "compensation" not in state:
        state["compensation"] = like(param, param.dtype).zero_()


def has_moments(state: Mapping[str, Any], param: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether `start_moments` has nothing to do."""
    return (
        "step" in state
        and (not group["amsgrad"] or "max_exp_avg_sq" in state)
        and (not _is_compensated(param, group) or "compensation" in state)
    )


def _is_compensated(param: Tensor, group: Mapping[str, Any]) -> bool:
    return group["rounding"] == "kahan" and param.dtype == torch.bfloat16


def weight_of(param: Tensor, state: Mapping[str, Any]) -> Tensor:
    """The weight in the dtype of the arithmetic, a copy: with Kahan summation more than θ shows."""
    weight = like(param).copy_(param.detach())
    return weight + state["compensation"] if "compensation" in state else weight


def _is_8bit(param: Tensor, group: Mapping[str, Any]) -> bool:
    return (
        group["state_dtype"] == "8bit"
        and param.dtype != torch.float64
        and param.numel() >= SMALLEST_8BIT
    )


def _zeros(param: Tensor, group: Mapping[str, Any]) -> Tensor:
    if _is_8bit(param, group):
        shape = codec.packed_shape(param.numel())
        return torch.zeros(shape, dtype=torch.uint8, device=param.device)
    narrow = group["state_dtype"] == "bfloat16"
    return like(param, float_dtype(param, "bfloat16" if narrow else "float32")).zero_()


# --- state dicts ----------------------------------------------------------------------------------


def loaded(key: str, value: Any, param: Tensor, group: Mapping[str, Any]) -> Any:
    """A value of a state dict as the parameter's state has it: never narrower than it was saved.

    Moments are the exception: they take the group's format, which is saved with them or, where the
    state dict is AdamW's, the one that was asked for.
    """
    if not isinstance(value, Tensor):
        return value
    if key == "step":
        return value.to(param.device, torch.float32, copy=True)
    if value.dtype == torch.uint8 and key not in MOMENTS:
        return value.to(param.device, copy=True)
    if key in MOMENTS:
        return _loaded_moment(value.to(param.device), param, group, signed=key == "exp_avg")
    keeps_dtype = key in ("anchor", "compensation") or value.dtype == torch.bfloat16
    return like(param, value.dtype if keeps_dtype else None).copy_(value)


def _loaded_moment(
    value: Tensor, param: Tensor, group: Mapping[str, Any], *, signed: bool
) -> Tensor:
    moment = _zeros(param, group)
    if value.dtype == moment.dtype:
        return moment.copy_(value)
    wide = like(param).copy_(codec.load_moment(value, param, signed=signed))
    if moment.dtype == torch.uint8:
        return (codec.encode_signed if signed else codec.encode_log8)(wide)
    return moment.copy_(wide)


def from_adamw(state_dict: dict[str, Any], param_groups: list[dict[str, Any]]) -> dict[str, Any]:
    """A state dict of torch's AdamW with what it lacks; any other as it is."""
    groups = state_dict.get("param_groups", ())
    if not groups or not all("decoupled_weight_decay" in group for group in groups):
        return state_dict
    if any(not g["decoupled_weight_decay"] and g["weight_decay"] != 0 for g in groups):
        raise ValueError(
            "the state dict is one of torch.optim.Adam with weight decay in the gradient, "
            "which this optimizer does not have."
        )
    ours = ("ewc_lambda", "penalty", "importance_damping", "track_penalty", *FORMATS)
    groups = [
        {**{key: here[key] for key in ours}, **group}
        for here, group in zip(param_groups, groups, strict=False)
    ] + list(groups[len(param_groups) :])
    for group in groups:
        del group["decoupled_weight_decay"]
    return {**state_dict, "param_groups": groups}


def check_state_dict(
    state_dict: Mapping[str, Any], param_groups: list[dict[str, Any]], names: list[str]
) -> None:
    """Raise ValueError where a state dict lacks something or belongs to other parameters."""
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(f"the state dict is truncated: it has no {key!r}.")
    groups = state_dict["param_groups"]
    if [len(group.get("params", ())) for group in groups] != [
        len(group["params"]) for group in param_groups
    ]:
        raise ValueError(
            "the state dict belongs to other parameters: its groups have "
            f"{[len(group.get('params', ())) for group in groups]} parameters, this "
            f"optimizer's have {[len(group['params']) for group in param_groups]}."
        )
    for number, group in enumerate(groups):
        for key in _HYPERPARAMETERS:
            if key not in group:
                raise ValueError(f"the state dict is truncated: its group {number} has no {key!r}.")
    indices = [(index, group) for group in groups for index in group["params"]]
    params = [param for group in param_groups for param in group["params"]]
    for (index, group), param, name in zip(indices, params, names, strict=True):
        _check_state(state_dict["state"].get(index, {}), param, name, group["amsgrad"])


def _check_state(state: Mapping[str, Any], param: Tensor, name: str, amsgrad: bool) -> None:
    for key in _required(state, amsgrad):
        if key not in state:
            raise ValueError(f"the state dict is truncated: parameter {name} has no {key!r}.")
        if key == "step":
            continue
        packed = state[key].dtype == torch.uint8
        shape = codec.packed_shape(param.numel()) if packed else tuple(param.shape)
        if tuple(state[key].shape) != shape:
            raise ValueError(
                f"the state dict belongs to other parameters: {key!r} of parameter {name} has "
                f"shape {tuple(state[key].shape)}, not {shape}."
            )


def _required(state: Mapping[str, Any], amsgrad: bool) -> Iterator[str]:
    if state.keys() & {"step", *MOMENTS}:
        yield from ("step", "exp_avg", "exp_avg_sq")
        if amsgrad:
            yield "max_exp_avg_sq"
    if state.keys() & set(PROTECTION):
        yield from PROTECTION
    if "compensation" in state:
        yield "compensation"
