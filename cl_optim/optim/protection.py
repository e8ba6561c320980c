"""What protects a parameter, in its state: importance, anchor, and which weights are frozen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from cl_optim.importance.names import Lazy
from cl_optim.importance.statistics import comparable, cut, sum_over
from cl_optim.ops import formats
from cl_optim.ops.importance_codec import hashed
from cl_optim.ops.warn import warn
from cl_optim.optim.shards import Shards
from cl_optim.optim.state import weight_of

# Of parameters, or of the parts of them that are in this process, what protects each.
States: TypeAlias = "list[tuple[Tensor, dict[str, Any]]]"


def read(state: Mapping[str, Any], param: Tensor) -> tuple[Tensor, Tensor]:
    """Read F, also of frozen weights, and which are frozen."""
    return formats.load_importance(state["importance"], param, state.get("frozen_codes"))


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
    new = formats.like(param).copy_(new).abs_()  # a sign, that of -0 too, would mark it as frozen
    total = new if old is None else new + old[0].mul(decay)
    total = total.clamp(max=torch.finfo(total.dtype).max)
    if exact:
        theta = weight_of(param, state)
        anchor = formats.like(param).copy_(state["anchor"]) if "anchor" in state else theta
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
    # The same increments to the same importance, again and again, must not be rounded alike.
    random = partial(hashed, time=group["consolidations"]) if merged else None
    state.pop("frozen_codes", None)
    state["importance"] = formats.store_importance(
        importance, param, group["importance_dtype"], random
    )
    if frozen is not None and frozen.any():
        _mark(state, frozen)


def _anchor(param: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    dtype = formats.anchor_dtype(param, group["anchor_dtype"])
    return formats.like(param, dtype).copy_(weight_of(param, state))


def warn_of_rounded_anchors(groups: Mapping[Tensor, Mapping[str, Any]]) -> None:
    """Say how many parameters have weights that the anchor's format cannot hold as they are.

    Args:
        groups: Each parameter's group.
    """
    rounded = sum(_rounds_anchor(param, group) for param, group in groups.items())
    if rounded:
        warn(
            f"anchor_dtype rounds the anchors of {rounded} parameters: the penalty pulls them "
            "towards weights that are up to 0.4 % off."
        )


def _rounds_anchor(param: Tensor, group: Mapping[str, Any]) -> bool:
    if group["anchor_dtype"] is None:
        return False
    dtype = formats.anchor_dtype(param, group["anchor_dtype"])
    return bool((param.detach().to(dtype).to(param.dtype) != param.detach()).any())


def scales(states: States, shards: Shards) -> tuple[float, float]:
    """Return F̂, and the λ at which a drift of every weight by its own size costs 1 per weight.

    F̂ is the mean of F over the weights that are not frozen, 0 where there are none; the λ is
    1/(F̂ · mean θ*²), or 0 where that has no finite value.

    Args:
        states: Of the parts of parameters that are here.
        shards: What knows of which.
    """
    weights = sum(shards.size(param) for param, _ in states)
    share, size, count = 0.0, 0.0, 0
    for param, state in states:
        if not shards.counts(param):
            continue
        importance, frozen = read(state, param)
        share += sum_over(importance.masked_fill(frozen, 0.0), weights)
        anchor = formats.like(param).copy_(state["anchor"]).masked_fill_(frozen, 0.0)
        size += sum_over(anchor.double().square_(), weights)
        count += importance.numel() - int(frozen.sum())
    found = shards.together.gather((share, size, count))
    share, size, count = (sum(of_all) for of_all in zip(*found, strict=True))
    if count == 0:
        return 0.0, 0.0
    mean, square = share * (weights / count), size * (weights / count)
    unit = 1.0 / mean / square if mean > 0.0 and square > 0.0 else 0.0
    return mean, unit if math.isfinite(unit) else 0.0


def warn_of_no_unit(groups: Iterable[Mapping[str, Any]]) -> None:
    """Warn where a strength makes λ 0, as the weights that are protected have no size."""
    if any(group["strength"] for group in groups):
        warn(
            "strength makes λ 0: the protected weights are 0, or their importance is beyond "
            "float64's range, so that a drift has nothing to be compared with. Set ewc_lambda, "
            "with strength=None."
        )


# --- frozen weights -------------------------------------------------------------------------------


def freeze(states: States, fraction: float, shards: Shards) -> int:
    """Mark the most important fraction of the weights; those marked before count towards it.

    Args:
        states: Of the parts of parameters that are here.
        fraction: Of all weights, of all processes.
        shards: What knows of which the parts are.

    Returns:
        How many are marked.
    """
    already = count_frozen(states, shards)
    wanted = round(fraction * sum(shards.size(param) for param, _ in states))
    if wanted <= already:
        return already
    counted = [(param, state) for param, state in states if shards.counts(param)]
    threshold, ties = cut(_movable(counted), wanted - already, shards.together)
    tied = []
    for param, state in states:
        importance, frozen = read(state, param)
        tied.append(int(((comparable(importance, threshold) == threshold) & ~frozen).sum()))
    for (param, state), share in zip(states, _shares(states, tied, ties, shards), strict=True):
        importance, frozen = read(state, param)
        importance = comparable(importance, threshold)
        equal = ((importance == threshold) & ~frozen).reshape(-1)
        chosen = (equal & (equal.cumsum(0) <= share)).view(importance.shape)
        _mark(state, frozen | chosen | (importance > threshold))
    return wanted


def _shares(states: States, tied: Sequence[int], ties: int, shards: Shards) -> list[int]:
    """Return how many of the tied weights of each part are to be marked, the first ones first.

    They come in the order of the parameters, and in one of them in that of its parts; replicas of
    a part are marked alike.
    """
    places = [shards.place(param) for param, _ in states]
    everywhere = shards.together.gather(list(zip(places, tied, strict=True)))
    shares = []
    for index, here in enumerate(places):
        of_parts = dict(sorted(of_process[index] for of_process in everywhere))
        for place, count in of_parts.items():
            share = min(count, ties)
            ties -= share
            if place == here:
                shares.append(share)
    return shares


def pin(state: dict[str, Any], param: Tensor, mask: Tensor) -> None:
    """Mark these weights besides those that are marked."""
    _mark(state, frozen_weights(state, param) | mask)


def count_frozen(states: States, shards: Shards) -> int:
    """Count the weights that are marked, in all processes."""
    here = sum(int(frozen_weights(s, param).sum()) for param, s in states if shards.counts(param))
    return sum(shards.together.gather(here))


def frozen_weights(state: Mapping[str, Any], param: Tensor) -> Tensor:
    """Return which of a protected parameter's weights are marked."""
    return formats.frozen_weights(state["importance"], param)


def _movable(states: States) -> Mapping[str, Tensor]:
    """Give the importance of the weights that are not frozen, read when it is asked for."""
    numbered = {str(number): pair for number, pair in enumerate(states)}

    def movable(number: str) -> Tensor:
        param, state = numbered[number]
        importance, frozen = read(state, param)
        return importance[~frozen]

    return Lazy(numbered, movable)


def unfreeze(state: dict[str, Any]) -> None:
    """Let a parameter's weights move again, as important as they were."""
    formats.unmark_frozen_(state["importance"], state.pop("frozen_codes", None))


def _mark(state: dict[str, Any], frozen: Tensor) -> None:
    unfreeze(state)
    codes = formats.mark_frozen_(state["importance"], frozen)
    if codes is not None:
        state["frozen_codes"] = codes
