"""What EWCAdamW keeps of each parameter: formats, beginnings, what a state dict must have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from cl_optim.importance.names import canonical_name
from cl_optim.ops import importance_codec as codec
from cl_optim.ops import importance_codec as codec
from cl_optim.ops.ewc_adamw_arguments import state_dtype
from cl_optim.optim.groups import check_groups

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
    dtype = dtype or state_dtype(param)
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


def loaded(saved: Mapping[str, Any], param: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    """A saved state as the parameter's: never narrower than it was, if the arithmetic is as wide.

    Moments take the group's format, which is saved with them or, where the state dict is AdamW's,
    the one that was asked for. The parameter may have another dtype than the one that was saved.
    """
    state = dict(saved)
    for key, value in saved.items():
        if key == "step":
            state[key] = torch.as_tensor(value, dtype=torch.float32, device=param.device).clone()
        elif key in MOMENTS:
            signed = key == "exp_avg"
            state[key] = _loaded_moment(value.to(param.device), param, group, signed=signed)
        elif key == "anchor":
            keeps_dtype = param.dtype != torch.float64 and value.dtype in _anchor_dtypes(param)
            state[key] = like(param, value.dtype if keeps_dtype else None).copy_(value)
        elif key == "compensation" and param.dtype == torch.bfloat16:
            state[key] = like(param, param.dtype).copy_(value)
        elif key == "compensation":
            del state[key]  # the parameter holds more of the weight itself now
        elif isinstance(value, Tensor) and key != "importance":
            state[key] = value.to(param.device, copy=True)
    if "importance" in saved:
        _load_importance(state, param)
    return state


def _load_importance(state: dict[str, Any], param: Tensor) -> None:
    stored = state["importance"].to(param.device)
    if stored.dtype == torch.uint8 and param.dtype != torch.float64:
        state["importance"] = stored.clone()
        return
    if stored.dtype == torch.uint8:
        frozen = codec.frozen_log8(stored, param.shape)
        codes = state.pop("frozen_codes", None)
        thawed = stored if codes is None else codec.thaw_log8(stored, codes)
        wide = codec.decode_log8(thawed, param.shape)
        stored = torch.where(frozen, -wide, wide)
    narrow = stored.dtype == torch.bfloat16 and param.dtype != torch.float64
    state["importance"] = like(param, stored.dtype if narrow else None).copy_(stored)


def _anchor_dtypes(param: Tensor) -> tuple[torch.dtype, ...]:
    wide = state_dtype(param)
    return (wide,) if wide == torch.float64 else (wide, param.dtype, torch.bfloat16)


def misfit(state: Mapping[str, Any], param: Tensor) -> str | None:
    """What of the state is for another dtype than the parameter has."""
    wide = state_dtype(param)
    stored = (wide,) if wide == torch.float64 else (wide, torch.bfloat16, torch.uint8)
    allowed = {
        "exp_avg": stored,
        "importance": stored,
        "anchor": _anchor_dtypes(param),
        "compensation": (torch.bfloat16,) if param.dtype == torch.bfloat16 else (),
    }
    return next((k for k in allowed if k in state and state[k].dtype not in allowed[k]), None)


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
    """A state dict of torch's AdamW, of any version, with what it lacks; any other as it is."""
    groups = state_dict.get("param_groups", ())
    if not groups or not all("betas" in group and "penalty" not in group for group in groups):
        return state_dict
    if any(not g.get("decoupled_weight_decay", True) and g.get("weight_decay") for g in groups):
        raise ValueError(
            "the state dict is one of torch.optim.Adam with weight decay in the gradient, "
            "which this optimizer does not have."
        )
    ours = ("ewc_lambda", "penalty", "importance_damping", "track_penalty", *FORMATS)
    groups = [dict(group) for group in groups]
    for here, group in zip(param_groups, groups, strict=False):
        for key in ours:
            group.setdefault(key, here[key])
        for key in ("amsgrad", "maximize"):  # younger than the oldest state dicts
            group.setdefault(key, False)
        for key in ("foreach", "fused"):  # are chosen where the optimizer is made
            group[key] = here[key]
    for group in groups:
        group.pop("decoupled_weight_decay", None)
    return {**state_dict, "param_groups": groups}


def in_order(state_dict: dict[str, Any], param_groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The state dict with the parameters of each group in this optimizer's order.

    They come in another one where a model's modules do. State dicts that do not name the very same
    parameters (without what wrappers put into names) are matched by place, as in torch.

    Raises:
        ValueError: The same parameters are in other groups.
    """
    own = [_names(group) for group in param_groups]
    saved = [_names(group) for group in state_dict.get("param_groups", ())]
    flat, saved_flat = [n for names in own for n in names], [n for names in saved for n in names]
    if not flat or len(set(flat)) < len(flat) or sorted(flat) != sorted(saved_flat):
        return state_dict
    groups = []
    for here, there, group in zip(own, saved, state_dict["param_groups"], strict=False):
        places = dict(zip(there, group["params"], strict=True))
        for name in here:
            if name not in places:
                raise ValueError(f"the state dict has parameter {name!r} in another group.")
        groups.append({**group, "params": [places[name] for name in here]})
    return {**state_dict, "param_groups": groups}


def _names(group: Mapping[str, Any]) -> list[str]:
    """The names of its parameters in the bare model; [] where it does not name each."""
    names, params = group.get("param_names", ()), group.get("params", ())
    return [canonical_name(name) for name in names] if len(names) == len(params) else []


def check_state_dict(
    state_dict: Mapping[str, Any], param_groups: list[dict[str, Any]], names: list[str]
) -> None:
    """Raise ValueError where a state dict lacks something or belongs to other parameters."""
    check_groups(state_dict, param_groups)
    groups = state_dict["param_groups"]
    for number, group in enumerate(groups):
        for key in _HYPERPARAMETERS:
            if key not in group:
                raise ValueError(f"the state dict is truncated: its group {number} has no {key!r}.")
    # What it had was some: F̂ is above 0.
    protected = any("importance" in state for state in state_dict["state"].values())
    if not protected and any(group.get("importance_mean", 0.0) > 0.0 for group in groups):
        raise ValueError(
            "the state dict is truncated: it is of consolidated weights, and has no 'importance'. "
            "torch.distributed.checkpoint loads only what the optimizer has already: let it begin "
            "the moments (get_optimizer_state_dict), call consolidate(None, anchors=...) with the "
            "anchors of the run that was saved, then load."
        )
    indices = [(index, group) for group in groups for index in group["params"]]
    params = [param for group in param_groups for param in group["params"]]
    for (index, group), param, name in zip(indices, params, names, strict=True):
        check_rounding(group, param, name)
        _check_state(state_dict["state"].get(index, {}), param, name)


def check_rounding(group: Mapping[str, Any], param: Tensor, name: str) -> None:
    """Raise ValueError where a parameter's dtype does not have the group's rounding."""
    if group.get("rounding", "nearest") != "nearest" and param.dtype == torch.float16:
        raise ValueError(
            f"rounding must be 'nearest' for parameter {name}, which is float16: the others are "
            "for bfloat16."
        )


def _check_state(state: Mapping[str, Any], param: Tensor, name: str) -> None:
    for key in _required(state):
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
    if "importance" in state and state["importance"].dtype == torch.uint8:
        frozen = int((state["importance"][:, 4:] == codec.FROZEN).sum())
        codes = state["frozen_codes"].numel() if "frozen_codes" in state else 0
        if codes != frozen:
            raise ValueError(
                f"the state dict is truncated: parameter {name} has {frozen} frozen weights, and "
                f"'frozen_codes' of {codes}."
            )


def _required(state: Mapping[str, Any]) -> Iterator[str]:
    if state.keys() & {"step", *MOMENTS}:
        # Not the maximum: AMSGrad may have been switched on since the last step.
        yield from ("step", "exp_avg", "exp_avg_sq")
    if "max_exp_avg_sq" in state:
        yield "max_exp_avg_sq"
    if state.keys() & set(PROTECTION):
        yield from PROTECTION
    if "compensation" in state:
        yield "compensation"
