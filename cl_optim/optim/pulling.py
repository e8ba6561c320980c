"""The pull of diagonal importance beside another optimizer's step: by plans where it is alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cl_optim.ops import ewc_adamw_plan, ewc_pull, library
from cl_optim.ops.ewc_adamw_arguments import Inputs
from cl_optim.ops.ewc_pull import Numbers, Options, Pulled

_SLOWER = "EWC's pull runs on its slower reference: {}"


class Batch(NamedTuple):
    """Parameters of a group that are pulled together: on one device.

    Attributes:
        number: The group's.
        params: All of its parameters.
        members: Which of them; one at least.
        device: Theirs.
    """

    number: int
    params: list[Tensor]
    members: tuple[int, ...]
    device: torch.device


def batches(number: int, params: list[Tensor], members: Sequence[int]) -> list[Batch]:
    """Return the members of a group by device."""
    by_device: dict[torch.device, list[int]] = {}
    for index in members:
        by_device.setdefault(params[index].device, []).append(index)
    return [Batch(number, params, tuple(found), on) for on, found in by_device.items()]


class Pulling:
    """Pulls batches, and keeps of each what makes a like one faster."""

    def __init__(self) -> None:
        self._last: dict[tuple[int, torch.device], tuple[Batch, bool]] = {}
        self._plans: dict[tuple[int, torch.device], ewc_adamw_plan.Plan] = {}

    def forget(self) -> None:
        """Let go of the tensors of the last pulls."""
        self._last, self._plans = {}, {}

    def take(
        self,
        batch: Batch,
        state: Mapping[Tensor, dict[str, Any]],
        options: Options,
        numbers: Numbers,
        before: Mapping[Tensor, Tensor],
    ) -> None:
        """Pull a batch.

        Args:
            batch: The parameters.
            state: What protects them; with stochastic rounding there is a count ``"step"``.
            options: How.
            numbers: What is on a device.
            before: With ``"decoupled"`` what the weights were before the step.
        """
        device = batch.device
        key = batch.number, device
        into_gradient = options.penalty == "gradient"
        if library.choose("ewc_pull_", device, _SLOWER) == "reference":
            return ewc_pull.foreach(self._pulled(batch, state, options, before), options, numbers)
        plan = self._plans.get(key)
        if plan is not None and self._is_like(key, batch, into_gradient):
            inputs = Inputs((), (), *numbers, None)
            call = ewc_adamw_plan.Call(plan, batch.params, options.hyper(), inputs)
            if ewc_adamw_plan.take_step([call]):
                return None
        # A plan is worth its making where pulls are alike.
        if options.penalty != "decoupled" and self._is_like(key, batch, into_gradient):
            states = [state[batch.params[index]] for index in batch.members]
            made = ewc_adamw_plan.Plan(
                device, batch.params, list(batch.members), [], states, pull_only=True
            )
            if made.possible:
                self._plans[key] = made
        else:
            self._plans.pop(key, None)
        self._last[key] = batch, into_gradient
        return ewc_pull.fused(self._pulled(batch, state, options, before), options, numbers)

    def _is_like(self, key: tuple[int, torch.device], batch: Batch, into_gradient: bool) -> bool:
        if key not in self._last:
            return False
        last, was_into_gradient = self._last[key]  # a plan looks whether parameters are the same
        alike = last is batch or last.members == batch.members
        return alike and was_into_gradient == into_gradient

    @staticmethod
    def _pulled(
        batch: Batch,
        state: Mapping[Tensor, dict[str, Any]],
        options: Options,
        before: Mapping[Tensor, Tensor],
    ) -> Pulled:
        params = [batch.params[index] for index in batch.members]
        states = [state[param] for param in params]
        targets: list[Tensor] = params
        beside: list[Tensor] = []
        if options.penalty == "gradient":
            targets, beside = [p.grad for p in params if p.grad is not None], params
        elif options.penalty == "decoupled":
            beside = [before[param] for param in params]
        return Pulled(
            targets,
            beside,
            [one["importance"] for one in states],
            [one["anchor"] for one in states],
            [one["step"] for one in states] if options.stochastic else [],
        )
