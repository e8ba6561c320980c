"""The Triton kernels on the CPU. test_gram_triton.py runs this file under TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
from gram_cases import assert_combined, assert_exact, bits, make_lists

from cl_optim.ops import gram_triton

# 3000 elements are several chunks; 15 and 33 are aligned to nothing; the rest may be vectorized.
SHAPES = [(3, 5), (), (3000,), (0,), (2, 3, 4, 4), (33,)]
PAIRS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float64, torch.bfloat16),
]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram_triton, "CHUNK", 1024)


@pytest.mark.parametrize(
    ("t", "dtypes"),
    [*((t, PAIRS[0]) for t in (0, 1, 4, 11, 20, 33)), *((5, p) for p in PAIRS[1:])]
    + [(13, p) for p in PAIRS[1:]],
)
def test_products(t, dtypes):
    memory, grads = make_lists(SHAPES, t, *dtypes)
    products = gram_triton.gram_per_tensor(memory, grads)
    assert_exact(products, memory, grads)
    assert torch.equal(products, products.mT)
    assert_exact(gram_triton.dots_per_tensor(memory, grads), memory, grads)


def test_huge_and_tiny_rows():
    memory, grads = make_lists([(100,)], 3)
    for rows, grad in ((1e20, 1e-20), (1e20, 1e20), (1e-20, 1e-20)):
        scaled = [memory[0] * rows], [grads[0] * grad]
        assert_exact(gram_triton.gram_per_tensor(*scaled), *scaled)
        assert_exact(gram_triton.dots_per_tensor(*scaled), *scaled)


@pytest.mark.parametrize("t", [3, 11])
def test_opposite_rows_have_opposite_products(t):
    memory, _ = make_lists([(2500,), (7,)], t)
    products = gram_triton.gram_per_tensor(memory, [-m[1] for m in memory])
    assert torch.equal(products[:, :t, t], -products[:, :t, 1])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, of inf − inf
@pytest.mark.parametrize("t", [3, 20])
def test_what_is_not_finite_stays_in_its_row(t):
    memory, grads = make_lists([(1030,)], t)
    clean = gram_triton.gram_per_tensor(memory, grads)
    memory[0][1, 1027] = torch.inf
    products = gram_triton.gram_per_tensor(memory, grads)
    touched = torch.zeros_like(products, dtype=torch.bool)
    touched[:, 1] = touched[:, :, 1] = True
    assert torch.equal(products.isfinite(), ~touched)
    assert torch.equal(products[~touched], clean[~touched])


@pytest.mark.parametrize("dtypes", PAIRS)
@pytest.mark.parametrize("t", [1, 3, 130])
def test_combine(t, dtypes):
    memory, grads = make_lists(SHAPES, t, *dtypes)
    v = torch.randn(3, t, dtype=torch.float64)
    v[1] = 0.0
    v[2, 1:] = 0.0
    blocks = [0, 1, 2, 0, 1, 2]
    for rows, block in zip(memory, blocks, strict=True):
        rows[v[block] == 0] = torch.nan  # not read
    before = [g.clone() for g in grads]
    gram_triton.combine_(grads, memory, v, blocks)
    for grad, old, rows, block in zip(grads, before, memory, blocks, strict=True):
        used = v[block] != 0
        assert_combined(grad, old, rows[used], v[block][used])
        if not used.any():
            assert torch.equal(bits(grad), bits(old))


def test_the_opposite_of_a_row_vanishes():
    memory, _ = make_lists([(2000,), (3, 7)], 5)
    grads = [-m[2] for m in memory]
    v = torch.tensor([[0.0, 0.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    gram_triton.combine_(grads, memory, v, [0, 0])
    assert all((g == 0).all() for g in grads)
