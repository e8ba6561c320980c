"""What EWCAdamW keeps of each parameter: formats, beginnings, what a state dict must have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from cl_optim.distributed import here, is_dtensor, like, whole
from cl_optim.importance.names import canonical_name
from cl_optim.ops import formats
from cl_optim.ops.checks import check_groups
from cl_optim.ops.importance_codec import has_levels
from cl_optim.optim.kronecker import matrices
from cl_optim.optim.options import check_rounding

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
PROTECTION = ("importance", "anchor")

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


# --- moments --------------------------------------------------------------------------------------


def start_moments(
    state: dict[str, Any], param: Tensor, group: Mapping[str, Any], size: int
) -> None:
    """Add what a step needs and the state does not have yet.

    Args:
        state: The parameter's.
        param: The parameter, or the part of it that is here.
        group: Its group.
        size: How many weights all of it has.
    """
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
        state["exp_avg"] = formats.zero_moment(param, group["state_dtype"], size)
        state["exp_avg_sq"] = formats.zero_moment(param, group["state_dtype"], size)
    if group["amsgrad"] and "max_exp_avg_sq" not in state:
        state["max_exp_avg_sq"] = formats.zero_moment(param, group["state_dtype"], size)
    if _is_compensated(param, group) and "compensation" not in state:
        state["compensation"] = formats.like(param, param.dtype).zero_()


def has_moments(state: Mapping[str, Any], param: Tensor, group: Mapping[str, Any]) -> bool:
    """Tell whether `start_moments` has nothing to do."""
    return (
        "step" in state
        and (not group["amsgrad"] or "max_exp_avg_sq" in state)
        and (not _is_compensated(param, group) or "compensation" in state)
    )


def _is_compensated(param: Tensor, group: Mapping[str, Any]) -> bool:
    return group["rounding"] == "kahan" and param.dtype == torch.bfloat16


def weight_of(param: Tensor, state: Mapping[str, Any]) -> Tensor:
    """Copy the weight in the dtype of the arithmetic: with Kahan summation, more than θ shows."""
    weight = formats.like(param).copy_(param.detach())
    return weight + state["compensation"] if "compensation" in state else weight


# --- state dicts ----------------------------------------------------------------------------------


def spread(state: Mapping[str, Any], part: Tensor, param: Tensor) -> dict[str, Any]:
    """Return a state as its state dict has it: of a DTensor's part, DTensors.

    Codes, whose blocks are the part's, become the bfloat16 numbers that they stand for, signed
    where a weight is frozen: so they can be read by any number of processes.
    """
    if part is param:
        return dict(state)
    numbers = _without_codes(state, part)
    return {key: v if key == "step" else like(param, v) for key, v in numbers.items()}


def _without_codes(state: Mapping[str, Any], param: Tensor) -> dict[str, Any]:
    """Return a state with the bfloat16 numbers in place of the codes that stand for them."""
    numbers = {key: value for key, value in state.items() if key != "frozen_codes"}
    for key in MOMENTS:
        if key in state and formats.is_codes(state[key]):
            wide = formats.load_moment(state[key], param, signed=key == "exp_avg")
            numbers[key] = wide.bfloat16()
    if "importance" in state and formats.is_codes(state["importance"]):
        numbers["importance"] = _signed(state, param).bfloat16()
    return numbers


def _signed(state: Mapping[str, Any], param: Tensor) -> Tensor:
    """Return a state's importance, negative where a weight is frozen."""
    codes = state.get("frozen_codes")
    wide, frozen = formats.load_importance(state["importance"], param, codes)
    return torch.where(frozen, -wide, wide)


def _here(saved: Mapping[str, Any], param: Tensor) -> dict[str, Any]:
    """Return of a saved state what is of the part of a parameter that is in this process."""
    state = _without_codes(saved, param) if is_dtensor(param) else dict(saved)
    for key, value in state.items():
        if isinstance(value, Tensor):
            state[key] = here(value, param) if value.shape == param.shape else whole(value)
    return state


def loaded(
    saved: Mapping[str, Any], param: Tensor, part: Tensor, group: Mapping[str, Any]
) -> dict[str, Any]:
    """Make a saved state the parameter's: never narrower, if the arithmetic is as wide.

    Moments take the group's format, which is saved with them or, where the state dict is AdamW's,
    the one that was asked for. The parameter may have another dtype than the one that was saved.

    Args:
        saved: The saved state, of the whole parameter.
        param: The parameter.
        part: The part of it that is in this process.
        group: Its group.
    """
    saved = _here(saved, param)
    size, param = param.numel(), part
    state = dict(saved)
    for key, value in saved.items():
        if key == "step":
            state[key] = torch.as_tensor(value, dtype=torch.float32, device=param.device).clone()
        elif key in MOMENTS:
            signed = key == "exp_avg"
            value = value.to(param.device)
            state[key] = _loaded_moment(value, param, group, size, signed=signed)
        elif key == "anchor":
            keeps_dtype = value.dtype in formats.anchor_dtypes(param)
            state[key] = formats.like(param, value.dtype if keeps_dtype else None).copy_(value)
        elif key == "compensation" and param.dtype == torch.bfloat16:
            state[key] = formats.like(param, param.dtype).copy_(value)
        elif key == "compensation":
            del state[key]  # the parameter holds more of the weight itself now
        elif isinstance(value, Tensor) and key != "importance":
            state[key] = value.to(param.device, copy=True)
    if "importance" in saved:
        _load_importance(state, param, group)
    return state


def _load_importance(state: dict[str, Any], param: Tensor, group: Mapping[str, Any]) -> None:
    stored = state["importance"].to(param.device)
    codes = group["importance_dtype"] == "log8" and param.dtype != torch.float64
    if codes and stored.dtype == torch.bfloat16:  # what codes of a DTensor are saved as
        state["importance"] = formats.store_importance(stored.float().abs(), param, "log8")
        marked = formats.mark_frozen_(state["importance"], stored.signbit())
        if marked is not None and marked.numel():
            state["frozen_codes"] = marked
        return
    keeps_dtype = stored.dtype in formats.stored_dtypes(param)
    if formats.is_codes(stored):
        if keeps_dtype:
            state["importance"] = stored.clone()
            return
        stored = _signed({**state, "importance": stored}, param)
        state.pop("frozen_codes", None)
    state["importance"] = formats.like(param, stored.dtype if keeps_dtype else None).copy_(stored)


def misfit(state: Mapping[str, Any], param: Tensor) -> str | None:
    """Return the key of what is for another dtype than the parameter has; None if all fits."""
    stored = formats.stored_dtypes(param)
    allowed = {
        "exp_avg": stored,
        "importance": stored,
        "anchor": formats.anchor_dtypes(param),
        "compensation": (torch.bfloat16,) if param.dtype == torch.bfloat16 else (),
    }
    return next((k for k in allowed if k in state and state[k].dtype not in allowed[k]), None)


def _loaded_moment(
    value: Tensor, param: Tensor, group: Mapping[str, Any], size: int, *, signed: bool
) -> Tensor:
    moment = formats.zero_moment(param, group["state_dtype"], size)
    if value.dtype == moment.dtype:
        return moment.copy_(value)
    wide = formats.like(param).copy_(formats.load_moment(value, param, signed=signed))
    formats.store_moment(moment, wide, signed=signed)
    return moment


def from_adamw(state_dict: dict[str, Any], param_groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Add to a state dict of torch's AdamW, of any version, what it lacks; leave any other."""
    groups = state_dict.get("param_groups", ())
    if not groups or not all("betas" in group and "penalty" not in group for group in groups):
        return state_dict
    protected = state_dict.get("ewc", {}).get("state")
    if protected or any(group.get("consolidations") for group in groups):
        raise ValueError(
            "the state dict is that of an EWC around AdamW, whose protection an EWCAdamW cannot "
            "load: load it into such an EWC; or remove its 'ewc' and its groups' 'consolidations', "
            "and consolidate() anew."
        )
    if any(not g.get("decoupled_weight_decay", True) and g.get("weight_decay") for g in groups):
        raise ValueError(
            "the state dict is one of torch.optim.Adam with weight decay in the gradient, "
            "which this optimizer does not have."
        )
    ours = (
        *("ewc_lambda", "penalty", "importance_damping", "track_penalty", "every", "strength"),
        *formats.OPTIONS,
    )
    groups = [dict(group) for group in groups]
    for own, group in zip(param_groups, groups, strict=False):
        for key in ours:
            group.setdefault(key, own[key])
        for key in ("amsgrad", "maximize"):  # younger than the oldest state dicts
            group.setdefault(key, False)
        for key in ("foreach", "fused"):  # are chosen where the optimizer is made
            group[key] = own[key]
    for group in groups:
        group.pop("decoupled_weight_decay", None)
    return {**state_dict, "param_groups": groups}


def in_order(state_dict: dict[str, Any], param_groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the state dict with the parameters of each group in this optimizer's order.

    They come in another one where a model's modules do. State dicts that do not name the very same
    parameters (without what wrappers put into names) are matched by place, as in torch.

    Raises:
        ValueError: The same parameters are in other groups.
    """
    wanted = [_names(group) for group in param_groups]
    saved = [_names(group) for group in state_dict.get("param_groups", ())]
    flat, saved_flat = [n for names in wanted for n in names], [n for names in saved for n in names]
    if not flat or len(set(flat)) < len(flat) or sorted(flat) != sorted(saved_flat):
        return state_dict
    groups = []
    for names, there, group in zip(wanted, saved, state_dict["param_groups"], strict=False):
        places = dict(zip(there, group["params"], strict=True))
        for name in names:
            if name not in places:
                raise ValueError(f"the state dict has parameter {name!r} in another group.")
        groups.append({**group, "params": [places[name] for name in names]})
    return {**state_dict, "param_groups": groups}


def _names(group: Mapping[str, Any]) -> list[str]:
    """Return its parameters' names in the bare model; [] where it does not name each."""
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
    saved = [
        (state_dict["state"].get(index, {}), param, group, name)
        for (index, group), param, name in zip(indices, params, names, strict=True)
    ]
    for state, param, group, name in saved:
        check_rounding(group, param, name)
        check_param_state(state, param, name)
    matrices.check_saved(saved)


def check_param_state(state: Mapping[str, Any], param: Tensor, name: str) -> None:
    """Raise ValueError where a parameter's saved state is truncated, or another parameter's."""
    if is_dtensor(param) and "matrix" in state:
        raise ValueError(
            f"the state dict has Kronecker importance for parameter {name}, which is spread over "
            "processes: such importance needs whole matrices. Consolidate importance.diagonal(), "
            "or train with DistributedDataParallel."
        )
    for key in _required(state):
        if key not in state:
            raise ValueError(f"the state dict is truncated: parameter {name} has no {key!r}.")
        if key == "step":
            continue
        shape = formats.stored_shape(state[key], param)
        if tuple(state[key].shape) != shape:
            raise ValueError(
                f"the state dict belongs to other parameters: {key!r} of parameter {name} has "
                f"shape {tuple(state[key].shape)}, not {shape}."
            )
        if formats.is_codes(state[key]) and not has_levels(state[key]):
            raise ValueError(
                f"{key!r} of parameter {name} has codes that this version of cl_optim does not "
                "read: they are damaged, or an earlier version's. Save the state dict with that "
                "version and float32 formats (state_dtype, importance_dtype), and load that."
            )
    if "importance" in state and formats.is_codes(state["importance"]):
        frozen = formats.count_frozen_codes(state["importance"])
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
