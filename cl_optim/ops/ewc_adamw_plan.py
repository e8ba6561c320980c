"""The compiled step for the same tensors again and again: ``csrc/ewc_adamw_plan.h`` in Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cl_optim.ops import library
from cl_optim.ops.ewc_adamw_arguments import Hyperparameters, Inputs


class Plan:
    """The compiled step for some parameters of a group, again and again.

    Handing a tensor to an operator takes longer than updating a small one. What stays as it is is
    therefore checked once and kept as addresses; :func:`take_step` looks whether every tensor is
    still the same, of the same layout and in the same memory, and reads anew where parameters and
    gradients are. It keeps the tensors alive.

    Args:
        device: Where the tensors are.
        group: All parameters of the group.
        members: Which of them take the step.
        skipped: Which have no gradient.
        states: The members' state: dicts of tensors with the names of `State`'s fields, without
            their plural.
        is_protected: Whether the members' importance takes part, where they have one.
        pull_only: Whether nothing else does: no Adam, and no gradient but for the form of the
            penalty that goes into it. See :mod:`cl_optim.ops.ewc_pull`.
    """

    def __init__(
        self,
        device: torch.device,
        group: list[Tensor],
        members: list[int],
        skipped: list[int],
        states: list[dict[str, Any]],
        is_protected: bool = True,
        pull_only: bool = False,
    ) -> None:
        self.device = device
        self.params = [group[index] for index in members]
        self.compiled = library.extension(device.type).Plan(
            group, members, skipped, states, is_protected, pull_only
        )

    @property
    def possible(self) -> bool:
        """Tell if the tensors are such that there is one: dense, state in its parameter's order."""
        return bool(self.compiled.possible)

    def workspace(self, inputs: Inputs) -> Tensor | None:
        """Allocate what a step needs for the time being."""
        size = self.compiled.workspace(inputs.sums is not None)
        return torch.empty(size, dtype=torch.uint8, device=self.device) if size else None


class Call(NamedTuple):
    """What a planned step takes for one plan.

    Attributes:
        plan: The plan.
        group: All parameters of its group, as they are now.
        hyper: The group's hyperparameters.
        inputs: What the step takes besides.
    """

    plan: Plan
    group: list[Tensor]
    hyper: Hyperparameters
    inputs: Inputs


def take_step(calls: Sequence[Call]) -> bool:
    """Take a step by plans of one device type, if all of them may.

    Returns:
        Whether they may. If not, nothing has changed, and `fused` says what is wrong, or takes the
        step where the kernels cannot read a tensor as it lies: lazily negated, in other strides.
    """
    arguments = [
        (
            group,
            list(inputs.memories),
            list(inputs.coefficients),
            plan.workspace(inputs),
            *inputs[2:],
            vars(hyper),
        )
        for plan, group, hyper, inputs in calls
    ]
    extension = library.extension(calls[0].plan.device.type)
    if not extension.take_step([call.plan.compiled for call in calls], arguments):
        return False
    for call in calls:  # raw pointers pass by what tells autograd that a saved tensor has changed
        torch.autograd.graph.increment_version(call.plan.params)
    return True


def snapshot(state: Mapping[Any, Any]) -> Any:
    """Return what tells by ``matches(state)``, quickly, if a dict has the same keys and values."""
    return library.extension("cpu").Snapshot(state)
