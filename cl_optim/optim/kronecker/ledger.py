"""What is due: the sum of λ·lr over the steps since the last pull, by what moved in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor

# Of λ·lr; a 0-dim float64 tensor where the host does not know it.
Amount: TypeAlias = float | Tensor
Moved: TypeAlias = tuple[bool, ...]  # which of a group's parameters in matrices had a gradient


class Ledger:
    """Counts each group's steps, and sums what they owe. Plain data, which can be copied.

    Attributes:
        steps: Steps since the last pull, by the group's number.
        due: Σ λ·lr, by the group's number and by what moved.
    """

    def __init__(self) -> None:
        self.steps: dict[int, int] = {}
        self.due: dict[int, dict[Moved, Amount]] = {}

    def add(self, number: int, moved: Moved, amount: Amount) -> int:
        """Count a step of a group.

        Returns:
            How many there are since the last pull.
        """
        due = self.due.setdefault(number, {})
        due[moved] = due.get(moved, 0.0) + amount
        self.steps[number] = self.steps.get(number, 0) + 1
        return self.steps[number]

    def renumber(self, numbers: Mapping[int, int]) -> None:
        """Follow groups that have other numbers now, by the old ones; others owe nothing."""
        self.steps = {numbers[n]: steps for n, steps in self.steps.items() if n in numbers}
        self.due = {numbers[n]: due for n, due in self.due.items() if n in numbers}

    def take(self, number: int) -> dict[Moved, Amount]:
        """Return what a group owes, and begin anew."""
        self.steps.pop(number, None)
        return self.due.pop(number, {})


def amount(
    ewc_lambda: float, lr: float, lr_tensor: Tensor | None, found_inf: Tensor | None
) -> Amount:
    """Return λ·lr of a step; 0 where it is left out. Waits for no device.

    Args:
        ewc_lambda: λ.
        lr: The learning rate, where it is a number.
        lr_tensor: The learning rate, where it stays on a device.
        found_inf: GradScaler's: not 0 where the step is left out.
    """
    result: Amount = ewc_lambda * lr
    if lr_tensor is not None:
        result = ewc_lambda * lr_tensor.detach().double().reshape(())
    if found_inf is None:
        return result
    if found_inf.is_cpu:
        return 0.0 if found_inf.item() != 0.0 else result
    is_kept = found_inf.detach().reshape(()) == 0.0
    if isinstance(result, Tensor):
        return torch.where(is_kept.to(result.device), result, 0.0)
    return is_kept.double() * result
