"""Which factors are of which matrix of the optimizer, and what they become beside earlier ones."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from cl_optim.importance.kronecker.factors import Factors
from cl_optim.importance.kronecker.importance import KroneckerImportance
from cl_optim.importance.kronecker.side import ENERGY
from cl_optim.importance.names import match_names
from cl_optim.optim.groups import name_of
from cl_optim.optim.kronecker import matrices as stored
from cl_optim.optim.kronecker.matrices import Matrix
from cl_optim.optim.protection import read

Groups = Sequence[Mapping[str, Any]]
Matched = Sequence[tuple[Tensor, Tensor | None]]


class Consolidated(NamedTuple):
    """A matrix after a consolidation.

    Attributes:
        weight: The weight.
        bias: Its bias, if that is in the matrix.
        factors: On the weight's device.
    """

    weight: Tensor
    bias: Tensor | None
    factors: Factors

    @property
    def params(self) -> list[Tensor]:
        """The weight, and its bias."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]


def consolidated(
    importance: Mapping[str, Tensor] | None,
    matched: Matched,
    named: Mapping[str, Tensor],
    old: Sequence[Matrix],
    groups: Groups,
    state: Mapping[Tensor, Mapping[str, Any]],
    decay: float,
    *,
    exact: bool,
) -> list[Consolidated]:
    """Return the matrices as they are to be, of which nothing has been written yet.

    Args:
        importance: A task's.
        matched: Each parameter with its diagonal; None where the task has none for it.
        named: The parameters by name.
        old: The matrices as they are.
        groups: The optimizer's.
        state: Its state.
        decay: What remains of earlier tasks.
        exact: Whether the anchors are to be exact.

    Raises:
        ValueError: Factors do not fit a parameter, a group, or what there is of earlier tasks.
    """
    group_of = {param: number for number, group in enumerate(groups) for param in group["params"]}

    def name(param: Tensor) -> str:
        return name_of(groups[group_of[param]], param)

    given = {param: new for param, new in matched if new is not None}
    # What a task does not use, such as another task's head, has no factors, and nothing to add.
    unused: set[Tensor] = set()
    new = _matched_factors(importance, named, given)
    earlier = {one.params[0]: one for one in old}
    if decay > 0.0:
        in_new = {param for one in new for param in one.params}
        in_old = {param for one in old for param in one.params}
        for param in given:
            was_protected = "importance" in state.get(param, {})
            if was_protected and (param in in_new) != (param in in_old):
                diagonal = read(state[param], param)[0] if param in in_new else given[param]
                if bool(diagonal.any()):
                    raise _mixed(name(param), is_new=param in in_new)
                unused.add(param)
    if exact and (new or old):
        raise ValueError(
            "anchors must be 'latest' with Kronecker importance: quadratics in different bases do "
            "not add up to one around one point."
        )
    result = []
    for one in new:
        weight, bias, factors = one
        numbers = [group_of[param] for param in one.params]
        stored.check_groups_of(groups, one.params, numbers)
        factors = factors.to(weight.device)
        before = earlier.pop(weight, None)
        if before is not None and decay > 0.0:
            if before.params[1:] != tuple(one.params[1:]):
                raise ValueError(
                    f"the matrix of parameter {name(weight)} had another bias, or one where it has "
                    "none: Kronecker factors of the two do not add up (decay=0 forgets the "
                    "earlier ones)."
                )
            kept = replace(stored.unrounded(before.factors()), layout=factors.layout)
            factors = kept.merged(factors, decay, ENERGY, name(weight))
        result.append(Consolidated(weight, bias, factors))
    for weight, before in earlier.items():
        if weight in given and weight not in unused:
            continue  # decay=0: the new task has a diagonal for it
        bias = before.params[1] if len(before.params) > 1 else None
        if bias is not None and bias in given and bias not in unused:
            raise ValueError(
                f"importance has something for parameter {name(bias)} and nothing for "
                f"{name(weight)}, in whose matrix it is: give both, or none."
            )
        result.append(Consolidated(weight, bias, before.factors().decayed(decay)))
    return result


def store(
    matrices: Sequence[Consolidated],
    groups: Groups,
    state: Mapping[Tensor, dict[str, Any]],
) -> None:
    """Write the matrices; parameters that are in none of them any more lose their factors."""
    group_of = {param: group for group in groups for param in group["params"]}
    for one in state.values():
        stored.clear(one)
    pairs = []
    for matrix in matrices:
        of_bias = None if matrix.bias is None else state[matrix.bias]
        dtype = stored.DTYPES[group_of[matrix.weight]["basis_dtype"]]
        stored.write(state[matrix.weight], of_bias, matrix.factors, dtype)
        pairs.append((state[matrix.weight], of_bias))
    stored.renumber(pairs)


def _matched_factors(
    importance: Mapping[str, Tensor] | None, named: Mapping[str, Tensor], given: Collection[Tensor]
) -> list[Consolidated]:
    """Return the task's matrices, whose parameters are the optimizer's."""
    if not isinstance(importance, KroneckerImportance):
        return []
    names = match_names(importance, named)
    result = []
    for weight_name, factors in importance.factors.items():
        weight = named[names[weight_name]] if weight_name in names else None
        if weight is None or weight not in given:
            continue  # strict=False leaves it out
        layout = factors.layout
        if layout.shape != tuple(weight.shape):
            raise ValueError(
                f"the Kronecker factors of {weight_name!r} must be of the parameter's shape "
                f"{tuple(weight.shape)}, not {layout.shape}."
            )
        bias = None
        if layout.bias is not None:
            bias = named[names[layout.bias]] if layout.bias in names else None
            if bias is None or bias not in given:
                raise ValueError(
                    f"the bias {layout.bias!r} is in one matrix with {weight_name!r}, and this "
                    "optimizer does not have it: add it to the optimizer, or consolidate "
                    "importance.diagonal()."
                )
        result.append(Consolidated(weight, bias, factors))
    return result


def _mixed(name: str, *, is_new: bool) -> ValueError:
    earlier, now = ("diagonal", "Kronecker-factored")[:: 1 if is_new else -1]
    return ValueError(
        f"the importance of parameter {name} is {earlier} for earlier tasks and {now} for this "
        "one, and the two do not add up: consolidate importance.diagonal() for every task, or "
        "Kronecker importance for every task (decay=0 forgets the earlier ones)."
    )
