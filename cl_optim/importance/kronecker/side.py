"""One side of a matrix: the leading directions of Σ xxᵀ, and how much of it each holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# The widest block: what an eigendecomposition in float64 takes seconds for, in 32 MiB.
BLOCK = 2048

# The share of the trace that a side's directions hold. Eigenvalues fall steeply: the last 0.01 % of
# the trace takes most of the directions, and with them most of a step's cost.
ENERGY = 0.9999


@dataclass(frozen=True)
class Side:
    """Orthonormal directions in blocks of coordinates, or the coordinates themselves.

    A side of n coordinates is cut into k blocks of m = ⌈n/k⌉; the last one may have fewer than m,
    and zeros in place of the others. Each block has r directions, the leading ones first; columns
    of zeros fill up blocks that need fewer. The rank is k·r, or n where there is no basis.

    Attributes:
        size: n.
        values: E[(uᵀx)²] of each direction u, [rank], ≥ 0.
        basis: [k, m, r]; None: each coordinate is a direction.
    """

    size: int
    values: Tensor
    basis: Tensor | None

    @property
    def rank(self) -> int:
        """Number of directions, those of zeros included."""
        return len(self.values)

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

    def squared(self) -> Side:
        """Return it with its directions' squares in their place, for diagonals: U∘U."""
        return self if self.basis is None else Side(self.size, self.values, self.basis.square())

    def matrix(self) -> Tensor:
        """Return U diag(values) Uᵀ by block, [k, m, m]; [n] where there is no basis. float64."""
        values = self.values.double()
        if self.basis is None:
            return values
        basis = self.basis.double()
        return (basis * values.view(len(basis), 1, -1)) @ basis.mT

    def effective_rank(self) -> float:
        """Return exp(entropy) of the values' shares: how many directions matter; 0 if all are 0.

        References:
            Roy & Vetterli 2007, The effective rank: a measure of effective dimensionality.
        """
        values = self.values.double()
        shares = values[values > 0] / values.sum()
        return float((-shares * shares.log()).sum().exp()) if len(shares) else 0.0

    def to(self, device: torch.device | str) -> Side:
        """Return it on ``device``."""
        basis = None if self.basis is None else self.basis.to(device)
        return Side(self.size, self.values.to(device), basis)


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


def leading(matrix: Tensor, size: int, energy: float, name: str) -> Side:
    """Find the directions that hold a share of a matrix's trace.

    Args:
        matrix: E[xxᵀ] by block, [k, m, m], or its diagonal, [n].
        size: n.
        energy: The share, in (0, 1]; of each block as much as of the whole.
        name: Of what it is a side, for a sentence.

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
        return Side(size, matrix.float(), None)
    values, basis = torch.linalg.eigh((matrix + matrix.mT) / 2)
    values, basis = values.flip(-1), basis.flip(-1)
    if values.numel() and float(values.min()) < -1e-6 * max(float(values.max()), 0.0):
        raise ValueError(
            f"the Kronecker factor of {name} must be positive semi-definite: it has an eigenvalue "
            f"of {float(values.min()):.3g} beside one of {float(values.max()):.3g}."
        )
    # What is below float64's rounding is 0: its directions would be anything, beyond n as well.
    noise = values[:, :1] * values.shape[1] * torch.finfo(values.dtype).eps
    values = torch.where(values > noise, values, 0.0)
    # In each block the directions whose share is needed; the widest block decides the rank.
    held = values.cumsum(-1)
    needed = (held - values < energy * held[:, -1:]) & (values > 0)
    rank = max(1, int(needed.sum(-1).max()))
    kept = needed[:, :rank]
    return Side(
        size,
        (values[:, :rank] * kept).flatten().float(),
        (basis[:, :, :rank] * kept.unsqueeze(1)).float().contiguous(),
    )
