"""What a proximal step takes from matrices whose importance is Kronecker-factored.

F = Σ_jk S_jk (u_j ⊗ a_k)(u_j ⊗ a_k)ᵀ, where S has a last row and column for the directions that are
not kept: all of them alike, whichever basis one takes of them. So no more than the kept directions
U and A is needed, and a step costs 4·out·in·(p + q) multiplications and additions for p and q of
them. Matrices [L, out, in] are computed at once; small ones on the CPU by a compiled kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cl_optim.ops import library

# Weights of a matrix up to which one kernel is faster than products on all cores and their calls.
_SMALL = 2**17

library.define(
    "kronecker_shrink_(Tensor(a!)[] weights, Tensor[] anchors, Tensor(b!)[] biases, "
    "Tensor[] bias_anchors, Tensor output_basis, Tensor input_basis, Tensor scale, Tensor pulls, "
    "bool transposed) -> ()",
    cpu="compiled",
)


class Bases(NamedTuple):
    """The kept directions of L matrices.

    Attributes:
        output: U, [L, k, m, r] in k blocks of m coordinates, p = k·r; None: each coordinate is a
            direction, p = out.
        input: A, likewise.
        output_rest: Whether there are outputs' directions that are not kept.
        input_rest: Likewise of the inputs.
    """

    output: Tensor | None
    input: Tensor | None
    output_rest: bool
    input_rest: bool


class Coordinates(NamedTuple):
    """A drift Δ [L, out, in] in its directions, as far as what is not kept needs it.

    Attributes:
        both: UᵀΔA, [L, p, q].
        output: UᵀΔ, [L, p, in]; None where all inputs' directions are kept.
        input: ΔA, [L, out, q]; None where all outputs' directions are kept.
    """

    both: Tensor
    output: Tensor | None
    input: Tensor | None


def fused_(
    weights: Sequence[Tensor],
    anchors: Sequence[Tensor],
    biases: Sequence[Tensor],
    bias_anchors: Sequence[Tensor],
    bases: Bases,
    scale: Tensor,
    pulls: Tensor | float,
    *,
    transposed: bool,
) -> None:
    """Take a proximal step of small matrices, which `fits` has looked at, by the compiled kernel.

    Args:
        weights: Of L matrices W̃ [out, in]; written.
        anchors: W*.
        biases: Empty, or of each matrix the last column; written.
        bias_anchors: Likewise.
        bases: The directions.
        scale: S, [L, p + 1, q + 1].
        pulls: 2·Σ λ·lr, finite and at least 0: [L], or one for all.
        transposed: The weights are [in, out].
    """
    if isinstance(pulls, float):
        pulls = torch.full((len(weights),), pulls, device="cpu")
    torch.ops.cl_optim.kronecker_shrink_(
        weights, anchors, biases, bias_anchors, *bases[:2], scale, pulls, transposed
    )
    torch.autograd.graph.increment_version([*weights, *biases])


def fits(size: tuple[int, int], bases: Sequence[Tensor | None], params: Sequence[Tensor]) -> bool:
    """Return whether `fused_` computes matrices, and is faster.

    Args:
        size: Outputs and inputs.
        bases: The output and the input basis, in any dtype.
        params: All that it would read and write of parameters and anchors.
    """
    return (
        size[0] * size[1] <= _SMALL
        and all(basis is not None and basis.shape[1] == 1 for basis in bases)
        and all(
            tensor.dtype == torch.float32 and tensor.is_contiguous() and not tensor.is_neg()
            for tensor in params
        )
        and library.choose("kronecker_shrink_", params[0].device) == "cpu"
    )


def coordinates(delta: Tensor, bases: Bases) -> Coordinates:
    """Rotate a drift."""
    output = rows_onto(delta, bases.output) if bases.input_rest else None
    input = columns_onto(delta, bases.input) if bases.output_rest else None
    if output is not None:
        both = columns_onto(output, bases.input)
    elif input is not None:
        both = rows_onto(input, bases.output)
    elif _costs(bases.input, delta.shape[2], delta.shape[1]) <= _costs(
        bases.output, delta.shape[1], delta.shape[2]
    ):
        both = rows_onto(columns_onto(delta, bases.input), bases.output)
    else:
        both = columns_onto(rows_onto(delta, bases.output), bases.input)
    return Coordinates(both, output, input)


def shares(scale: Tensor, pulls: Tensor | float) -> Tensor:
    """Return c/(1 + c) with c = pull·S: what a proximal step takes away along each direction.

    Args:
        scale: S ≥ 0, [L, p + 1, q + 1], finite.
        pulls: 2·Σ λ·lr, finite and at least 0: [L], of the dtype of the result, or one for all.
    """
    c = scale * (pulls if isinstance(pulls, float) else pulls.view(-1, 1, 1))
    c.clamp_(max=torch.finfo(c.dtype).max)  # so that it is 1 where c overflows, too
    return c.div_(c + 1)


def correction(delta: Tensor, at: Coordinates, share: Tensor, bases: Bases) -> Tensor:
    """Return what is to be subtracted from the weights, [L, out, in]; exactly 0 for shares of 0.

    Args:
        delta: The drift; it is overwritten, as are its coordinates.
        at: Its coordinates.
        share: Of each direction, [L, p + 1, q + 1]; 0 for directions that there are none of.
        bases: The directions.
    """
    body, corner = share[:, :-1, :-1], share[:, -1:, -1:]
    of_output, of_input = share[:, :-1, -1:], share[:, -1:, :-1]  # beside the other side's rest
    size = delta.shape[1]
    if at.output is None and at.input is None:
        both = body * at.both
        outputs, inputs = delta.shape[1:]
        p, q = both.shape[1:]
        if outputs * p * q + outputs * q * inputs <= p * q * inputs + outputs * p * inputs:
            return columns_of(rows_of(both, bases.output, size), bases.input, inputs)
        return rows_of(columns_of(both, bases.input, inputs), bases.output, size)
    if at.input is None:
        assert at.output is not None
        both = (body - of_output) * at.both
        inner = at.output.mul_(of_output)
        _add_columns_of(inner, both, bases.input)
        return rows_of(inner, bases.output, size)
    if at.output is None:
        both = (body - of_input) * at.both
        inner = at.input.mul_(of_input)
        _add_rows_of(inner, both, bases.output)
        return columns_of(inner, bases.input, delta.shape[2])
    above_rest = share[:, :-1] - share[:, -1:]  # of_output − corner is its last column
    both = at.both.mul_(above_rest[:, :, :-1] - above_rest[:, :, -1:])
    inner = at.output.mul_(above_rest[:, :, -1:])
    _add_columns_of(inner, both, bases.input)
    delta *= corner
    _add_rows_of(delta, inner, bases.output)
    _add_columns_of(delta, at.input.mul_(of_input - corner), bases.input)
    return delta


def penalty(delta: Tensor, at: Coordinates, scale: Tensor) -> Tensor:
    """Sum S·z² over all directions, kept and not, of each matrix: float64 [L].

    Args:
        delta: The drift.
        at: Its coordinates.
        scale: S.
    """
    scale = scale.double()
    squares = at.both.double().square()
    total = (scale[:, :-1, :-1] * squares).sum((1, 2))
    by_output, by_input = squares.sum(2), squares.sum(1)
    if at.output is not None:
        beside = (_square_sums(at.output, 2) - by_output).clamp_min(0.0)
        total += (scale[:, :-1, -1] * beside).sum(1)
    if at.input is not None:
        beside = (_square_sums(at.input, 1) - by_input).clamp_min(0.0)
        total += (scale[:, -1, :-1] * beside).sum(1)
    if at.output is not None and at.input is not None:
        rest = square_sums(delta) + squares.sum((1, 2))
        rest = rest - _square_sums(at.output, 2).sum(1) - _square_sums(at.input, 1).sum(1)
        total += scale[:, -1, -1] * rest.clamp_min(0.0)
    return total


def square_sums(x: Tensor) -> Tensor:
    """Return ‖x‖² of each matrix, float64 [L]."""
    norms: Tensor = torch.linalg.vector_norm(x, dim=(1, 2), dtype=torch.float64)
    return norms.square()


def _square_sums(x: Tensor, dim: int) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(x, dim=dim, dtype=torch.float64)
    return norms.square()


def _costs(basis: Tensor | None, size: int, others: int) -> int:
    """Return the multiplications of a first rotation and, as its result is smaller, of the next."""
    if basis is None:
        return 0
    rank = basis.shape[1] * basis.shape[3]
    return size * rank * others + rank * others * others


# --- rotations ------------------------------------------------------------------------------------


def rows_onto(x: Tensor, basis: Tensor | None) -> Tensor:
    """Return Uᵀx: [L, n, c] → [L, rank, c]; x where there is no basis."""
    if basis is None:
        return x
    matrices, blocks, width, _ = basis.shape
    if blocks == 1:
        return basis[:, 0].mT @ x
    x = torch.nn.functional.pad(x, (0, 0, 0, blocks * width - x.shape[1]))
    return (basis.mT @ x.reshape(matrices, blocks, width, -1)).flatten(1, 2)


def rows_of(z: Tensor, basis: Tensor | None, size: int) -> Tensor:
    """Return Uz: [L, rank, c] → [L, n, c]; z where there is no basis."""
    if basis is None:
        return z
    matrices, blocks, _, rank = basis.shape
    if blocks == 1:
        return basis[:, 0] @ z
    return (basis @ z.reshape(matrices, blocks, rank, -1)).flatten(1, 2)[:, :size]


def columns_onto(x: Tensor, basis: Tensor | None) -> Tensor:
    """Return xU: [L, r, n] → [L, r, rank]; x where there is no basis."""
    if basis is None:
        return x
    return x @ basis[:, 0] if basis.shape[1] == 1 else rows_onto(x.mT, basis).mT


def columns_of(z: Tensor, basis: Tensor | None, size: int) -> Tensor:
    """Return zUᵀ: [L, r, rank] → [L, r, n]; z where there is no basis."""
    if basis is None:
        return z
    return z @ basis[:, 0].mT if basis.shape[1] == 1 else rows_of(z.mT, basis, size).mT


def _add_rows_of(to: Tensor, z: Tensor, basis: Tensor | None) -> None:
    """Add Uz, or z where there is no basis, to [L, n, c]."""
    if basis is None:
        to += z
        return
    _, blocks, width, rank = basis.shape
    for block in range(blocks):
        here = to[:, block * width : (block + 1) * width]  # the last may be narrower
        of_block = z[:, block * rank : (block + 1) * rank]
        here.baddbmm_(basis[:, block, : here.shape[1]], of_block)


def _add_columns_of(to: Tensor, z: Tensor, basis: Tensor | None) -> None:
    """Add zUᵀ, or z where there is no basis, to [L, r, n]."""
    _add_rows_of(to.mT, z.mT, basis)
