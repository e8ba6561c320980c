r"""Small convex quadratic programs with a lower bound, batched: the dual problem of GEM.

    minimise ½ vᵀQv + cᵀv   subject to   v ≥ lower

with a symmetric positive semidefinite, possibly singular Q = GGᵀ and c = Gg. With the solution v,
g + Gᵀv is the vector nearest to g + lower·ΣG_k that has no negative product with a row of G
(Lopez-Paz & Ranzato 2017, arXiv:1706.08840, eq. 11).

:func:`nnqp_reference` solves one problem after the other by Lawson & Hanson's active-set method
(1974, chapter 23), with a new Cholesky factor for every set. Rows that depend on the active ones
are blocked, so that Q needs no regularisation. :func:`nnqp_compiled` is the operator
``torch.ops.cl_optim.nnqp`` (``csrc/nnqp.h``): the same for a batch at once, on the device.
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from cl_optim.ops import library

EPSILON = 2.0**-53
MAX_SIZE = 1024

library.define(
    "nnqp(Tensor gram, Tensor linear, Tensor(a!)? state, *, float lower, float tolerance, "
    "float threshold, bool only_violated, int max_pivots) -> (Tensor v, Tensor status, Tensor gap)",
    cpu="compiled",
    cuda="compiled",
)


@library.fake("nnqp")
def _(
    gram: Tensor, linear: Tensor, state: Tensor | None, **options: object
) -> tuple[Tensor, Tensor, Tensor]:
    v = torch.empty_like(linear)
    return v, v.new_empty(len(v), dtype=torch.int8), v.new_empty(len(v))


class Status(IntEnum):
    """What became of a problem. Negative: there is no solution, and v must not be used."""

    SOLVED = 0
    """For every k, w = Qv + c is at least −`tolerance`·(|c_k| + Σ_j |Q_kj| v_j)."""
    DEPENDENT = 1
    """Solved, but for rows that depend on the active ones (v > lower) as far as Q can tell. Of
    such a row w may be as low as −√`threshold`·‖G_k‖·‖g̃‖, and further by the rounding above, of
    itself and of the active rows times its coefficients in them."""
    INACTIVE = 2
    """No c_k is negative, and v = 0: nothing to project (``only_violated``)."""
    UNCONVERGED = -1
    """The certificate was not reached, or is not finite: numbers left float64's range."""
    INVALID = -2
    """NaN or Inf in Q or c, a negative square, or a zero row with c_k < 0; v is NaN."""


class Solution(NamedTuple):
    """Solutions of a batch of problems, on the problems' device.

    Attributes:
        v: [B, t] float64, at least ``lower`` exactly.
        status: [B] int8, a :class:`Status` per problem.
        gap: [B] float64: (v − lower)ᵀ(Qv + c). Where w ≥ 0, it bounds the distance from the exact
            projection: ‖g̃ − g̃*‖² ≤ 2·max(gap, 0).
    """

    v: Tensor
    status: Tensor
    gap: Tensor


def threshold(size: int, gram_error: float) -> float:
    """Return the Schur pivot, relative to the row's square, at which a row counts as dependent.

    A smaller pivot is made of rounding: of the elimination, or of the Gram matrix itself.
    """
    return max(64.0 * EPSILON * size, 8.0 * gram_error)


def sum_error(products: int) -> float:
    """Return the relative accuracy of Gram entries that are float64 sums of so many products."""
    return EPSILON * math.sqrt(max(1, products))


def tolerance(gram_error: float) -> float:
    """Return how far w_i may be below 0, relative to |c_i| + Σ_j |Q_ij| v_j."""
    return 8.0 * max(EPSILON, gram_error)


def nnqp(
    gram: Tensor,
    linear: Tensor,
    lower: float = 0.0,
    *,
    gram_error: float = EPSILON,
    only_violated: bool = False,
    state: Tensor | None = None,
) -> Solution:
    """Solve a batch of small quadratic programs: min ½ vᵀQv + cᵀv subject to v ≥ lower.

    Exact: no regularisation, whatever the rank and the scale of Q. In float64, on the problems'
    device, without waiting for it; every problem by itself, whatever the others hold. Runs on the
    compiled kernels where there are some, else on `nnqp_reference`, with one warning that
    says why.

    Args:
        gram: Q [B, t, t], float32 or float64, symmetric positive semidefinite, perhaps singular;
            t ≤ 1024.
        linear: c [B, t], float32 or float64.
        lower: The bound of every v_k, finite and ≥ 0.
        gram_error: Relative accuracy of the entries of Q and c: `sum_error` of P where they are
            float64 sums of P products. What is smaller counts as rounding.
        only_violated: As GEM was published: where no c_k is negative, v = 0 and the status is
            INACTIVE, whatever ``lower`` says.
        state: From `new_state`, for calls with the same Q again and again: each begins where the
            last one ended, and an unchanged set of active rows costs no elimination.

    Returns:
        v [B, t] float64, at least ``lower`` exactly; status [B] int8, a :class:`Status`; gap [B]
        float64, (v − lower)ᵀ(Qv + c). v is unique only where Q is regular; Gᵀv always is.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit, or a number is out of its range.

    References:
        Lopez-Paz & Ranzato 2017, arXiv:1706.08840 (the problem); Goldfarb & Idnani 1983 (the
        method).

    Example:
        >>> import torch
        >>> from cl_optim import functional as F
        >>> memory = torch.tensor([[1.0, 0.0], [1.0, 0.0]])  # twice the same row: Q is singular
        >>> grad = torch.tensor([-1.0, 1.0])
        >>> v, status, gap = F.nnqp((memory @ memory.T)[None], (memory @ grad)[None])
        >>> grad.double() + v[0] @ memory.double()
        tensor([0., 1.], dtype=torch.float64)
    """
    warning = "Quadratic programs run on their slower reference: {}"
    if library.choose("nnqp", gram.device, warning) == "reference":
        return nnqp_reference(
            gram, linear, lower, gram_error=gram_error, only_violated=only_violated
        )
    return nnqp_compiled(
        gram, linear, lower, gram_error=gram_error, only_violated=only_violated, state=state
    )


@torch.no_grad()
def nnqp_compiled(
    gram: Tensor,
    linear: Tensor,
    lower: float = 0.0,
    *,
    gram_error: float = EPSILON,
    only_violated: bool = False,
    state: Tensor | None = None,
    max_pivots: int = 0,
) -> Solution:
    """Solve a batch of problems on its device, without waiting for it. Arguments as `nnqp`.

    ``max_pivots`` is how many eliminations there are before the method begins again from another
    guess (ADMM); 0 for a number that has always been enough.
    """
    check(gram, linear, lower, gram_error, state)
    solved = torch.ops.cl_optim.nnqp(
        gram.double().contiguous(),
        linear.double().contiguous(),
        state,
        lower=lower,
        tolerance=tolerance(gram_error),
        threshold=threshold(gram.shape[1], gram_error),
        only_violated=only_violated,
        max_pivots=max_pivots,
    )
    return Solution(*solved)


def new_state(problems: int, size: int, device: torch.device | str = "cpu") -> Tensor:
    """Return what is kept for B problems with t rows, [B, t, t + 1] float64; nothing is known yet.

    Set it to zero (``state.zero_()``) when Q changes.
    """
    return torch.zeros(problems, size, size + 1, dtype=torch.float64, device=device)


def check(
    gram: Tensor, linear: Tensor, lower: float, gram_error: float, state: Tensor | None = None
) -> None:
    """Refuse what is not a batch of problems.

    Raises:
        ValueError: Naming the argument and what it should be.
    """
    if gram.dim() != 3 or gram.shape[1] != gram.shape[2]:
        raise ValueError(f"gram must be [B, t, t], not {list(gram.shape)}.")
    if linear.shape != gram.shape[:2]:
        raise ValueError(f"linear must be {list(gram.shape[:2])}, not {list(linear.shape)}.")
    if gram.shape[1] > MAX_SIZE:
        raise ValueError(f"gram may have {MAX_SIZE} rows at most, not {gram.shape[1]}.")
    for name, tensor in (("gram", gram), ("linear", linear)):
        if tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} must be float32 or float64, not {tensor.dtype}.")
        if tensor.layout is not torch.strided:
            raise ValueError(f"{name} must be a dense tensor, not {tensor.layout}.")
    if gram.device != linear.device:
        raise ValueError(f"linear is on {linear.device}, but gram is on {gram.device}.")
    if not 0.0 <= lower < math.inf:
        raise ValueError(f"lower must be finite and at least 0, not {lower}.")
    if not 0.0 <= gram_error < 1.0:
        raise ValueError(f"gram_error must be in [0, 1), not {gram_error}.")
    shape = (*gram.shape[:2], gram.shape[1] + 1)
    if state is not None and (
        state.shape != shape
        or state.dtype != torch.float64
        or state.device != gram.device
        or not state.is_contiguous()
        or state.is_neg()
    ):
        raise ValueError(
            "state must be contiguous float64 [B, t, t + 1] beside gram, as new_state() makes it: "
            f"{list(shape)} on {gram.device}, not {state.dtype} {list(state.shape)} on "
            f"{state.device}."
        )


@torch.no_grad()
def nnqp_reference(
    gram: Tensor,
    linear: Tensor,
    lower: float = 0.0,
    *,
    gram_error: float = EPSILON,
    only_violated: bool = False,
) -> Solution:
    """Solve a batch of problems, one after the other, in float64 on the host: as `nnqp`."""
    check(gram, linear, lower, gram_error)
    problems = zip(gram.double().cpu(), linear.double().cpu(), strict=True)
    solved = [_solve(q, c, lower, gram_error, only_violated) for q, c in problems]
    v = torch.stack([s[0] for s in solved]) if solved else linear.new_zeros(linear.shape)
    status = torch.tensor([s[1] for s in solved], dtype=torch.int8, device="cpu")
    gap = torch.tensor([s[2] for s in solved], dtype=torch.float64, device="cpu")
    return Solution(v.double().to(gram.device), status.to(gram.device), gap.to(gram.device))


def _solve(
    q: Tensor, c: Tensor, lower: float, gram_error: float, only_violated: bool
) -> tuple[Tensor, Status, float]:
    size = len(c)
    if not (q.isfinite().all() and c.isfinite().all()):
        return torch.full_like(c, math.nan), Status.INVALID, math.nan
    if only_violated and not (c < 0).any():
        return torch.zeros_like(c), Status.INACTIVE, 0.0
    diagonal = q.diagonal()
    if ((diagonal < 0) | ((diagonal == 0) & (c < 0))).any():
        return torch.full_like(c, math.nan), Status.INVALID, math.nan
    # Powers of two make the rows' norms alike without rounding anything.
    scale = torch.where(diagonal > 0, torch.exp2(-torch.log2(diagonal.sqrt()).round()), 1.0)
    q = scale[:, None] * q * scale
    shift = lower / scale  # x = v / scale − shift ≥ 0
    c = scale * c
    c_shifted = c + q @ shift
    x, dependent = torch.zeros_like(c), False
    active, blocked = torch.zeros(2, size, dtype=torch.bool, device="cpu")
    status = Status.UNCONVERGED
    for _ in range(10 * size + 10):
        w = c_shifted + q @ x
        slack = tolerance(gram_error) * (c.abs() + q.abs() @ (x + shift))
        violation = torch.where(active | blocked | (w >= -slack), 0.0, w.square() / q.diagonal())
        dependent = bool((blocked & (w < -slack)).any())
        if not violation.any():
            status = Status.DEPENDENT if dependent else Status.SOLVED
            break
        entering = int(violation.argmax())
        if _pivot(q, active, entering) <= threshold(size, gram_error) * q[entering, entering]:
            blocked[entering] = True
            continue
        active[entering] = True
        while True:
            solution = _on_support(q, c_shifted, active)
            if not solution.isfinite().all():
                return torch.full_like(c, math.nan), Status.UNCONVERGED, math.nan
            if (solution[active] > 0).all():
                break
            # Go as far as the bound allows, and leave the set there.
            falling = active & (solution <= 0)
            ratio = torch.where(falling, x / (x - solution), math.inf)
            leaving = int(ratio.argmin())
            x += ratio[leaving] * (solution - x)
            active[leaving] = False
            x = torch.where(active, x, 0.0)
        x = solution
        blocked[:] = False
    w = c_shifted + q @ x
    v, gap = lower + scale * x, x @ w
    if not all(certified.isfinite().all() for certified in (v, slack, gap)):
        status = Status.UNCONVERGED
    return v, status, float(gap)


def _pivot(q: Tensor, active: Tensor, row: int) -> float:
    """Return the square of the row's part that does not depend on the active rows."""
    if not active.any():
        return float(q[row, row])
    factor = torch.linalg.cholesky(q[active][:, active])
    part = torch.linalg.solve_triangular(factor, q[active][:, [row]], upper=False)
    return float(q[row, row] - part.square().sum())


def _on_support(q: Tensor, c: Tensor, active: Tensor) -> Tensor:
    """Return the minimiser among all x that are 0 outside the active rows, refined once."""
    x = torch.zeros_like(c)
    if not active.any():
        return x
    block = q[active][:, active]
    factor = torch.linalg.cholesky(block)
    x_active = torch.cholesky_solve(-c[active, None], factor)
    residual = -c[active, None] - block @ x_active
    x[active] = (x_active + torch.cholesky_solve(residual, factor))[:, 0]
    return x
