"""The λ at which the penalty's pull is as large as what the task does to the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from cl_optim.ops import formats
from cl_optim.optim import protection
from cl_optim.optim.kronecker.matrices import Matrix
from cl_optim.optim.shards import Shards

Member = tuple[str, Tensor, Mapping[str, Any], Mapping[str, Any]]


def suggest_lambda(
    members: Iterable[Member],
    drift: float,
    matrices: Sequence[tuple[Matrix, Tensor]],
    shards: Shards,
) -> float:
    """Solve ‖2λFδ‖ = ‖g‖ in float64; :meth:`EWCAdamW.suggest_lambda` says what each is.

    Args:
        members: Name, parameter (or the part of it that is here), state and group of each
            protected parameter.
        drift: |δ| as a fraction of a tensor's root mean square; of a matrix's, where it is in one.
        matrices: Those whose importance is Kronecker-factored, with Σ S²: of drifts with random
            signs, ‖Fδ‖² is δ²·Σ S² on average.
        shards: What knows of which parameters the parts are.
    """
    if not 0.0 < drift < math.inf:
        raise ValueError(f"drift must be positive and finite, not {drift}.")
    members = [member for member in members if shards.size(member[1])]
    if not members:
        raise RuntimeError("suggest_lambda() needs importance: call consolidate() first.")
    forms = {group["penalty"] for *_, group in members}
    if len(forms) > 1:
        raise ValueError(
            f"suggest_lambda() needs one form of the penalty in all groups, not {sorted(forms)}: "
            "their λ are not on one scale."
        )
    of_gradients = forms == {"gradient"}
    task = pull = 0.0
    in_matrices = {param for matrix, _ in matrices for param in matrix.params}
    skipped = set()
    squares: list[tuple[float, ...]] = []
    taken: list[tuple[str, Tensor]] = []
    for name, param, state, group in members:
        term = param.grad if of_gradients else _adam_direction(param, state, group)
        if term is None:  # a step would skip it, its pull included
            skipped.add(param)
            continue
        importance, frozen = protection.read(state, param)
        free = [values.double().masked_fill(frozen, 0.0) for values in (term, importance)]
        of_param = tuple(map(_square_sum, (*free, state["anchor"].double())))
        squares.append(of_param if shards.counts(param) else (0.0, 0.0, 0.0))
        taken.append((name, param))
    everywhere = shards.together.gather(squares)
    for (name, param), *of_parts in zip(taken, *everywhere, strict=True):
        size, of_importance, of_anchor = (sum(of_all) for of_all in zip(*of_parts, strict=True))
        if not math.isfinite(size):
            raise ValueError(
                f"the gradient of parameter {name} must be finite: call suggest_lambda() after a "
                "backward pass that did not overflow."
            )
        task += size
        if param not in in_matrices:
            pull += of_anchor / shards.size(param) * of_importance
    for matrix, of_matrix in matrices:
        if not skipped.issuperset(matrix.params):
            pull += _pull_of(matrix) * float(of_matrix)
    if not task > 0.0:
        missing = "a gradient: call it after backward()" if of_gradients else "a step of the task"
        raise RuntimeError(f"suggest_lambda() needs {missing}; without, every λ is too large.")
    if not pull > 0.0:
        raise ValueError(
            "no λ balances the gradient: the importance, or the weights that drift is relative to, "
            "are 0 wherever there is a gradient and nothing is frozen."
        )
    return math.sqrt(task) / (2.0 * drift * math.sqrt(pull))


def _pull_of(matrix: Matrix) -> float:
    """Return the mean square of a matrix's anchor, by the square of how much may move of it.

    That is the share of its importance that is not frozen: of F of rank 1 exactly that much is
    left of ‖Fδ‖.
    """
    square = weights = free = whole = 0.0
    for param, state in zip(matrix.params, matrix.states, strict=True):
        importance, frozen = protection.read(state, param)
        square += _square_sum(state["anchor"].double())
        weights += param.numel()
        whole += float(importance.double().sum())
        free += float(importance.double().masked_fill(frozen, 0.0).sum())
    return square / weights * (free / whole) ** 2 if whole > 0.0 else 0.0


def _square_sum(values: Tensor) -> float:
    return float(values.square().sum())


def _adam_direction(
    param: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]
) -> Tensor | None:
    """Return m̂/(√v̂ + ε) of the last step; None before the first."""
    steps = float(state.get("step", 0.0))
    if steps == 0.0:
        return None
    beta1, beta2 = (float(beta) for beta in group["betas"])
    second = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
    first = formats.load_moment(state["exp_avg"], param, signed=True).double() / (1 - beta1**steps)
    second = formats.load_moment(second, param, signed=False).double() / (1 - beta2**steps)
    direction: Tensor = first / (second.sqrt() + group["eps"])
    return direction
