"""The arithmetic of the pull against the whole matrix, in float64."""

from __future__ import annotations

import pytest
import torch
from kronecker_cases import dense
from kronecker_training import factors_of

from cl_optim.importance.kronecker.factors import Factors, Layout
from cl_optim.optim.kronecker import shrink

F64 = torch.float64
# Outputs and inputs: by block or diagonal, the share that is kept, the widest block.
CASES = {
    "all kept": ("bb", 1.0, 2048),
    "both have a tail": ("bb", 0.8, 2048),
    "diagonal inputs": ("bd", 0.8, 2048),
    "diagonal outputs": ("db", 0.8, 2048),
    "diagonal": ("dd", 1.0, 2048),
    "blocks": ("bb", 1.0, 3),
    "blocks with a tail": ("bb", 0.7, 3),
}
SIZES = [(4, 7), (7, 4)]


def made(case: str, size: tuple[int, int], count: int = 2) -> tuple[list[Factors], shrink.Bases]:
    kinds, energy, block = CASES[case]
    found = [factors_of(Layout(size), seed, energy, block, kinds) for seed in range(30)]
    # Of one rank, as a stack has them.
    same = [one for one in found if one.scale.shape == found[0].scale.shape][:count]
    assert len(same) == count

    def stacked(which: str) -> torch.Tensor | None:
        bases = [getattr(one, which).basis for one in same]
        return None if bases[0] is None else torch.stack(bases).double()

    rest = [any(getattr(one, which).rest for one in same) for which in ("output", "input")]
    return same, shrink.Bases(stacked("output"), stacked("input"), *rest)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_correction_and_penalty(case, size):
    factors, bases = made(case, size)
    assert any(bases[2:]) == ("tail" in case or case in ("diagonal inputs", "diagonal outputs"))
    scale = torch.stack([one.scale for one in factors])
    delta = torch.randn(2, *size, dtype=F64)
    pulls = torch.tensor([0.3, 7.0], dtype=F64)
    moved = delta.clone()  # which the correction overwrites
    at = shrink.coordinates(moved, bases)
    penalties = shrink.penalty(delta, at, scale)
    found = shrink.correction(moved, at, shrink.shares(scale, pulls), bases)
    for index, one in enumerate(factors):
        fisher, vector = dense(one), delta[index].flatten()
        eye = torch.eye(len(fisher), dtype=F64)
        kept = torch.linalg.solve(eye + pulls[index] * fisher, vector)
        torch.testing.assert_close(found[index].flatten(), vector - kept, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(penalties[index], vector @ fisher @ vector, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_due(case):
    factors, bases = made(case, (4, 7))
    scale = torch.stack([one.scale for one in factors])
    delta = torch.randn(2, 4, 7, dtype=F64)
    at = shrink.coordinates(delta, bases)
    share = shrink.shares(scale, torch.zeros(2, dtype=F64))
    assert not shrink.correction(delta, at, share, bases).any()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_shares_of_any_pull(dtype):
    largest = torch.finfo(dtype).max
    scale = torch.tensor([0.0, 1e-30, 1.0, torch.finfo(torch.float32).max]).view(1, 2, 2)
    for pull in (0.0, 1e-30, 1.0, largest):
        share = shrink.shares(scale, torch.tensor([pull], dtype=dtype))
        assert share.dtype == dtype
        # In whole numbers nothing overflows.
        from fractions import Fraction

        for found, s in zip(share.flatten().tolist(), scale.flatten().tolist(), strict=True):
            c = Fraction(float(torch.tensor(pull, dtype=dtype))) * Fraction(s)
            assert found == pytest.approx(float(c / (1 + c)), rel=1e-6, abs=1e-37)
    assert shrink.shares(scale, torch.tensor([largest], dtype=dtype))[0, 1, 1] == 1.0


def test_a_lost_number_shows():
    assert shrink.shares(torch.full((1, 2, 2), torch.nan), torch.ones(1)).isnan().all()
