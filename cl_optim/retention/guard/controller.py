"""A controller for λ: more protection while a task is being forgotten, less when it is safe."""

from __future__ import annotations

from typing import Any

import torch


class LambdaController:
    """Multiplies the ``ewc_lambda`` of all groups of an optimizer by one bounded factor.

    At a breach the factor is multiplied by ``raise_by``, up to ``limit``. Where no old task has
    lost more than half the threshold it is divided by √raise_by, down to 1: the λ that the user
    chose is never undercut. In between it stays. Under a budget (:meth:`steer`) it goes both ways,
    from 1/limit to limit.

    A λ that the user sets in the meantime, or brings with a new group, is the present one from
    then on: what it relaxes to changes in proportion.

    Args:
        optimizer: Some of its groups have an ``ewc_lambda`` above 0.
        raise_by: Above 1.
        limit: The largest factor, at least 1.

    Raises:
        ValueError: No group has such a λ, or an argument is out of range.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, raise_by: float = 3.0, limit: float = 1000.0
    ) -> None:
        if not any(group.get("ewc_lambda", 0.0) > 0.0 for group in optimizer.param_groups):
            raise ValueError(
                "raising λ needs an optimizer with a group whose ewc_lambda is above 0, such as "
                f"EWCAdamW, not {type(optimizer).__name__} without one."
            )
        if not raise_by > 1.0:
            raise ValueError(f"raise_by must be above 1, not {raise_by}.")
        if not limit >= 1.0:
            raise ValueError(f"limit must be at least 1, not {limit}.")
        self._optimizer = optimizer
        self._raise_by = raise_by
        self._limit = limit
        self._chosen: list[float | None] = [
            group.get("ewc_lambda") for group in optimizer.param_groups
        ]
        self.factor = 1.0

    @property
    def at_limit(self) -> bool:
        """Whether λ cannot be raised further."""
        return self.factor >= self._limit

    def raise_lambda(self) -> None:
        """Raise λ after a breach."""
        self._notice()
        self._set(min(self.factor * self._raise_by, self._limit))

    def relax(self) -> None:
        """Lower λ after a check in which nothing was lost that matters."""
        self._notice()
        self._set(max(self.factor / self._raise_by**0.5, 1.0))

    def steer(self, used: float) -> None:
        """Protect more the more of a budget is used, and less the less: at 1 λ stays.

        The factor is multiplied by raise_by to the power of used − 1, which is at least −½ and at
        most 1: so it doubts what a single check says.

        Args:
            used: What an old task has lost, as a part of the budget; negative where it has gained.
        """
        self._notice()
        power = min(max(used - 1.0, -0.5), 1.0)
        factor = self.factor * self._raise_by**power
        self._set(min(max(factor, 1.0 / self._limit), self._limit))

    def apply(self) -> None:
        """Set the groups' λ again, after a roll-back has set them to what they were."""
        self._set(self.factor)

    def state_dict(self) -> dict[str, Any]:
        """Return the factor and the λ that the user chose."""
        self._notice()
        return {"factor": self.factor, "chosen": list(self._chosen)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state; the groups' λ are the optimizer's to restore."""
        self.factor = state_dict["factor"]
        self._chosen = list(state_dict["chosen"])

    def _notice(self) -> None:
        """Take over what the user has set since, and groups that were added."""
        groups = self._optimizer.param_groups
        self._chosen += [None] * (len(groups) - len(self._chosen))
        for number, (group, chosen) in enumerate(zip(groups, self._chosen, strict=True)):
            now = group.get("ewc_lambda")
            if now is not None and (chosen is None or now != chosen * self.factor):
                self._chosen[number] = now / self.factor

    def _set(self, factor: float) -> None:
        self.factor = factor
        for group, chosen in zip(self._optimizer.param_groups, self._chosen, strict=True):
            if chosen is not None:
                group["ewc_lambda"] = chosen * factor


def largest_lambda(optimizer: torch.optim.Optimizer) -> float | None:
    """Return the largest λ among the groups; None where they have none."""
    lambdas = [g["ewc_lambda"] for g in optimizer.param_groups if "ewc_lambda" in g]
    return max(lambdas, default=None)
