"""The arithmetic of the pull against the whole matrix, in float64; the kernel against that."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from bad_input import Row, each_of, refused
from kronecker_cases import dense
from kronecker_training import factors_of, importance_of, network, protected, train, weights
from torch import Tensor

from cl_optim.importance.kronecker.factors import Factors, Layout
from cl_optim.ops import kronecker_shrink as shrink
from cl_optim.ops import library
from cl_optim.optim.kronecker.stacks import Stack

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


# --- the kernel -----------------------------------------------------------------------------------


class Given(NamedTuple):
    """What the operator takes, and the layout of its matrices."""

    weights: list[Tensor]
    anchors: list[Tensor]
    biases: list[Tensor]
    bias_anchors: list[Tensor]
    bases: shrink.Bases
    scale: Tensor
    pulls: Tensor
    layout: Layout

    def run(self) -> None:
        assert library.available("cpu")  # it loads the kernel
        *tensors, layout = self
        shrink.fused_(*tensors, transposed=layout.transposed)

    def matrices(self) -> Tensor:
        """Return W̃ of now, [L, out, in]."""
        biases = self.biases or [None] * len(self.weights)
        pairs = zip(self.weights, biases, strict=True)
        return torch.stack([self.layout.matrix(weight, bias) for weight, bias in pairs])


def two_matrices(
    size: tuple[int, int] = (9, 7), kept: tuple[int, int] = (4, 3), *, transposed=False, bias=True
) -> Given:
    """Two matrices of random importance, of so many outputs and inputs."""
    torch.manual_seed(0)
    outputs, inputs = size
    bases = [
        torch.stack([torch.linalg.qr(torch.randn(n, rank))[0] for _ in range(2)]).unsqueeze(1)
        for n, rank in zip(size, kept, strict=True)
    ]
    rests = [rank < n for n, rank in zip(size, kept, strict=True)]
    scale = torch.rand(2, kept[0] + 1, kept[1] + 1) * 5
    scale[:, -1] *= rests[0]
    scale[:, :, -1] *= rests[1]
    shape = (inputs - bias, outputs) if transposed else (outputs, inputs - bias)
    layout = Layout(shape, transposed, "bias" if bias else None)
    made = [[torch.randn(shape) for _ in range(2)] for _ in range(2)]
    made += [[torch.randn(outputs) for _ in range(2)] if bias else [] for _ in range(2)]
    pulls = torch.tensor([0.3, 7.0])
    return Given(*made, shrink.Bases(*bases, *rests), scale, pulls, layout)


def test_there_is_a_kernel():
    assert library.choose("kronecker_shrink_", "cpu") == "cpu"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("size", "kept"),
    [
        ((9, 7), (9, 7)),
        ((9, 7), (4, 7)),
        ((9, 7), (9, 3)),
        ((9, 7), (4, 3)),
        ((1, 2), (1, 1)),
        ((200, 67), (17, 10)),
        ((3, 5000), (2, 9)),
    ],
)
def test_the_kernel(size, kept, transposed, bias):
    one = two_matrices(size, kept, transposed=transposed, bias=bias)
    anchors = one._replace(weights=one.anchors, biases=one.bias_anchors).matrices().double()
    before = one.matrices().double()
    versions = [weight._version for weight in one.weights]
    u, a, *rests = one.bases
    bases = shrink.Bases(u.double(), a.double(), *rests)
    delta = before - anchors
    share = shrink.shares(one.scale.double(), one.pulls.double())
    at = shrink.coordinates(delta, bases)
    expected = before - shrink.correction(delta, at, share, bases)
    one.run()
    torch.testing.assert_close(one.matrices().double(), expected, rtol=1e-5, atol=2e-6)
    assert [weight._version for weight in one.weights] > versions


def test_one_pull_for_all():
    one, other = two_matrices(), two_matrices()
    one._replace(pulls=torch.tensor([0.7, 0.7])).run()
    other._replace(pulls=0.7).run()
    assert torch.equal(one.matrices(), other.matrices())


def test_the_kernel_changes_no_bit_where_nothing_is_due():
    one = two_matrices()
    one.weights[0][0, :2] = torch.tensor([0.0, -0.0])
    one.anchors[0][0, :2] = torch.tensor([-0.0, 0.0])
    before = one.matrices().view(torch.int32)
    one._replace(pulls=torch.zeros(2)).run()
    assert torch.equal(one.matrices().view(torch.int32), before)


def test_the_kernel_of_any_pull():
    one = two_matrices()
    one.scale[:] = torch.finfo(torch.float32).max
    one._replace(pulls=torch.full((2,), torch.finfo(torch.float32).max)).run()
    torch.testing.assert_close(torch.stack(one.weights), torch.stack(one.anchors))
    one.scale[0, 0, 0] = torch.nan
    one.run()
    assert one.weights[0].isnan().all()  # a lost number shows
    assert one.weights[1].isfinite().all()


WRONG: list[Row] = [
    ("dtype", lambda g: g._replace(scale=g.scale.double()), RuntimeError, "must be float32 on the"),
    (
        "anchors", lambda g: g._replace(anchors=g.anchors[:1]), RuntimeError,
        "an anchor for each weight",
    ),
    ("biases", lambda g: g._replace(biases=g.biases[:1]), RuntimeError, "for all of them or none"),
    (
        "bases", lambda g: g._replace(bases=g.bases._replace(output=g.bases.output[:1])),
        RuntimeError, r"bases must be contiguous, \[L, 1, out, p\]",
    ),
    ("scale", lambda g: g._replace(scale=g.scale[:, 1:]), RuntimeError, r"\[L, p \+ 1, q \+ 1\]"),
    ("pulls", lambda g: g._replace(pulls=g.pulls[:1]), RuntimeError, "pulls must be contiguous"),
    (
        "weights", lambda g: g._replace(weights=[w[1:] for w in g.weights]), RuntimeError,
        "of the bases' sizes",
    ),
    (
        "strides", lambda g: g._replace(weights=[w.mT.contiguous().mT for w in g.weights]),
        RuntimeError, "biases and anchors must be contiguous",
    ),
]  # fmt: skip


@each_of(WRONG)
def test_the_kernel_refuses(given, error, message):
    one = two_matrices()
    before = one.matrices()
    with refused(error, message):
        given(one).run()
    assert torch.equal(one.matrices(), before)


def test_opcheck():
    assert library.available("cpu")
    one = two_matrices()
    arguments = (*one[:4], *one.bases[:2], one.scale, one.pulls, False)
    torch.library.opcheck(torch.ops.cl_optim.kronecker_shrink_.default, arguments)


def test_what_the_kernel_is_not_for():
    one = two_matrices()
    assert shrink.fits((9, 7), one.bases[:2], one.weights)
    assert not shrink.fits((2**9, 2**9), one.bases[:2], one.weights)
    assert not shrink.fits((9, 7), (None, one.bases.input), one.weights)
    blocks = one.bases.output.expand(-1, 2, -1, -1)
    assert not shrink.fits((9, 7), (blocks, one.bases.input), one.weights)
    for other in (
        one.weights[0].double(),
        one.weights[0].bfloat16(),
        one.weights[0].mT,
        torch._neg_view(one.weights[0]),
        one.weights[0].to("meta"),
    ):
        assert not shrink.fits((9, 7), one.bases[:2], [other])


@pytest.mark.parametrize("basis_dtype", ["float32", "bfloat16"])
def test_training_is_the_same_with_and_without_it(basis_dtype, monkeypatch):
    fused, calls = shrink.fused_, []

    def counted(weights: list[Tensor], *rest: object, **options: object) -> None:
        calls.append(len(weights))
        fused(weights, *rest, **options)

    monkeypatch.setattr(shrink, "fused_", counted)
    found = []
    for fits in (shrink.fits, lambda *given: False):
        monkeypatch.setattr(shrink, "fits", fits)
        model = network()
        optimizer = protected(
            model, importance_of(model, energy=0.8), every=3, basis_dtype=basis_dtype
        )
        train(model, optimizer.step, range(12))
        found.append(weights(model))
    assert sorted(set(calls)) == [1, 2]  # the two matrices of equal shape are a stack
    assert len(calls) == 4 * 3
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert any(
        (a - b.detach()).abs().max() > 0.05
        for a, b in zip(found[0], network().parameters(), strict=True)
    )


def test_large_bases_are_not_copied_to_find_out_that_they_are_large(monkeypatch):
    monkeypatch.setattr(shrink, "_SMALL", 1)
    parts, inner = [], Stack._bases

    def counted(self: Stack, part: slice, dtype: torch.dtype) -> shrink.Bases:
        parts.append(part)
        return inner(self, part, dtype)

    monkeypatch.setattr(Stack, "_bases", counted)
    monkeypatch.setattr("cl_optim.optim.kronecker.stacks._PIECE_CPU", 1)
    model = network()
    optimizer = protected(model, importance_of(model), every=1, basis_dtype="bfloat16")
    train(model, optimizer.step, range(1))
    assert len(parts) == 4
    assert all(part.stop - part.start == 1 for part in parts)
