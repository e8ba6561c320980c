"""The pull of matrices whose importance is Kronecker-factored: when it is due, and how much."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cl_optim.ops.capture import is_capturing
from cl_optim.optim.groups import are_of, renumbered
from cl_optim.optim.kronecker.ledger import Amount, Ledger, Moved, amount
from cl_optim.optim.kronecker.matrices import Matrix, check_groups_of, find
from cl_optim.optim.kronecker.stacks import Stack, stacked
from cl_optim.optim.launch import HELD, PLAIN, Roles, Step
from cl_optim.optim.options import lr_stays_tensor

Groups = Sequence[Mapping[str, Any]]
State = Mapping[Tensor, dict[str, Any]]

_NO_ROLES: Roles = {}  # one for all steps: plans tell by it that steps are alike


class Pull:
    """Takes the pull of an optimizer's matrices, every so many steps and when it is asked to.

    Attributes:
        ledger: What is due.
    """

    def __init__(self) -> None:
        self.ledger = Ledger()
        self._stacks: list[Stack] | None = None
        self._seen: list[tuple[Tensor, ...]] = []  # the groups' parameters, when it looked
        self._members: dict[int, list[Tensor]] = {}  # a group's parameters in matrices
        self._of_groups: list[Matrix] = []  # one for each group, or pair of groups, that has some
        self._roles: dict[tuple[bool, ...], Roles] = {}
        self._sums: dict[int, Tensor] = {}

    def forget(self) -> None:
        """Look anew at the state before the next step; what is due has been taken."""
        self.ledger = Ledger()
        self._sums = {}
        self.look_again()

    def look_again(self) -> None:
        """Look anew at the state before the next step, after weights were frozen, say."""
        self._stacks = None

    def matrices(self, groups: Groups, state: State) -> list[Matrix]:
        """Return the optimizer's matrices."""
        return [member for stack in self._looked(groups, state) for member in stack.members]

    def _looked(self, groups: Groups, state: State) -> list[Stack]:
        if self._stacks and not are_of(groups, self._seen):
            self._stacks = None
        if self._stacks is None:
            numbers = renumbered(self._seen, groups)
            if self._seen:
                self.ledger.renumber(numbers)
                self._sums = {numbers[n]: s for n, s in self._sums.items() if n in numbers}
            self._seen = [tuple(group["params"]) for group in groups]
            matrices = find(groups, state)
            self._stacks = stacked(matrices)
            self._roles = {}
            of_groups: dict[tuple[int, ...], Matrix] = {}
            for matrix in matrices:
                of_groups.setdefault(matrix.groups, matrix)
            self._of_groups = list(of_groups.values())
            self._members = {}
            for matrix in matrices:
                self._members.setdefault(matrix.groups[0], []).extend(matrix.params)
        return self._stacks

    # --- a step -----------------------------------------------------------------------------------

    def roles(self, groups: Groups, state: State) -> Roles:
        """Return how the parameters in matrices take their step, after a check of their groups.

        Raises:
            ValueError: A group's options do not go together with Kronecker importance.
            RuntimeError: A CUDA graph is being captured.
        """
        stacks = self._looked(groups, state)
        if not stacks:
            return _NO_ROLES
        _refuse_capture()
        for matrix in self._of_groups:
            check_groups_of(groups, matrix.params, matrix.groups)
        damped = tuple(group["importance_damping"] > 0.0 for group in groups)
        if damped not in self._roles:
            self._roles[damped] = {
                param: HELD if has_frozen or damped[number] else PLAIN
                for stack in stacks
                for member, flags in zip(stack.members, stack.frozen, strict=True)
                for param, number, has_frozen in zip(
                    member.params, member.groups, flags, strict=True
                )
            }
        return self._roles[damped]

    def after_step(
        self, step: Step, has_moved: Callable[[Tensor], bool] = lambda param: param.grad is not None
    ) -> None:
        """Count a step that was taken, and take what is due of the groups whose turn it is.

        Args:
            step: The step.
            has_moved: Says of a parameter whether the step has updated it.
        """
        if not self._stacks:
            return
        for number, params in self._members.items():
            moved = tuple(map(has_moved, params))
            if not any(moved):
                continue
            group, hyper = step.groups[number], step.hypers[number]
            lr = group["lr"] if lr_stays_tensor(group) else None
            owed = amount(hyper.ewc_lambda, hyper.lr, lr, step.found_inf)
            if self.ledger.add(number, moved, owed) >= group["every"]:
                self._take(step.groups, step.state, number)

    def settle(self, groups: Groups, state: State) -> None:
        """Take all that is due."""
        self._looked(groups, state)
        for number in list(self.ledger.due):
            self._take(groups, state, number)

    @torch.no_grad()
    def _take(self, groups: Groups, state: State, number: int) -> None:
        _refuse_capture()
        due = self.ledger.take(number)
        stacks = self._looked(groups, state)
        if not all(stack.is_current(state) for stack in stacks):
            self.look_again()
            stacks = self._looked(groups, state)
        params = self._members.get(number, [])
        if any(len(moved) != len(params) for moved in due):
            return  # the state was replaced: what was due is of other matrices
        group = groups[number]
        place = {param: index for index, param in enumerate(params)}
        total: Tensor | None = None
        for stack in stacks:
            if stack.group != number:
                continue
            indices = [[place[param] for param in m.params] for m in stack.members]
            pulls = _pulls(due, indices, stack.device)
            track = group["track_penalty"]
            if pulls is None and not track:
                continue
            moved = [tuple(any(flags[i] for flags in due) for i in of_one) for of_one in indices]
            size = len(stack.members)
            sums = None
            if track:
                sums = torch.zeros(size, 2, dtype=torch.float64, device=stack.device)
            stack.pull(groups, 0.0 if pulls is None else pulls, moved, sums)
            if sums is not None:
                active = [index for index, flags in enumerate(moved) if any(flags)]
                of_stack = sums.sum(0) if len(active) == size else sums[active].sum(0)
                total = of_stack if total is None else total + of_stack.to(total.device)
        if total is not None:
            self._sums[number] = torch.stack([total[0] * group["ewc_lambda"], total[1]])

    # --- what is known of it ----------------------------------------------------------------------

    def members(self, groups: Groups, state: State) -> set[Tensor]:
        """Return the parameters in matrices."""
        return {param for one in self.matrices(groups, state) for param in one.params}

    def penalties(self, groups: Groups, state: State) -> dict[Tensor, Tensor]:
        """Return λ Σ S z² by a matrix's weight, of now, float64 0-dim, frozen weights at rest."""
        return {
            member.params[0]: groups[stack.group]["ewc_lambda"] * penalty
            for stack in self._looked(groups, state)
            for member, penalty in zip(stack.members, stack.penalties(), strict=True)
        }

    def sums(self, groups: Groups, device: torch.device) -> Tensor:
        """Return λ Σ S z² and Σ Δ² as the last pull met them, float64 [groups, 2]."""
        nothing = torch.zeros(2, dtype=torch.float64, device=device)
        rows = [self._sums.get(number, nothing).to(device) for number in range(len(groups))]
        return torch.stack(rows)

    def squares(self, groups: Groups, state: State) -> list[tuple[Matrix, Tensor]]:
        """Return each matrix with Σ S², float64, 0-dim."""
        return [
            (member, stack.squares(index))
            for stack in self._looked(groups, state)
            for index, member in enumerate(stack.members)
        ]


def _pulls(
    due: Mapping[Moved, Amount], indices: Sequence[Sequence[int]], device: torch.device
) -> Tensor | float | None:
    """Return 2·Σ λ·lr: of each matrix, float64 [L]; one number where the host knows it for all.

    Args:
        due: What each pattern of moved parameters owes.
        indices: Of each matrix, the places of its parameters in a pattern.
        device: Where the matrices are.

    Returns:
        None where the host knows that all are 0.
    """
    known = [0.0] * len(indices)
    unknown: Tensor | None = None
    for moved, owed in due.items():
        active = [any(moved[i] for i in of_one) for of_one in indices]
        if not any(active):
            continue
        if isinstance(owed, Tensor):
            flags = torch.tensor([float(one) for one in active], dtype=torch.float64, device="cpu")
            share = owed.to(device) * _on_device(flags, device)
            unknown = share if unknown is None else unknown + share
        else:
            known = [sum_ + owed * one for sum_, one in zip(known, active, strict=True)]
    if unknown is None and not any(known):
        return None
    if unknown is None and len(set(known)) == 1:
        return 2.0 * known[0]
    pulls = _on_device(torch.tensor(known, dtype=torch.float64, device="cpu"), device)
    return 2.0 * (pulls if unknown is None else pulls + unknown)


def _on_device(host: Tensor, device: torch.device) -> Tensor:
    """Return it on a device, for which the host does not wait."""
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def _refuse_capture() -> None:
    if is_capturing():
        raise RuntimeError(
            "a step with Kronecker importance cannot be captured in a CUDA graph: the steps "
            "between two pulls are counted on the host, and replays would not be. Capture the "
            "forward and the backward pass and call step() outside of the graph, or consolidate "
            "importance.diagonal()."
        )
