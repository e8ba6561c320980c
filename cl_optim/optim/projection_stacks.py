"""Projections of many matrices at once: what is taken back of displacements since a moment."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from cl_optim.importance.kronecker.side import Side
from cl_optim.ops import formats
from cl_optim.optim.input_subspaces import Parts, Subspace

ChooseParts = Callable[[Subspace, Side], Parts]
Frozen = Callable[[Tensor], Tensor | None]  # the mask of a parameter's frozen weights

# Elements of the matrices that are computed together: temporary tensors are a few times as large.
_TOGETHER = 2**24
# Ranks of matrices that are computed together differ by less than this, in columns of zeros.
_RANKS = 32


class Stack:
    """Matrices of one shape, computed together: Δ ← Δ − ΔU diag(along) Uᵀ − beside·Δ(I − UUᵀ).

    Args:
        subspaces: Of the matrices.
        sides: Of each, the directions U.
        parts: Of each, what is taken away.

    Attributes:
        subspaces: Of the matrices; their directions are this stack's, not a copy.
        pairs: Each parameter, and its weights of the moment that displacements are from.
    """

    def __init__(
        self, subspaces: Sequence[Subspace], sides: Sequence[Side], parts: Sequence[Parts]
    ) -> None:
        first = subspaces[0]
        self._transposed = first.layout.transposed
        self._has_bias_column = first.layout.bias is not None
        self._dtype = formats.arithmetic_dtype(first.weight)
        self._basis: Tensor | None = None
        self._beside: Tensor | None = None
        if first.side.basis is None:
            self._along = torch.stack([part.along.to(self._dtype) for part in parts]).unsqueeze(1)
        else:
            rank = max(side.rank // side.blocks for side in sides)
            bases, along = [], []
            for side, part in zip(sides, parts, strict=True):
                assert side.basis is not None
                blocks, _, own = side.basis.shape
                bases.append(pad(side.basis.to(self._dtype), (0, rank - own)))
                inner = (part.along - part.beside).view(blocks, 1, own)
                along.append(pad(inner.to(self._dtype), (0, rank - own)))
            self._basis = bases[0] if len(bases) == 1 else torch.cat(bases)
            self._along = torch.cat(along)
            if any(part.beside for part in parts):
                beside = self._along.new_tensor([part.beside for part in parts])
                self._beside = beside.view(-1, 1, 1)
        self.subspaces = [
            one if side is not one.side else replace(one, side=self._shared(one.side, number))
            for number, (one, side) in enumerate(zip(subspaces, sides, strict=True))
        ]
        self._weights = [one.weight for one in subspaces]
        self._old_weights = torch.stack([weight.detach() for weight in self._weights])
        self._biases = [one.bias for one in subspaces if one.bias is not None]
        self._old_biases = None
        if self._biases:
            self._old_biases = torch.stack([bias.detach() for bias in self._biases])
        self.pairs = [
            *zip(self._weights, self._old_weights, strict=True),
            *zip(self._biases, () if self._old_biases is None else self._old_biases, strict=True),
        ]

    def _shared(self, side: Side, number: int) -> Side:
        """Return a side with its directions as they lie here, so that memory has them once."""
        if side.basis is None or self._basis is None or side.basis.dtype != self._basis.dtype:
            return side
        blocks, _, own = side.basis.shape
        values = pad(side.values.view(blocks, own), (0, self._basis.shape[2] - own)).flatten()
        basis = self._basis[number * blocks : (number + 1) * blocks]
        return replace(side, values=values, basis=basis)

    def take_back(self, frozen: Frozen) -> None:
        """Correct the parameters; what has not moved as a whole, or is frozen, keeps its bits.

        Args:
            frozen: Gives the mask of a parameter's frozen weights; None where there are none.
        """
        weights = torch.stack([weight.detach() for weight in self._weights])
        moved = weights.to(self._dtype) - self._old_weights.to(self._dtype)
        delta = moved.mT if self._transposed else moved.reshape(*moved.shape[:2], -1)
        biases = moved_biases = None
        if self._old_biases is not None:
            biases = torch.stack([bias.detach() for bias in self._biases])
            moved_biases = biases.to(self._dtype) - self._old_biases.to(self._dtype)
        if self._has_bias_column:
            column = delta.new_zeros(delta.shape[:2]) if moved_biases is None else moved_biases
            delta = torch.cat([delta, column.unsqueeze(2)], 2)
        back = self._along_old_inputs(delta)
        if self._old_biases is not None and biases is not None and moved_biases is not None:
            _write(self._biases, biases, self._old_biases, moved_biases, back[:, :, -1], frozen)
        back = back[:, :, :-1] if self._has_bias_column else back
        back = back.mT if self._transposed else back.reshape(moved.shape)
        _write(self._weights, weights, self._old_weights, moved, back, frozen)

    def _along_old_inputs(self, delta: Tensor) -> Tensor:
        """Return what of Δ is taken back, [matrices, out, in]."""
        if self._basis is None:
            return delta * self._along
        matrices, outputs, inputs = delta.shape
        total, width, _ = self._basis.shape
        blocks = total // matrices
        cut = pad(delta, (0, blocks * width - inputs)).view(matrices, outputs, blocks, width)
        cut = cut.transpose(1, 2).reshape(total, outputs, width)
        with torch.autocast(delta.device.type, enabled=False):
            back = torch.bmm(torch.bmm(cut, self._basis) * self._along, self._basis.mT)
        back = back.view(matrices, blocks, outputs, width).transpose(1, 2)
        back = back.reshape(matrices, outputs, blocks * width)[:, :, :inputs]
        return back if self._beside is None else back + self._beside * delta


def _write(
    params: list[Tensor],
    values: Tensor,
    old: Tensor,
    moved: Tensor,
    back: Tensor,
    frozen: Frozen,
) -> None:
    """Subtract from parameters of one shape what is to be taken back."""
    has_moved = (moved != 0).flatten(1).any(1).view(-1, *[1] * (moved.dim() - 1))
    back = torch.where(has_moved, back, 0.0)
    # A difference that is taken back as a whole may be a rounded one.
    exact = torch.where(back == moved, old, (values.to(back.dtype) - back).to(values.dtype))
    new = list(exact.unbind())
    for place, param in enumerate(params):
        mask = frozen(param)
        if mask is not None:
            new[place] = torch.where(mask, values[place], new[place])
    torch._foreach_copy_([param.detach() for param in params], new)


def stacks(subspaces: Sequence[Subspace], parts: ChooseParts) -> list[Stack]:
    """Put matrices together that can be computed together.

    Args:
        subspaces: All.
        parts: Gives what is taken away from a matrix, along the directions of a side.
    """
    return [
        Stack(chunk, sides, [parts(one, side) for one, side in zip(chunk, sides, strict=True)])
        for chunk, sides in _chunks(subspaces)
    ]


def _chunks(subspaces: Sequence[Subspace]) -> Iterator[tuple[list[Subspace], list[Side]]]:
    alike: dict[Hashable, list[tuple[Subspace, Side]]] = defaultdict(list)
    for one in subspaces:
        side = one.movable()
        rank = 0 if side.basis is None else -(-side.basis.shape[2] // _RANKS)
        key = (
            *(one.layout.shape, one.layout.transposed, one.layout.bias is None),
            *((param.device, param.dtype) for param in one.params),
            *(side.blocks, rank),
        )
        alike[key].append((one, side))
    for members in alike.values():
        size = max(1, _TOGETHER // max(1, members[0][0].weight.numel()))
        for start in range(0, len(members), size):
            chunk = members[start : start + size]
            yield [one for one, _ in chunk], [side for _, side in chunk]
