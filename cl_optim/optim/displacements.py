"""What steps do to matrices between two projections, and nobody else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cl_optim.ops.warn import warn
from cl_optim.optim.input_subspaces import Subspace
from cl_optim.optim.projection_stacks import ChooseParts, Frozen, stacks


class Displacements:
    """Displacements of matrices since the last projection.

    Args:
        subspaces: Of the matrices.
        parts: What is taken back of a displacement.
        due: Steps since the last projection.
        old: If there are some, by parameter what it was then. The weights of now are then taken
            for those after the last of these steps, at whatever time they are read.

    Attributes:
        due: Likewise.
    """

    def __init__(
        self,
        subspaces: Sequence[Subspace],
        parts: ChooseParts,
        due: int = 0,
        old: Mapping[Tensor, Tensor] | None = None,
    ) -> None:
        self.due = due
        self._parts = parts
        # Where a projection is due, by parameter its memory and version after the last step; None:
        # whatever they are now.
        self._marks: dict[Tensor, tuple[int, int]] | None = {}
        self._has_warned = False
        self._stack(subspaces)
        if due:
            assert old is not None
            self._marks = None
            for param, place in self.old():
                place.copy_(old[param])

    def _stack(self, subspaces: Sequence[Subspace]) -> None:
        self._stacks = stacks(subspaces, self._parts)
        self._condition = _condition(param for stack in self._stacks for param, _ in stack.pairs)

    def subspaces(self) -> list[Subspace]:
        """Return those of all matrices."""
        return [one for stack in self._stacks for one in stack.subspaces]

    def old(self) -> list[tuple[Tensor, Tensor]]:
        """Return each parameter and what it was at the last projection; nothing if none is due."""
        return [pair for stack in self._stacks for pair in stack.pairs] if self.due else []

    @torch.no_grad()
    def begin_step(self, frozen: Frozen) -> None:
        """See to it that displacements are those of steps alone.

        Raises:
            RuntimeError: A parameter has another shape now.
        """
        if _condition(self._condition) != self._condition:
            self._rebuild(frozen)
        if self._marks is None:
            if self.due:
                return
            self._marks = {}  # what was due when it was loaded has been projected
        written: list[Tensor] = []
        for stack in self._stacks:
            fresh = [
                (param, old)
                for param, old in stack.pairs
                if not self.due or self._marks.get(param) != _mark(param)
            ]
            if fresh:
                params, olds = zip(*fresh, strict=True)
                torch._foreach_copy_(list(olds), [param.detach() for param in params])
                written += params if self.due else ()
        if written and not self._has_warned:
            self._has_warned = True
            warn(
                f"{len(written)} parameters were written between the steps of an InputProjection, "
                f"and what {self.due} steps before had done to them is not projected: call "
                "settle() before you write weights, or use every=1."
            )

    def end_step(self) -> None:
        """Note the weights, to know whether somebody writes them before the next step."""
        self._marks = {param: _mark(param) for param in self._condition} if self.due else {}

    @torch.no_grad()
    def project(self, frozen: Frozen) -> None:
        """Take back what is to be taken back of the displacements."""
        for stack in self._stacks:
            stack.take_back(frozen)
        self.due = 0

    def _rebuild(self, frozen: Frozen) -> None:
        """Follow parameters that were moved, cast, or fixed."""
        was, now = self._condition, _condition(self._condition)
        for param, (place, _) in was.items():
            if now[param][0].shape != place.shape:
                raise RuntimeError(
                    f"a parameter of shape {tuple(place.shape)} has shape "
                    f"{tuple(now[param][0].shape)} now, which its inputs do not fit: make the "
                    "optimizer anew, and consolidate it."
                )
        moved = any(now[param][0] != place for param, (place, _) in was.items())
        if self.due and not moved:
            self.project(frozen)
        self._marks = self._marks or {}
        self._stack([one.to(one.weight.device) for one in self.subspaces()])


class _Place(NamedTuple):
    """Where a parameter is, and what it is made of."""

    device: torch.device
    dtype: torch.dtype
    shape: torch.Size


def _condition(params: Iterable[Tensor]) -> dict[Tensor, tuple[_Place, bool]]:
    """Return what matrices were stacked for: places, and which parameters can move."""
    return {p: (_Place(p.device, p.dtype, p.shape), p.requires_grad) for p in params}


def _mark(param: Tensor) -> tuple[int, int]:
    """Return what differs after somebody wrote a parameter, but through ``.data``."""
    return param.data_ptr(), param._version
