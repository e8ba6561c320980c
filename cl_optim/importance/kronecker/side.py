"""One side of a matrix: the leading directions of Σ xxᵀ, and how much of it each holds."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# The widest block: what an eigendecomposition in float64 takes seconds for, in 32 MiB.
BLOCK = 2048

# The share of the trace that a side's directions hold. What is beyond them has its mean importance:
# a tenth of all directions, say, protects as well as all of them, and a step costs accordingly.
ENERGY = 0.99

# The most directions of a block that are kept: where a spectrum is flat, more of them cost a step
# much and protect no better.
MAX_RANK = 64

_MORE = 32  # directions beyond those wanted, which make the last of these converge
_POWER = 4  # times that they are multiplied with the matrix


@dataclass(frozen=True)
class Side:
    """Orthonormal directions in blocks of coordinates, and one value for all that is beside them.

    Σ xxᵀ ≈ U diag(values) Uᵀ + tail·(I − UUᵀ). A side of n coordinates is cut into k blocks of
    m = ⌈n/k⌉; the last one may have fewer than m, and zeros in place of the others. Each block has
    r directions, the leading ones first; columns of zeros fill up blocks that need fewer. The rank
    is k·r, or n where there is no basis and each coordinate is a direction. What has a value for
    each direction may have one more, in the end: that of the tail's directions.

    Attributes:
        size: n.
        values: E[(uᵀx)²] of each direction u, [rank], ≥ 0.
        basis: [k, m, r]; None: each coordinate is a direction.
        tail: The mean of E[(uᵀx)²] over directions that are not kept; 0 where all are.
        kept: The number of directions, those of zeros not included.
    """

    size: int
    values: Tensor
    basis: Tensor | None
    tail: float
    kept: int

    @property
    def rank(self) -> int:
        """Number of directions, those of zeros included."""
        return len(self.values)

    @property
    def rest(self) -> int:
        """Number of directions that are in the tail."""
        return self.size - self.kept

    @property
    def blocks(self) -> int:
        """Number of blocks that correlations are known within; 0 where none are known."""
        return 0 if self.basis is None else len(self.basis)

    def coordinates(self, x: Tensor) -> Tensor:
        """Return Uᵀx of the vectors along the last dimension: [..., n] → [..., rank]."""
        return x if self.basis is None else coordinates(x, self.basis)

    def vectors(self, z: Tensor) -> Tensor:
        """Return Uz of the coordinates along the last dimension: [..., rank] → [..., n]."""
        return z if self.basis is None else vectors(z, self.basis, self.size)

    def spread(self, values: Tensor) -> Tensor:
        """Return what directions' values are for coordinates: [..., rank + 1] → [..., n].

        A coordinate's is the mean over all directions, the tail's, too, by their squares there.
        """
        if self.basis is None:
            return values[..., :-1]
        squares = self.basis.square()
        rest = (1.0 - squares.sum(2).flatten()[: self.size]).clamp_min(0.0)
        return vectors(values[..., :-1], squares, self.size) + values[..., -1:] * rest

    def gathered(self, values: Tensor) -> Tensor:
        """Return by whose squares :meth:`spread` weights, its transpose: [n] → [rank + 1]."""
        if self.basis is None:
            return torch.cat([values, values.new_zeros(1)])
        squares = self.basis.square()
        rest = (1.0 - squares.sum(2).flatten()[: self.size]).clamp_min(0.0)
        return torch.cat([coordinates(values, squares), (values @ rest).view(1)])

    def counts(self) -> Tensor:
        """Return how many directions each value is of, float64 [rank + 1]: 1, 0 of zeros; rest."""
        ones = torch.ones_like(self.values, dtype=torch.float64)
        if self.basis is not None:
            ones = (self.basis != 0).any(1).flatten().double()
        return torch.cat([ones, ones.new_full((1,), self.rest)])

    def matrix(self) -> Tensor:
        """Return E[xxᵀ] by block, [k, m, m]; [n] where there is no basis. float64."""
        values = self.values.double()
        if self.basis is None:
            return values
        basis = self.basis.double()
        blocks, width, _ = basis.shape
        found = (basis * (values - self.tail).view(blocks, 1, -1)) @ basis.mT
        inside = torch.arange(blocks * width, device=values.device) < self.size
        found.diagonal(dim1=1, dim2=2).add_(self.tail * inside.view(blocks, width))
        return found

    def times(self, factor: float) -> Side:
        """Return that of so many times as large squares."""
        return replace(self, values=times(self.values, factor), tail=self.tail * factor)

    def effective_rank(self) -> float:
        """Return exp(entropy) of the values' shares: how many directions matter; 0 if all are 0.

        Those in the tail have equal shares.

        References:
            Roy & Vetterli 2007, The effective rank: a measure of effective dimensionality.
        """
        values = self.values.double()
        total = float(values.sum()) + self.rest * self.tail
        if total == 0.0:
            return 0.0
        shares = values[values > 0] / total
        entropy = float((-shares * shares.log()).sum())
        if self.rest and self.tail > 0.0:
            entropy -= self.rest * self.tail / total * math.log(self.tail / total)
        return math.exp(entropy)

    def to(self, device: torch.device | str) -> Side:
        """Return it on ``device``."""
        basis = None if self.basis is None else self.basis.to(device)
        return replace(self, values=self.values.to(device), basis=basis)


def times(values: Tensor, factor: float) -> Tensor:
    """Return the product, in float64 on its way: float32 may not hold the factor."""
    return (values.double() * factor).to(values.dtype)


def coordinates(x: Tensor, basis: Tensor) -> Tensor:
    """Return Uᵀx for a basis [k, m, r]: [..., n] → [..., k·r]."""
    blocks, width, _ = basis.shape
    if blocks == 1:
        return x @ basis[0]
    padded = torch.nn.functional.pad(x, (0, blocks * width - x.shape[-1]))
    parts = padded.reshape(*x.shape[:-1], blocks, width).movedim(-2, 0)
    return torch.stack([part @ one for part, one in zip(parts, basis, strict=True)], -2).flatten(-2)


def vectors(z: Tensor, basis: Tensor, size: int) -> Tensor:
    """Return Uz for a basis [k, m, r]: [..., k·r] → [..., n]."""
    blocks, _, rank = basis.shape
    if blocks == 1:
        return z @ basis[0].mT
    parts = z.reshape(*z.shape[:-1], blocks, rank).movedim(-2, 0)
    whole = torch.stack([part @ one.mT for part, one in zip(parts, basis, strict=True)], -2)
    return whole.flatten(-2)[..., :size]


def partition(size: int, block: int) -> tuple[int, int]:
    """Return into how many blocks a side is cut so that none is wider than ``block``, and of what.

    Returns:
        k and m.
    """
    blocks = max(1, -(-size // max(1, block)))
    return blocks, -(-size // blocks)


def check_sums(sums: Tensor, size: int, name: str) -> None:
    """Raise ValueError where Σ xxᵀ is neither by block, [k, m, m], nor a diagonal, [n]."""
    if sums.dim() == 1:
        fits = len(sums) == size
    else:
        fits = sums.dim() == 3 and sums.shape[1] == sums.shape[2]
        fits = fits and len(sums) > 0 and partition(size, sums.shape[1]) == tuple(sums.shape[:2])
    if not fits:
        raise ValueError(
            f"the Kronecker factor of {name} must be that of {size} coordinates, by block or its "
            f"diagonal, not {list(sums.shape)}."
        )


def orthonormal(basis: Tensor) -> Tensor:
    """Return the orthonormal basis nearest to one that is off by its dtype's rounding, float32.

    By Newton-Schulz steps, which square the error; columns and rows of zeros stay zeros.
    """
    found = basis.double()
    for _ in range(4):
        found = found @ (1.5 * torch.eye(found.shape[-1]).to(found) - 0.5 * found.mT @ found)
    return found.float()


def leading(
    matrix: Tensor, size: int, energy: float, name: str, max_rank: int | None = None
) -> Side:
    """Find the directions that hold a share of a matrix's trace; the others are the tail.

    Args:
        matrix: E[xxᵀ] by block, [k, m, m], or its diagonal, [n].
        size: n.
        energy: The share, in (0, 1]; of each block as much as of the whole.
        name: Of what it is a side, for a sentence.
        max_rank: The most directions of a block; where that is a small part of them, they are found
            by subspace iteration, the last of them not to rounding.

    Raises:
        ValueError: It has another size, is not finite, or not positive semi-definite; or ``energy``
            is out of range.
    """
    if not 0.0 < energy <= 1.0:
        raise ValueError(f"energy must be in (0, 1], not {energy}.")
    check_sums(matrix, size, name)
    matrix = matrix.double()
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(f"the Kronecker factor of {name} must be finite.")
    if matrix.dim() == 1:
        if bool((matrix < 0).any()):
            raise ValueError(f"the Kronecker factor of {name} must be positive semi-definite.")
        return Side(size, matrix.float(), None, 0.0, size)
    matrix = (matrix + matrix.mT) / 2
    few = max_rank is not None and 4 * (max_rank + _MORE) <= matrix.shape[1]
    values, basis = _subspace(matrix, max_rank) if few and max_rank else _eigh(matrix)
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    if values.numel():
        lowest = min(float(values.min()), float(diagonal.min()))
        if lowest < -1e-6 * max(float(values.max()), 0.0):
            raise ValueError(
                f"the Kronecker factor of {name} must be positive semi-definite: it has an "
                f"eigenvalue of {lowest:.3g} or less beside one of {float(values.max()):.3g}."
            )
    # What is below float64's rounding is 0: its directions would be anything, beyond n as well.
    noise = values[:, :1] * matrix.shape[1] * torch.finfo(values.dtype).eps
    values = torch.where(values > noise, values, 0.0)
    total = diagonal.sum(-1) if few else values.sum(-1)
    return _cut(size, values, basis, values > 0, total, energy, max_rank)


def merged_side(
    older: Side, newer: Side, decay: float, energy: float, name: str, *, capped: bool = True
) -> Side:
    """Return the side of ``decay`` × one factor + another.

    Args:
        older: The one that decays; with as many blocks as the other.
        newer: The other.
        decay: What remains of the older one.
        energy: As for :func:`leading`.
        name: As for :func:`leading`.
        capped: Keep at most ``MAX_RANK`` directions of a block, or as many as one of the two has.
    """
    device = older.values.device
    if older.basis is None or newer.basis is None:
        sum_ = decay * older.matrix() + newer.matrix().to(device)
        return leading(sum_, older.size, energy, name)
    blocks, width, rank = older.basis.shape
    ranks = (rank, newer.basis.shape[2])
    max_rank = max(MAX_RANK, *ranks) if capped else None
    if sum(ranks) >= width:
        sum_ = decay * older.matrix() + newer.matrix().to(device)
        return leading(sum_, older.size, energy, name, max_rank)
    # Beyond the directions of the two, which few span, the sum is what both tails are.
    tail = decay * older.tail + newer.tail
    sides = ((decay, older), (1.0, newer))
    bases = [side.basis.to(device).double() for _, side in sides if side.basis is not None]
    span, _ = torch.linalg.qr(torch.cat(bases, 2))
    inner = span.new_zeros(blocks, sum(ranks), sum(ranks))
    for (factor, side), basis in zip(sides, bases, strict=True):
        turned = span.mT @ basis
        above = factor * (side.values.to(device).double() - side.tail)
        inner += (turned * above.view(blocks, 1, -1)) @ turned.mT
    values, directions = torch.linalg.eigh(inner)
    values, basis = values.flip(-1) + tail, span @ directions.flip(-1)
    first = torch.arange(blocks, device=device) * width
    sizes = (older.size - first).clamp(0, width)
    total = (values - tail).sum(-1) + tail * sizes
    return _cut(older.size, values, basis, values > tail * (1 + 1e-9), total, energy, max_rank)


def _cut(
    size: int,
    values: Tensor,
    basis: Tensor,
    wanted: Tensor,
    total: Tensor,
    energy: float,
    max_rank: int | None,
) -> Side:
    """Keep the directions of each block whose share of its trace is needed.

    Args:
        size: The side's.
        values: The largest first, float64 [k, w].
        basis: Their directions, [k, m, w].
        wanted: Which of them are worth having, [k, w].
        total: The blocks' traces, [k].
        energy: The share.
        max_rank: The most of a block.
    """
    needed = (values.cumsum(-1) - values < energy * total.unsqueeze(1)) & wanted
    if max_rank is not None:
        needed[:, max_rank:] = False
    rank = max(1, int(needed.sum(-1).max()))  # the widest block decides
    needed = needed[:, :rank]
    held = values[:, :rank] * needed
    kept = int(needed.sum())
    tail = float(total.sum() - held.sum()) / max(size - kept, 1)
    return Side(
        size,
        held.flatten().float(),
        (basis[:, :, :rank] * needed.unsqueeze(1)).float().contiguous(),
        max(tail, 0.0) if kept < size else 0.0,
        kept,
    )


def _subspace(matrices: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the leading eigenvalues of [k, m, m] and directions [k, m, count]: orthonormal."""
    generator = torch.Generator(matrices.device).manual_seed(0)
    basis = torch.randn(
        *matrices.shape[:2],
        count + _MORE,
        dtype=matrices.dtype,
        device=matrices.device,
        generator=generator,
    )
    for _ in range(_POWER):
        basis, _ = torch.linalg.qr(matrices @ basis)
    values, directions = torch.linalg.eigh(basis.mT @ (matrices @ basis))
    return values.flip(-1)[:, :count], (basis @ directions.flip(-1))[:, :, :count]


def _eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, the largest first, and eigenvectors of symmetric [k, m, m]."""
    values = matrices.new_zeros(matrices.shape[:2])
    bases = torch.zeros_like(matrices)
    for matrix, value, basis in zip(matrices, values, bases, strict=True):
        # Without what is 0, such as dead units: LAPACK may not converge beside so many zeros.
        used = matrix.any(1).nonzero().squeeze(1)
        size = len(used)
        inner = matrix[used][:, used]
        try:
            found, directions = torch.linalg.eigh(inner)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            # Of the other triangle it does.
            found, directions = torch.linalg.eigh(inner, UPLO="U")
        value[:size] = found.flip(0)
        basis[used, :size] = directions.flip(1)
    return values, bases
