"""The problems of a step: which parameters are in one, how it is solved, what is told of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cl_optim.ops import gram as gram_ops
from cl_optim.ops import nnqp
from cl_optim.optim.memory_rows import Products, on_device


class Projection(NamedTuple):
    """What a step did to the gradient, for B blocks and t rows, on the parameters' device.

    Attributes:
        status: [B] int8, an :class:`cl_optim.ops.nnqp.Status` per block; negative: the block was
            not projected, and ``on_invalid`` decided what became of the step.
        active: [B, t] bool, the rows that have been added to the gradient.
        v: [B, t] float64, how much of each: g̃ = g + Gᵀv. 0 where the status is negative.
        gap: [B] float64, ‖g̃ − g̃*‖² ≤ 2·gap with the exact projection g̃*.
        grad_norm: [B] float64, ‖g‖.
        projected_norm: [B] float64, ‖g̃‖, from the products alone: accurate to 1e-8·‖g‖.
        update_dot: [t] float64, G·Δθ of the update that the wrapped optimizer made of g̃: what it
            adds to each old loss, to first order. None without ``track_update``.
    """

    status: Tensor
    active: Tensor
    v: Tensor
    gap: Tensor
    grad_norm: Tensor
    projected_norm: Tensor
    update_dot: Tensor | None


class Blocks:
    """The problems of a step, by the parameters that have a gradient.

    Args:
        kind: ``"global"``, ``"group"`` or ``"tensor"``: what is a problem of its own.
        sizes: How many parameters with elements each of the optimizer's groups has.
        used: Which of its parameters with elements have a gradient.

    Attributes:
        of_used: The block of each of them.
    """

    def __init__(self, kind: str, sizes: Sequence[int], used: Sequence[int]) -> None:
        self._kind, self._used = kind, used
        if kind == "global":
            self.of_used = [0] * len(used)
            return
        if kind == "tensor":
            self._number, self.of_used = sum(sizes), list(used)
        else:
            blocks = [number for number, size in enumerate(sizes) for _ in range(size)]
            self._number, self.of_used = len(sizes), [blocks[i] for i in used]

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the parameters of each block; 0 for a block without gradients.

        Every entry in the same order, which `gram_ops.total` takes care of.
        """
        if self._kind == "global":
            return gram_ops.total(values)[None]
        if self._kind == "group":
            sizes = [self.of_used.count(number) for number in range(self._number)]
            return torch.stack([gram_ops.total(part) for part in torch.split(values, sizes)])
        if len(self._used) == self._number:
            return values
        whole = values.new_zeros(self._number, *values.shape[1:])
        return whole.index_copy_(0, on_device(self._used, values.device), values)


class Solver:
    """Solves the problems of a step; where Q is the last step's, from where that one ended."""

    def __init__(self) -> None:
        self._last: tuple[list[object], Tensor] | None = None

    def solve(
        self,
        products: Products,
        memory_strength: float,
        used: list[int],
        terms: int,
        *,
        begin_anew: bool,
    ) -> nnqp.Solution:
        """Find v ≥ γ for each block that violates a row.

        Args:
            products: By block.
            memory_strength: γ.
            used: Over which parameters they were taken.
            terms: How many terms are in their sums.
            begin_anew: Whether rows are others than at the last call.
        """
        gram = products.gram
        key: list[object] = [used, gram.shape, gram.device]
        if self._last is None or self._last[0] != key:
            self._last = key, nnqp.new_state(len(gram), gram.shape[1], gram.device)
        elif begin_anew:
            self._last[1].zero_()
        return nnqp.nnqp(
            gram,
            products.linear,
            memory_strength,
            gram_error=nnqp.sum_error(terms),  # Q and c may come from different passes
            only_violated=True,
            state=self._last[1],
        )


def outcome(solution: nnqp.Solution) -> tuple[Tensor, bool | Tensor, bool]:
    """Return what is to be done with solutions.

    Returns:
        v, 0 where there is none; whether there is none for some problem, a 0-dim bool where a
        device would be waited for; whether v may be other than 0.
    """
    status = solution.status
    if status.is_cpu:
        codes = status.tolist()
        if all(code >= 0 for code in codes):
            return solution.v, False, any(code != nnqp.Status.INACTIVE for code in codes)
    invalid = status < 0
    v = torch.where(invalid[:, None], 0.0, solution.v)
    return v, True if status.is_cpu else invalid.any(), True


def report(
    solution: nnqp.Solution, v: Tensor, products: Products, update_dot: Tensor | None
) -> Projection:
    """Tell what adding Gᵀv has done to a gradient, from its products."""
    change = (v * (2.0 * products.linear + (products.gram @ v[:, :, None])[:, :, 0])).sum(1)
    # Where v = 0 nothing has changed, whatever the rows hold.
    square = products.square + torch.where((v != 0).any(1), change, 0.0)
    return Projection(
        status=solution.status,
        active=v != 0,
        v=v,
        gap=solution.gap,
        grad_norm=products.square.sqrt(),
        projected_norm=square.clamp(min=0.0).sqrt(),
        update_dot=update_dot,
    )


def cosines(products: Products) -> Tensor:
    """Return the cosines of gradient and rows, [B, t] float64; 0 where either is 0."""
    # Roots before the product: the squares of tiny or huge norms would leave float64's range.
    norms = products.gram.diagonal(dim1=1, dim2=2).sqrt() * products.square.sqrt()[:, None]
    return torch.where(norms == 0, 0.0, products.linear / norms).clamp(-1.0, 1.0)
