"""The Fisher information of one matrix in Kronecker-factored bases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from cl_optim.importance.kronecker.side import (
    Side,
    check_sums,
    leading,
    merged_side,
    partition,
    times,
)
from cl_optim.ops.checks import check_positive


class Layout(NamedTuple):
    """How a weight, and perhaps a bias, lie in a matrix W̃ [out, in] that maps inputs to outputs.

    A bias is the matrix's last column, whose input is always 1.

    Attributes:
        shape: The weight's shape.
        transposed: The weight is [in, out]; else its first dimension runs over the outputs.
        bias: The bias's name; None where it is not in the matrix.
    """

    shape: tuple[int, ...]
    transposed: bool = False
    bias: str | None = None

    @property
    def outputs(self) -> int:
        """Rows of the matrix."""
        return self.shape[-1] if self.transposed else self.shape[0]

    @property
    def inputs(self) -> int:
        """Columns of the matrix, a bias's included."""
        others = self.shape[:-1] if self.transposed else self.shape[1:]
        return math.prod(others) + (self.bias is not None)

    def matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Put the parameters, or what has their shapes, into the matrix; a copy with a bias."""
        inputs = self.inputs - (self.bias is not None)
        matrix = weight.mT if self.transposed else weight.reshape(self.outputs, inputs)
        return matrix if bias is None else torch.cat([matrix, bias.unsqueeze(1)], 1)

    def parameters(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """Take the weight, and the bias, out of the matrix; views where they can be."""
        weight = matrix if self.bias is None else matrix[:, :-1]
        bias = None if self.bias is None else matrix[:, -1]
        return (weight.mT if self.transposed else weight.reshape(self.shape)), bias


@dataclass(frozen=True)
class Factors:
    """F ≈ Σ_jk S_jk P_j ⊗ Q_k of one matrix W̃, as a mean over samples.

    P_j = u_j u_jᵀ are the projections onto directions of the outputs' gradients, Q_k = a_k a_kᵀ of
    the inputs; the last of each, I − UUᵀ, is that onto all other directions, the tail.

    Attributes:
        layout: Where the parameters are in the matrix.
        output: The directions u, with E[(uᵀb)²].
        input: The directions a, with E[(aᵀã)²].
        scale: S ≥ 0, [output.rank + 1, input.rank + 1]: the importance in each pair of directions.
            The last row and column are the tails', and 0 where a side has none.

    References:
        Martens & Grosse 2015, arXiv:1503.05671 (K-FAC); George et al. 2018, arXiv:1806.03884
        (EKFAC: S itself, in these bases); Ritter et al. 2018, arXiv:1805.07810 (for EWC).
    """

    layout: Layout
    output: Side
    input: Side
    scale: Tensor

    def coordinates(self, matrix: Tensor) -> Tensor:
        """Return UᵀW̃A: [out, in] → [output.rank, input.rank]."""
        return self.output.coordinates(self.input.coordinates(matrix).mT).mT

    def vectors(self, z: Tensor) -> Tensor:
        """Return UzAᵀ: [output.rank, input.rank] → [out, in]."""
        return self.input.vectors(self.output.vectors(z.mT).mT)

    def diagonal(self) -> tuple[Tensor, Tensor | None]:
        """Return the importance of each element of the weight, and of the bias, float32."""
        return self.layout.parameters(self.output.spread(self.input.spread(self.scale).mT).mT)

    def bias_diagonal(self) -> Tensor:
        """Return the importance of each element of the bias, [out], without the weight's."""
        last = self.scale.new_zeros(self.input.size)
        last[-1] = 1.0
        return self.output.spread(self.scale @ self.input.gathered(last))

    def trace(self) -> float:
        """Return the sum of the diagonal, without making it."""
        return float(self.output.counts() @ self.scale.double() @ self.input.counts())

    def to(self, device: torch.device | str) -> Factors:
        """Return them on ``device``."""
        output, input = self.output.to(device), self.input.to(device)
        return Factors(self.layout, output, input, self.scale.to(device))

    def scaled(self, factor: float) -> Factors:
        """Return them of a Fisher information that is so many times as large.

        So are the output gradients' squares then, and the inputs' are not.
        """
        scale = times(self.scale, factor)
        return replace(self, output=self.output.times(factor), scale=scale)

    def decayed(self, decay: float) -> Factors:
        """Return ``decay`` × these, as :meth:`merged` counts them beside nothing newer."""
        return replace(self.scaled(decay), input=self.input.times(decay))

    def merged(self, newer: Factors, decay: float, energy: float, name: str) -> Factors:
        """Return ``decay`` × these + others, in bases of the sums of both tasks' factors.

        S ← decay·R_G S R_Aᵀ + …, R_ij = tr(P′_i P_j) / tr P′_i: the mean over each new projection
        of what it was, so that the trace stays; of two directions R is (u′ᵀu)².

        Args:
            newer: Of the same matrix.
            decay: What remains of these.
            energy: As for :func:`~cl_optim.importance.kronecker.side.merged_side`.
            name: Of the matrix's weight, for a sentence.

        Raises:
            ValueError: The two are of different matrices, or cut into other blocks.
        """
        if self.layout != newer.layout:
            raise ValueError(f"the Kronecker factors of {name!r} are of two different matrices.")
        sides = []
        for here, there in ((self.output, newer.output), (self.input, newer.input)):
            if here.blocks != there.blocks:
                raise ValueError(
                    f"the Kronecker factors of {name!r} were made with different block=: make both "
                    "with the same."
                )
            sides.append(merged_side(here, there, decay, energy, repr(name)))
        output, input = sides
        scale = decay * _in_bases(self, output, input) + _in_bases(
            newer.to(self.scale.device), output, input
        )
        return Factors(self.layout, output, input, scale.float())


def _in_bases(factors: Factors, output: Side, input: Side) -> Tensor:
    """Return S of a Fisher information in other bases, float64: its mean over each projection."""
    scale = factors.scale.double()
    scale = _carried(scale.mT, factors.input, input).mT
    return _carried(scale, factors.output, output)


def _carried(scale: Tensor, old: Side, new: Side) -> Tensor:
    """Return R S along the first dimension: R_ij = tr(P′_i P_j) / tr P′_i."""
    if new.basis is None or old.basis is None:
        return scale
    turned = (new.basis.double().mT @ old.basis.double()).square()  # [k, r′, r]
    # Of each direction, the share that is in the others' tail.
    new_apart = (new.counts()[:-1] - turned.sum(2).flatten()).clamp_min(0.0)
    old_apart = (old.counts()[:-1] - turned.sum(1).flatten()).clamp_min(0.0)
    body, tail = scale[:-1], scale[-1:]
    kept = (turned @ body.reshape(len(turned), -1, scale.shape[1])).flatten(0, 1)
    kept = kept + new_apart.unsqueeze(1) * tail
    common = (old.rest - new_apart.sum()).clamp_min(0.0)
    rest = (old_apart @ body + common * tail) / new.rest if new.rest else torch.zeros_like(tail)
    return torch.cat([kept, rest.view_as(tail)])


# --- from sums ------------------------------------------------------------------------------------


class Term(NamedTuple):
    """Sums over the rows of one way in which a matrix, or a range of its outputs, is used.

    Attributes:
        inputs: Σ ããᵀ by block, [k, m, m], or its diagonal, [in].
        outputs: Σ bbᵀ, of a loss that is a sum, likewise.
        rows: How many rows are in ``inputs``.
        start: The first of the outputs that it concerns.
        is_map: The rows are inputs of the matrix: its directions are chosen for these. Else, of a
            table that is looked up beside, the term only adds to S.
    """

    inputs: Tensor
    outputs: Tensor
    rows: float
    start: int = 0
    is_map: bool = True


def from_sums(
    layout: Layout,
    terms: Sequence[Term],
    samples: float,
    block: int,
    energy: float,
    name: str,
    max_rank: int | None = None,
) -> Factors:
    """Decompose sums, and take S as the product of the factors' parts: one pass.

    S = Σ_terms rows/samples · diag(Uᵀ E[bbᵀ] U) diag(Aᵀ E[ããᵀ] A)ᵀ, with the mean over the tail's
    directions as the last of both: the gradients of a sample's rows are taken for independent of
    each other, and inputs of gradients.

    Args:
        layout: Of the matrix.
        terms: Its uses, one at least that is a map (or all lookups).
        samples: Number of samples in the sums.
        block: The widest block.
        energy: As for :func:`~cl_optim.importance.kronecker.side.leading`.
        name: Of the matrix's weight, for a sentence.
        max_rank: As for :func:`~cl_optim.importance.kronecker.side.leading`.

    Raises:
        ValueError: There is no term, or no sample; a sum has another size, is not finite, or not
            positive semi-definite; or ``energy`` is out of range.
    """
    check_positive("samples", samples)
    if not terms:
        raise ValueError(f"the Kronecker factors of {name!r} need one use of it, at least.")
    input_name, output_name = (f"the {kind} of {name!r}" for kind in ("inputs", "output gradients"))
    for term in terms:
        check_sums(term.inputs, layout.inputs, input_name)
        _check_range(term, layout.outputs, output_name)
    maps = [term for term in terms if term.is_map] or list(terms)
    rows = sum(term.rows for term in maps) or 1.0
    inputs = [_whole(term.inputs, 0, layout.inputs, block) for term in maps]
    outputs = [_whole(term.outputs, term.start, layout.outputs, block) for term in maps]
    input = leading(_sum(inputs) / rows, layout.inputs, energy, input_name, max_rank)
    output = leading(_sum(outputs) / rows, layout.outputs, energy, output_name, max_rank)
    if len(terms) == 1:  # whose parts are the eigenvalues
        scale = torch.outer(_parts(output), _parts(input)) * (rows / samples)
        return Factors(layout, output, input, scale.float())
    scale = output.values.new_zeros(output.rank + 1, input.rank + 1, dtype=torch.float64)
    for term in terms:
        if term.rows > 0:
            a = _along(term.inputs, 0, input, block, input_name)
            b = _along(term.outputs, term.start, output, block, output_name)
            scale += torch.outer(b, a) / (term.rows * samples)
    return Factors(layout, output, input, scale.float())


def _check_range(term: Term, size: int, name: str) -> None:
    """Raise ValueError where a term's outputs are not those of a range of the matrix's."""
    sums, length = term.outputs, size - term.start
    if sums.dim() == 3:  # whose last block may be filled up with zeros
        length = min(sums.shape[:2].numel(), length)
    elif sums.dim() == 1:
        length = len(sums)
    if not 0 <= term.start <= size - length:
        raise ValueError(
            f"the Kronecker factor of {name} must be that of at most {size - term.start} "
            f"coordinates from {term.start} on, not {list(sums.shape)}."
        )
    check_sums(sums, length, name)


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    first, *others = tensors
    return sum(others, start=first)


def _whole(sums: Tensor, start: int, size: int, block: int) -> Tensor:
    """Return a range's sums as those of the whole side, by its blocks."""
    if sums.dim() == 1:
        whole = sums.new_zeros(size)
        whole[start : start + len(sums)] = sums
        return whole
    blocks, width = partition(size, block)
    if start == 0 and sums.shape == (blocks, width, width):
        return sums
    whole = sums.new_zeros(blocks, width, width)
    for number, one in enumerate(sums):
        first = low = start + number * len(one)
        while low < min(first + len(one), size):
            at = low // width
            high = min(first + len(one), size, (at + 1) * width)
            here, there = (
                slice(low - at * width, high - at * width),
                slice(low - first, high - first),
            )
            whole[at, here, here] = one[there, there]
            low = high
    return whole


def _parts(side: Side) -> Tensor:
    """Return a factor's eigenvalues, the tail's last, float64 [rank + 1]."""
    tail = side.values.new_tensor([side.tail], dtype=torch.float64)
    return torch.cat([side.values.double(), tail])


def _along(sums: Tensor, start: int, side: Side, block: int, name: str) -> Tensor:
    """Return diag(Uᵀ Σ xxᵀ U), and the mean over the tail's directions, float64 [rank + 1]."""
    whole = _whole(sums, start, side.size, block).double()
    diagonal = whole if whole.dim() == 1 else whole.diagonal(dim1=1, dim2=2).flatten()
    if side.basis is None:
        along = diagonal[: side.size]
    elif whole.dim() == 1:
        blocks, width = side.basis.shape[:2]
        padded = torch.nn.functional.pad(whole, (0, blocks * width - side.size))
        along = (side.basis.double().square() * padded.view(blocks, width, 1)).sum(1).flatten()
    else:
        basis = side.basis.double()
        along = (basis * (whole @ basis)).sum(1).flatten()
    rest = (diagonal.sum() - along.sum()) / side.rest if side.rest else diagonal.new_zeros(())
    along = torch.cat([along, rest.view(1)])
    low, high = (bound.item() for bound in along.aminmax())  # NaN shows in both
    if not (low >= -1e-6 * float(diagonal.abs().sum()) and high < math.inf):
        raise ValueError(
            f"the Kronecker factor of {name} must be finite and positive semi-definite."
        )
    return along.clamp_min(0.0)
