"""What protects a parameter, in its state: importance, anchor, and which weights are frozen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from cl_optim.importance.statistics import comparable, cut, sum_over
from cl_optim.ops import importance_codec as codec
from cl_optim.optim.state import float_dtype, like, weight_of


def read(state: Mapping[str, Any], param: Tensor) -> tuple[Tensor, Tensor]:
    """F, also of frozen weights, and which are frozen."""
    importance, frozen = codec.load_importance(state["importance"], param)
    if "frozen_codes" in state:
        thawed = codec.thaw_log8(state["importance"], state["frozen_codes"])
        importance = codec.decode_log8(thawed, param.shape)
    return importance, frozen


def merge(
    state: dict[str, Any],
    param: Tensor,
    new: Tensor | None,
    decay: float,
    group: Mapping[str, Any],
    *,
    exact: bool,
) -> None:
    """Take in a task's importance, the weights being those that it left.

    F ← dF + F_new, and as anchor the weights or, if exact, θ̄ ← θ̄ + (F_new/F)(θ − θ̄): then
    dF(·−θ̄)² + F_new(·−θ)² = F(·−θ̄′)² up to a constant.
    """
    old = read(state, param) if "importance" in state else None
    if new is None:
        if old is not None:
            write(state, param, old[0].mul(decay), old[1], group, merged=True)
            if not exact:
                state["anchor"] = _anchor(param, state, group)
        return
    new = like(param).copy_(new).abs_()  # a sign, that of -0 too, would mark it as frozen
    total = new if old is None else new + old[0].mul(decay)
    total = total.clamp(max=torch.finfo(total.dtype).max)
    if exact:
        theta = weight_of(param, state)
        anchor = like(param).copy_(state["anchor"]) if "anchor" in state else theta
        moved = anchor + new / total * (theta - anchor)
        state["anchor"] = torch.where(total == 0, theta, moved)
    else:
        state["anchor"] = _anchor(param, state, group)
    frozen = None if old is None else old[1]
    write(state, param, total, frozen, group, merged=old is not None and decay > 0.0)


def write(
    state: dict[str, Any],
    param: Tensor,
    importance: Tensor,
    frozen: Tensor | None,
    group: Mapping[str, Any],
    *,
    merged: bool,
) -> None:
    """Store F in the group's format.

    What is merged into a narrow importance is rounded stochastically: rounded to the nearest, small
    increments would vanish.
    """
    format_ = group["importance_dtype"]
    state.pop("frozen_codes", None)
    if format_ == "log8" and param.dtype != torch.float64:
        random = _random(importance.contiguous(), group) if merged else None
        state["importance"] = codec.encode_log8(importance, random=random)
    else:
        dtype = float_dtype(param, "float32" if format_ == "float32" else "bfloat16")
        if dtype == torch.bfloat16:
            importance = importance.clamp(max=torch.finfo(dtype).max)
            if merged:
                importance = codec.stochastic_bfloat16(importance, _random(importance, group))
        state["importance"] = like(param, dtype).copy_(importance)
    if frozen is not None and frozen.any():
        _mark(state, frozen)


def _random(importance: Tensor, group: Mapping[str, Any]) -> Tensor:
    # The same increments to the same importance, again and again, must not be rounded alike.
    return codec.hashed(importance, group["consolidations"])


def _anchor(param: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    name = group["anchor_dtype"]
    dtype = param.dtype if name is None else float_dtype(param, name)
    return like(param, dtype).copy_(weight_of(param, state))


def rounds_anchors(param: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether the anchor's format cannot hold the parameter's weights as they are."""
    if group["anchor_dtype"] is None:
        return False
    dtype = float_dtype(param, group["anchor_dtype"])
    return bool((param.detach().to(dtype).to(param.dtype) != param.detach()).any())


def mean_importance(states: Iterable[tuple[Tensor, Mapping[str, Any]]]) -> float:
    """The mean of F over the weights that are not frozen; 0 where there are none."""
    states = list(states)
    weights = sum(param.numel() for param, _ in states)
    share, count = 0.0, 0
    for param, state in states:
        importance, frozen = read(state, param)
        share += sum_over(importance.masked_fill(frozen, 0.0), weights)
        count += importance.numel() - int(frozen.sum())
    return share * (weights / count) if count else 0.0


# --- frozen weights -------------------------------------------------------------------------------


def freeze(states: list[tuple[Tensor, dict[str, Any]]], fraction: float) -> int:
    """Mark the most important fraction of the weights; those marked before count towards it.

    Returns:
        How many are marked.
    """
    already = count_frozen(states)
    wanted = round(fraction * sum(param.numel() for param, _ in states))
    if wanted <= already:
        return already
    threshold, ties = cut(_Movable(states), wanted - already)
    for param, state in states:
        importance, frozen = read(state, param)
        importance = comparable(importance, threshold)
        equal = ((importance == threshold) & ~frozen).reshape(-1)
        chosen = (equal & (equal.cumsum(0) <= ties)).view(importance.shape)
        ties -= int(chosen.sum())
        _mark(state, frozen | chosen | (importance > threshold))
    return wanted


def pin(state: dict[str, Any], param: Tensor, mask: Tensor) -> None:
    """Mark these weights besides those that are marked."""
    _mark(state, read(state, param)[1] | mask)


def count_frozen(states: Iterable[tuple[Tensor, Mapping[str, Any]]]) -> int:
    """How many weights are marked."""
    return sum(int(read(state, param)[1].sum()) for param, state in states)


class _Movable(Mapping[str, Tensor]):
    """The importance of the weights that are not frozen, read when it is asked for."""

    def __init__(self, states: list[tuple[Tensor, dict[str, Any]]]) -> None:
        self._states = {str(number): state for number, state in enumerate(states)}

    def __getitem__(self, number: str) -> Tensor:
        param, state = self._states[number]
        importance, frozen = read(state, param)
        return importance[~frozen]

    def __iter__(self) -> Iterator[str]:
        return iter(self._states)

    def __len__(self) -> int:
        return len(self._states)


def unfreeze(state: dict[str, Any]) -> None:
    """Let a parameter's weights move again, as important as they were."""
    stored = state["importance"]
    if stored.dtype != torch.uint8:
        stored.abs_()
    elif "frozen_codes" in state:
        stored.copy_(codec.thaw_log8(stored, state.pop("frozen_codes")))


def _mark(state: dict[str, Any], frozen: Tensor) -> None:
    unfreeze(state)
    stored = state["importance"]
    if stored.dtype != torch.uint8:
        stored.copy_(torch.where(frozen, -stored, stored))
    else:
        state["frozen_codes"] = codec.freeze_log8_(stored, frozen)
