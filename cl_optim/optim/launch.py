"""How a step is taken: which parameters together, and by launch plans where it is like the last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from cl_optim.distributed import whole
from cl_optim.ops import ewc_adamw as ops
from cl_optim.ops import ewc_adamw_plan
from cl_optim.ops.ewc_adamw_arguments import NO_INPUTS, Hyperparameters, Inputs, State, check
from cl_optim.optim.groups import name_of
from cl_optim.optim.options import choose, lr_tensor
from cl_optim.optim.shards import Shards
from cl_optim.optim.shards import State as StateOf
from cl_optim.optim.state import has_moments, misfit, start_moments
from cl_optim.optim.tracking import Sums

# What GEM adds to the gradients: rows of each parameter, and how much of them.
AddedRows: TypeAlias = tuple[Mapping[Tensor, Tensor], Mapping[Tensor, Tensor]]

# How a parameter takes its step: as if it were unprotected; under the penalty; or without a pull,
# while importance damps and freezes it.
PLAIN, PROTECTED, HELD = "plain", "protected", "held"
Roles: TypeAlias = Mapping[Tensor, str]


class Step(NamedTuple):
    """A step that is to be taken.

    Attributes:
        groups: The optimizer's groups.
        state: Its state.
        hypers: The groups' hyperparameters.
        rows: GEM's memory rows and their coefficients, by parameter.
        grad_scale: What GradScaler has multiplied the gradients by.
        found_inf: Whether they have overflowed: not 0.
        roles: Of the parameters whose pull is not a part of the step.
        shards: What groups and state are parts of, if parameters are spread over processes.
    """

    groups: list[dict[str, Any]]
    state: StateOf
    hypers: list[Hyperparameters]
    rows: AddedRows
    grad_scale: Tensor | None
    found_inf: Tensor | None
    roles: Roles
    shards: Shards


class Batch:
    """Parameters of a group that take their step in one call: of one device and one role.

    Args:
        number: The group's.
        group: The group.
        members: Which of its parameters.
        state: The optimizer's state.
        role: Theirs.
        counts: Whether sums take them; not where another process's replicas of them are taken.
    """

    def __init__(
        self,
        number: int,
        group: dict[str, Any],
        members: list[int],
        state: Mapping[Tensor, dict[str, Any]],
        role: str,
        counts: bool = True,
    ) -> None:
        self.number = number
        self.group = group
        self.members = members
        self.params: list[Tensor] = [group["params"][index] for index in members]
        self.states = [state[param] for param in self.params]
        self.device: torch.device = self.params[0].device
        self.role = role
        self.counts = counts
        self.is_protected = role != PLAIN

    def grads(self) -> list[Tensor]:
        """Return the parameters' gradients."""
        return [param.grad for param in self.params if param.grad is not None]

    def lists(self) -> State:
        """Return the state, as a step takes it."""

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

    @property
    def is_tracked(self) -> bool:
        """Tell whether the step sums the penalty."""
        return bool(self.group["track_penalty"]) and self.role == PROTECTED and self.counts

    def hyper(self, step: Step) -> Hyperparameters:
        """Return the hyperparameters of its step."""
        hyper = step.hypers[self.number]
        return replace(hyper, ewc_lambda=0.0) if self.role == HELD else hyper

    def refuse_misfits(self) -> None:
        """Raise RuntimeError where a parameter was cast and its state was not."""
        for param, state in zip(self.params, self.states, strict=True):
            key = misfit(state, param)
            if key is not None:
                raise RuntimeError(
                    f"parameter {name_of(self.group, param)} was cast to {param.dtype} after its "
                    f"{key!r} was made: optimizer.load_state_dict(optimizer.state_dict()) casts "
                    "that, too."
                )


def refuse_exchanged(groups: list[dict[str, Any]], state: Mapping[Tensor, dict[str, Any]]) -> None:
    """Raise an error where parameters or options are others than those that are protected.

    Raises:
        RuntimeError: Protected parameters are in no group any more, where others are that are not;
            or a group says that it was not consolidated, and its parameters are protected.
    """
    known: set[Tensor] = set()
    unprotected: list[tuple[dict[str, Any], Tensor]] = []
    for group in groups:
        known.update(group["params"])
        for param in group["params"]:
            is_protected = "importance" in state.get(param, {})
            if is_protected and group["consolidations"] == 0:
                raise RuntimeError(
                    f"a group's 'consolidations' is 0, and its parameter {name_of(group, param)} "
                    "is protected: something has set the group's options back, as "
                    "ZeroRedundancyOptimizer does in each step. Use the optimizer without it."
                )
            if not is_protected and group["consolidations"] and param.grad is not None:
                unprotected.append((group, param))
    if unprotected and any("importance" in one for p, one in state.items() if p not in known):
        raise RuntimeError(
            f"parameter {name_of(*unprotected[0])} is not protected, and those that consolidate() "
            "protected are in no group any more: something has exchanged them, as a trainer's "
            "prepare() does where it shards the model. Call consolidate() after that, or load the "
            "state dict."
        )


def refuse_sparse(groups: list[dict[str, Any]]) -> None:
    """Raise RuntimeError where a gradient is sparse."""
    for group in groups:
        for param in group["params"]:
            if param.grad is not None and param.grad.layout is not torch.strided:
                raise RuntimeError(
                    f"the gradient of parameter {name_of(group, param)} must be dense, not "
                    f"{param.grad.layout}: EWCAdamW updates every weight in every step."
                )


def gather(step: Step) -> list[Batch]:
    """Put the parameters that have gradients in batches, and begin their moments."""
    batches = []
    for number, group in enumerate(step.groups):
        members: dict[tuple[torch.device, str, bool], list[int]] = {}
        for index, param in enumerate(group["params"]):
            if param.grad is None:
                continue
            of_param = step.state[param]
            if not has_moments(of_param, param, group):
                start_moments(of_param, param, group, step.shards.size(param))
            role = step.roles.get(param, PROTECTED if "importance" in of_param else PLAIN)
            key = param.device, role, step.shards.counts(param)
            members.setdefault(key, []).append(index)
        batches += [
            Batch(number, group, indices, step.state, role, counts)
            for (_, role, counts), indices in members.items()
        ]
    return batches


class Launch:
    """Takes an optimizer's steps, and keeps of the last one what makes a like one faster.

    Attributes:
        backend: What the last step ran on; empty before the first.
        sums: What tracked steps have summed.
    """

    def __init__(self) -> None:
        self.backend = ""
        self.sums = Sums()
        self._batches: list[Batch] = []
        self._planned: PlannedStep | None = None

    def forget(self) -> None:
        """Let go of the last step's tensors; there is no penalty yet of what comes."""
        self._batches, self._planned = [], None
        self.sums.clear()

    def repeat(self, step: Step) -> bool:
        """Take a step by plans, if it is like the last ones.

        Returns:
            Whether it is. If not, nothing has changed.
        """
        planned = self._planned
        if planned is None or not planned.possible:
            return False
        chosen = [choose(batch.group, batch.device) for batch in planned.batches]
        inputs = [self.inputs(step, batch) for batch in planned.batches]
        if any(function is not ops.fused for _, function in chosen):
            return False
        if not planned.take(step, inputs):
            return False
        self.backend = chosen[-1][0]
        return True

    def begin(self, step: Step) -> None:
        """Take any step, and plan the next one where this one was like the last."""
        batches = gather(step)
        for batch in batches:
            batch.refuse_misfits()
        tracked = [batch for batch in batches if batch.is_tracked]
        self.sums.clear(kept={Sums.key(batch.group, batch.device) for batch in tracked})
        chosen = [choose(batch.group, batch.device) for batch in batches]
        inputs = [self.inputs(step, batch) for batch in batches]
        for batch, given in zip(batches, inputs, strict=True):
            check(batch.params, batch.grads(), batch.lists(), batch.group["amsgrad"], given)
        for batch, given, (self.backend, function) in zip(batches, inputs, chosen, strict=True):
            hyper = batch.hyper(step)
            function(batch.params, batch.grads(), batch.lists(), hyper=hyper, inputs=given)
        # A plan is worth its making where steps are alike, and once where it is not possible.
        compiled = bool(chosen) and all(function is ops.fused for _, function in chosen)
        if not compiled or not _are_alike(batches, self._batches):
            self._planned = None
        elif self._planned is None or self._planned.possible:
            self._planned = PlannedStep(step, batches)
        self._batches = batches

    def inputs(self, step: Step, batch: Batch) -> Inputs:
        """Return what a batch takes besides its tensors and hyperparameters."""

        def on_device(number: Tensor | None) -> Tensor | None:
            return None if number is None else whole(number).to(batch.device, torch.float32)

        return Inputs(
            *_rows(step.rows, batch),
            lr_tensor(batch.group, batch.device),
            on_device(step.grad_scale),
            on_device(step.found_inf),
            self.sums[Sums.key(batch.group, batch.device)] if batch.is_tracked else None,
        )


def _rows(rows: AddedRows, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
    memories, coefficients = rows
    if not memories:
        return [], []
    none = torch.empty(0, dtype=torch.float64, device=batch.device)
    return (
        [memories.get(param, param[None][:0]) for param in batch.params],
        [coefficients.get(param, none) for param in batch.params],
    )


def _are_alike(batches: list[Batch], others: list[Batch]) -> bool:
    return [_key(batch) for batch in batches] == [_key(batch) for batch in others]


def _key(batch: Batch) -> tuple[Any, ...]:
    return id(batch.group), batch.members, batch.role, batch.counts


def _watched(groups: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Return the options that a plan is made for, of what it does not look at itself."""
    return [(group["rounding"], group["consolidations"]) for group in groups]


class PlannedStep:
    """A step of all groups, each batch by its plan, for as long as the next one is like it.

    Args:
        step: The step.
        batches: Its batches, one at least.
    """

    def __init__(self, step: Step, batches: list[Batch]) -> None:
        self._groups = list(step.groups)
        self._state = ewc_adamw_plan.snapshot(step.state)
        self._roles = step.roles
        self._options = _watched(self._groups)
        self.batches = batches
        self._plans: list[ewc_adamw_plan.Plan] = []
        waiting = [
            [index for index, param in enumerate(group["params"]) if param.grad is None]
            for group in self._groups
        ]
        for batch in batches:
            # One of a group's plans looks after the parameters that have no gradient.
            skipped, waiting[batch.number] = waiting[batch.number], []
            params = batch.group["params"]
            self._plans.append(
                ewc_adamw_plan.Plan(
                    batch.device, params, batch.members, skipped, batch.states, batch.is_protected
                )
            )
        # Those of another group; all plans must be of one device type to be taken as one.
        device = batches[0].device
        self._idle = [
            (number, ewc_adamw_plan.Plan(device, self._groups[number]["params"], [], indices, []))
            for number, indices in enumerate(waiting)
            if indices
        ]
        self.possible = all(plan.possible for plan in self._plans) and all(
            batch.device.type == device.type for batch in batches
        )

    def take(self, step: Step, inputs: list[Inputs]) -> bool:
        """Take a step like it, if this one is and all of the plans may; else nothing has changed.

        Args:
            step: The step.
            inputs: What it takes besides, by batch.
        """
        groups = step.groups
        if (
            len(groups) != len(self._groups)
            or not all(here is there for here, there in zip(groups, self._groups, strict=True))
            or _watched(groups) != self._options
            or step.roles is not self._roles
            or not self._state.matches(step.state)
        ):
            return False
        calls = [
            ewc_adamw_plan.Call(plan, groups[number]["params"], step.hypers[number], NO_INPUTS)
            for number, plan in self._idle
        ]
        calls += [
            ewc_adamw_plan.Call(plan, batch.group["params"], batch.hyper(step), given)
            for plan, batch, given in zip(self._plans, self.batches, inputs, strict=True)
        ]
        return ewc_adamw_plan.take_step(calls)
