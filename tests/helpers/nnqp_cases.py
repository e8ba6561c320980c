"""Problems for the quadratic-program solver, well and ill behaved, and how to judge a solution."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from cl_optim.ops import nnqp

KINDS = (
    "independent",
    "independent",
    "conflicting",
    "non-negative",
    "independent",
    "cosine 0.99",
    "duplicates",
    "zero rows",
    "negated",
    "low rank",
    "integers",
    "scales 1e±20",
    "nearly dependent",
)


def rows_and_gradient(kind: str, t: int, p: int) -> tuple[Tensor, Tensor]:
    """G [t, p] and g [p], float64."""
    rows = torch.randn(t, p, dtype=torch.float64)
    grad = torch.randn(p, dtype=torch.float64)
    if kind == "conflicting":
        grad = grad - 2 * rows.mean(0)
    elif kind == "non-negative":
        rows, grad = rows.abs(), -grad.abs()
    elif kind == "cosine 0.99":
        common = torch.randn(p, dtype=torch.float64) * 10
        rows, grad = rows + common, grad - common
    elif kind == "duplicates":
        rows = rows[torch.randint(t, (t,))]
    elif kind == "zero rows":
        rows[torch.rand(t) < 0.3] = 0
    elif kind == "negated":
        rows[t // 2 :] = -rows[: t - t // 2]
    elif kind == "low rank":
        rows = torch.randn(t, 2, dtype=torch.float64) @ torch.randn(2, p, dtype=torch.float64)
    elif kind == "integers":
        rows = torch.randint(-1, 2, (t, p)).double()
        grad = torch.randint(-1, 2, (p,)).double()
    elif kind == "scales 1e±20":
        rows = rows * 10 ** torch.linspace(-20, 20, t, dtype=torch.float64)[:, None]
    elif kind == "nearly dependent":
        rows[1:] = rows[0] + 1e-7 * rows[1:]
    return rows, grad


def random_cases(count: int, most_rows: int, *, seed: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Kind, G and g of problems with up to ``most_rows`` rows, more than dimensions at times."""
    torch.manual_seed(seed)
    for number in range(count):
        t, p = (int(torch.randint(1, most, (1,))) for most in (most_rows + 1, most_rows + 8))
        kind = KINDS[number % len(KINDS)]
        yield kind, *rows_and_gradient(kind, t, p)


def gram_error(rows: Tensor) -> float:
    """Of float64 products of these rows."""
    return 4 * nnqp.EPSILON * rows.shape[1] ** 0.5


def violation(rows: Tensor, grad: Tensor, solution: nnqp.Solution, lower: float) -> float:
    """How far a single problem's certificate is exceeded, in units of what is allowed; ≤ 1 is met.

    Whatever `nnqp.Status` promises of v and w, found from G and g anew.
    """
    v, status = solution.v[0], int(solution.status[0])
    if status not in (nnqp.Status.SOLVED, nnqp.Status.DEPENDENT) or (v < lower).any():
        return float("inf")
    gram, linear = rows @ rows.T, rows @ grad
    w = gram @ v + linear
    allowed = nnqp.tolerance(gram_error(rows)) * (linear.abs() + gram.abs() @ v)
    if status == nnqp.Status.DEPENDENT:
        norms = rows.norm(dim=1).clamp(min=1e-300)
        unit = rows / norms[:, None]
        active = v > lower
        coefficients = torch.linalg.lstsq(unit[active].T, unit.T, driver="gelsd", rcond=1e-15)
        of_active = coefficients.solution.abs().T @ (allowed / norms)[active]
        length = (grad + rows.T @ v).norm()
        dependent = nnqp.threshold(len(v), gram_error(rows)) ** 0.5 * length
        allowed = allowed + norms * (dependent + of_active)
    excess = torch.where(w < 0, -w / allowed.clamp(min=1e-300), 0.0)
    return float(excess.max()) if len(w) else 0.0


def by_brute_force(rows: Tensor, grad: Tensor, lower: float) -> Tensor:
    """The projection g̃ by trying every set of active rows: the dual's least value decides."""
    t = len(rows)
    norms = rows.norm(dim=1)
    rows, norms = rows[norms > 0], norms[norms > 0]
    t = len(rows)
    shifted = grad + lower * rows.sum(0)
    unit = rows / norms[:, None]
    best, projection = torch.inf, shifted
    for count in range(min(t, rows.shape[1]) + 1):
        sets = torch.tensor(list(itertools.combinations(range(t), count)), dtype=torch.long)
        chosen = unit[sets] if count else unit.new_zeros(1, 0, unit.shape[1])
        x = torch.linalg.pinv(chosen.mT, rtol=1e-13) @ -shifted[:, None]
        candidates = shifted + (chosen.mT @ x)[..., 0]
        feasible = (x[..., 0] >= -1e-12).all(-1)
        # Of all non-negative x, the solution's candidate is the shortest.
        lengths = torch.where(feasible, candidates.norm(dim=-1), torch.inf)
        index = int(lengths.argmin())
        if lengths[index] < best:
            best, projection = float(lengths[index]), candidates[index]
    return projection
