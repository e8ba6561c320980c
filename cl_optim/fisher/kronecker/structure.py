"""Which parameters of a model have Kronecker factors, as the first batch of each has shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from cl_optim.fisher.kronecker.used import Used
from cl_optim.importance.kronecker.side import partition

Scale: TypeAlias = Literal["product", "exact"]

# Sides of more blocks than that are vocabularies: as many inputs or outputs as things to name.
_MOST_BLOCKS = 16


class Structure:
    """What an estimator's Kronecker factors are to be, and which parameters have some.

    A parameter is decided on by its uses in the first batch that it gets a gradient in. Later ones
    must agree, or the factors would be those of a part of its uses.

    Args:
        parameters: By name.
        block: The widest block.
        energy: The share of the trace that a side's directions hold.
        max_rank: The most directions of a block; None: as many as it takes.

    Attributes:
        block: As given.
        energy: As given.
        max_rank: As given.
        factored: The parameters that have factors.
        reasons: Others, and in short why they have none.
        owners: Of each bias the matrix that it is beside; ``""`` where it is used elsewhere, too.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], block: int, energy: float, max_rank: int | None
    ) -> None:
        self.block, self.energy, self.max_rank = block, energy, max_rank
        self.shapes = {name: tuple(one.shape) for name, one in parameters.items()}
        self.forget()

    @property
    def options(self) -> tuple[int, float, int | None]:
        """Return what was asked for: block, energy and max_rank."""
        return self.block, self.energy, self.max_rank

    def forget(self) -> None:
        """Decide anew."""
        self.factored: dict[str, None] = {}
        self.reasons: dict[str, str] = {}
        self.owners: dict[str, str] = {}

    def decide(self, name: str, uses: Sequence[Used]) -> bool:
        """Return whether a parameter has factors, by all its uses in one batch.

        Raises:
            NotImplementedError: It had, in earlier batches, and these uses have none.
        """
        if name in self.reasons:
            self._own(name, uses)
            return False
        whys = [use.rows for use in uses if isinstance(use.rows, str)]
        if not whys:
            self.factored[name] = None
            return True
        if name in self.factored:
            raise NotImplementedError(
                f"parameter {name!r} has Kronecker factors, but is used otherwise here "
                f"({whys[0]}): put such a batch first."
            )
        self.reasons[name] = whys[0]
        self._own(name, uses)
        return False

    def _own(self, name: str, uses: Sequence[Used]) -> None:
        for use in uses:
            owner = use.partner or ""
            if self.owners.setdefault(name, owner) != owner:
                self.owners[name] = ""

    def why(self, name: str) -> str:
        """Say in short why a parameter has no factors."""
        return self.reasons.get(name, "no gradient")

    def zeros(self, name: str, whole: int, groups: int, size: int, device: torch.device) -> Tensor:
        """Return zeros for Σ xxᵀ of one side of a matrix, float64.

        Args:
            name: The matrix's weight.
            whole: The width of the whole side.
            groups: Number of parts that are summed for themselves.
            size: The width of such a part.
            device: Where.

        Returns:
            [groups, k, m, m], or the diagonal alone, [groups, size].

        Raises:
            RuntimeError: There is no memory for them.
        """
        shape: tuple[int, ...] = (groups, size)
        # Of a single output or input there is nothing but the diagonal.
        if size > 1 and whole <= _MOST_BLOCKS * self.block:
            blocks, width = partition(size, self.block)
            shape = (groups, blocks, width, width)
        try:
            return torch.zeros(shape, dtype=torch.float64, device=device)
        except RuntimeError as error:
            raise type(error)(
                f"there is no memory for the Kronecker factors of parameter {name!r}, of which a "
                f"side is {whole} wide, in blocks of at most block={self.block}: make block= "
                f"smaller."
            ) from error

    def agreed(self, others: Sequence[Structure]) -> Structure:
        """Return what several have decided together, each of its own batches.

        Raises:
            NotImplementedError: A parameter has factors in one and none in another.
        """
        agreed = copy(self)
        agreed.forget()
        for one in others:
            agreed.factored |= one.factored
            agreed.reasons |= one.reasons
            for name, owner in one.owners.items():
                if agreed.owners.setdefault(name, owner) != owner:
                    agreed.owners[name] = ""
        for name, why in agreed.reasons.items():
            if name in agreed.factored:
                raise NotImplementedError(
                    f"parameter {name!r} has Kronecker factors in one process, and is used "
                    f"otherwise in another ({why}): give all of them such batches, or "
                    "structure='diagonal'."
                )
        return agreed

    def state_dict(self) -> dict[str, Any]:
        """Return what was decided."""
        return {
            "block": self.block,
            "shapes": dict(self.shapes),
            "factored": list(self.factored),
            "reasons": dict(self.reasons),
            "owners": dict(self.owners),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on with what was decided."""
        self.factored = dict.fromkeys(state_dict["factored"])
        self.reasons = dict(state_dict["reasons"])
        self.owners = dict(state_dict["owners"])
