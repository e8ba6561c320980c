"""Which parameters take a step together, and launch plans where they do so again and again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cl_optim.ops import ewc_adamw_plan as plans
from cl_optim.ops.ewc_adamw_arguments import NO_INPUTS, Hyperparameters, Inputs, State
from cl_optim.optim.state import has_moments, start_moments


class Batch:
    """Parameters of a group that take their step in one call: of one device, all protected or none.

    Args:
        group: The group.
        members: Which of its parameters.
        state: The optimizer's state.
    """

    def __init__(
        self, group: dict[str, Any], members: list[int], state: Mapping[Tensor, dict[str, Any]]
    ) -> None:
        self.group = group
        self.members = members
        self.params: list[Tensor] = [group["params"][index] for index in members]
        self.states = [state[param] for param in self.params]
        self.device: torch.device = self.params[0].device
        self.is_protected = "importance" in self.states[0]

    def grads(self) -> list[Tensor]:
        """The parameters' gradients."""
        return [param.grad for param in self.params if param.grad is not None]

    def lists(self) -> State:
        """The state, as a step takes it."""

        def of(key: str, used: bool = True) -> Sequence[Tensor]:
            return [state[key] for state in self.states] if used else []

        nothing = torch.empty(0, dtype=torch.bfloat16, device=self.device)
        compensations = [state.get("compensation", nothing) for state in self.states]
        return State(
            of("exp_avg"),
            of("exp_avg_sq"),
            of("max_exp_avg_sq", self.group["amsgrad"]),
            of("importance", self.is_protected),
            of("anchor", self.is_protected),
            compensations if any("compensation" in state for state in self.states) else [],
            of("step"),
        )

    def plan(self, skipped: list[int]) -> plans.Plan:
        """A launch plan, which also sees to it that the skipped parameters have no gradient."""
        return plans.Plan(self.device, self.group["params"], self.members, skipped, self.states)


def gather(group: dict[str, Any], state: Mapping[Tensor, dict[str, Any]]) -> list[Batch]:
    """The group's parameters that have gradients, in batches; their moments are begun."""
    members: dict[tuple[torch.device, bool], list[int]] = {}
    for index, param in enumerate(group["params"]):
        if param.grad is None:
            continue
        of_param = state[param]
        if not has_moments(of_param, param, group):
            start_moments(of_param, param, group)
        members.setdefault((param.device, "importance" in of_param), []).append(index)
    return [Batch(group, indices, state) for indices in members.values()]


class Plans:
    """The launch plans of all groups, for as long as the next step is like the last one.

    Args:
        batches: The batches of the last step, one at least.
        optimizer: The optimizer.
    """

    def __init__(self, batches: list[Batch], optimizer: torch.optim.Optimizer) -> None:
        self._groups = list(optimizer.param_groups)
        self._state = plans.snapshot(optimizer.state)
        self._rounding = [group["rounding"] for group in self._groups]
        self.batches = batches
        self.plans: list[plans.Plan] = []
        waiting = [
            [index for index, param in enumerate(group["params"]) if param.grad is None]
            for group in self._groups
        ]
        for batch in batches:
            # One of a group's plans looks after the parameters that have no gradient.
            place = next(i for i, group in enumerate(self._groups) if group is batch.group)
            self.plans.append(batch.plan(waiting[place]))
            waiting[place] = []
        # Those of another group; all plans must be of one device type to be taken as one.
        device = batches[0].device
        self._idle = [
            (group, plans.Plan(device, group["params"], [], indices, []))
            for group, indices in zip(self._groups, waiting, strict=True)
            if indices
        ]
        self.possible = all(plan.possible for plan in self.plans) and all(
            batch.device.type == device.type for batch in batches
        )

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        hyper: Callable[[dict[str, Any]], Hyperparameters],
        inputs: list[Inputs],
    ) -> bool:
        """Take the next step if all of the plans may; else nothing has changed.

        Args:
            optimizer: The optimizer.
            hyper: Gives a group's hyperparameters.
            inputs: What the step takes besides, by batch.
        """
        groups = optimizer.param_groups
        if (
            len(groups) != len(self._groups)
            or not all(here is there for here, there in zip(groups, self._groups, strict=True))
            or [group["rounding"] for group in groups] != self._rounding
            or not self._state.matches(optimizer.state)
        ):
            return False
        calls = [
            plans.Call(plan, group["params"], hyper(group), NO_INPUTS) for group, plan in self._idle
        ]
        calls += [
            plans.Call(plan, batch.group["params"], hyper(batch.group), given)
            for plan, batch, given in zip(self.plans, self.batches, inputs, strict=True)
        ]
        return plans.take_step(calls)


def are_alike(batches: list[Batch], others: list[Batch]) -> bool:
    """Whether two steps have the same batches."""
    return [(id(batch.group), batch.members) for batch in batches] == [
        (id(batch.group), batch.members) for batch in others
    ]
