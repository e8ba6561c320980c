"""Kronecker factors against dense Fisher matrices in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from bad_input import each_of, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from kronecker_cases import by_block, dense, directions, factors_of, gram, means

from cl_optim.importance.kronecker.factors import Layout, Term, from_sums
from cl_optim.importance.kronecker.importance import departure
from cl_optim.importance.kronecker.side import (
    ENERGY,
    Side,
    leading,
    merged_side,
    orthonormal,
    partition,
)

LAYOUTS = [
    Layout((4, 6)),
    Layout((4, 6), bias="b"),
    Layout((6, 4), transposed=True),
    Layout((6, 4), transposed=True, bias="b"),
    Layout((3, 2, 2, 1), bias="b"),
    Layout((1, 1)),
    Layout((5,), bias="b"),
]


def from_terms(layout, terms, block=2048, energy=1.0, samples=10):
    return from_sums(layout, terms, samples, block, energy, "w")


def assert_close(found, expected, rel=1e-5):
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(found.double(), expected.double(), rtol=rel, atol=rel * scale)


# --- layouts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_layout_is_the_map_from_inputs_to_outputs(layout):
    """The matrix times (x, 1) is what the layer computes, and it comes back whole."""
    weight = torch.randn(layout.shape)
    bias = None if layout.bias is None else torch.randn(layout.outputs)
    matrix = layout.matrix(weight, bias)
    assert matrix.shape == (layout.outputs, layout.inputs)
    x = torch.randn(layout.inputs - (bias is not None))
    flat = (
        weight.mT
        if layout.transposed
        else weight.flatten(1)
        if weight.dim() > 1
        else weight[:, None]
    )
    with_one = x if bias is None else torch.cat([x, torch.ones(1)])
    torch.testing.assert_close(matrix @ with_one, flat @ x + (0.0 if bias is None else bias))
    again, again_bias = layout.parameters(matrix)
    assert torch.equal(again, weight)
    assert (again_bias is None) == (bias is None)
    assert bias is None or torch.equal(again_bias, bias)


@pytest.mark.parametrize("layout", [Layout((0, 5)), Layout((5, 0)), Layout((5, 0), bias="b")])
def test_an_empty_weight(layout):
    weight = torch.zeros(layout.shape)
    bias = torch.zeros(layout.outputs) if layout.bias else None
    matrix = layout.matrix(weight, bias)
    assert matrix.shape == (layout.outputs, layout.inputs)
    factors = factors_of(layout)
    assert factors.diagonal()[0].shape == weight.shape
    assert factors.coordinates(matrix).shape == (factors.output.rank, factors.input.rank)


# --- one matrix -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_one_use_is_the_kronecker_product(layout):
    """F = rows/samples · E[bbᵀ] ⊗ E[ããᵀ], and its diagonal is the importance."""
    factors = factors_of(layout, rows=40, samples=10)
    inputs, outputs = gram(40, layout.inputs, 0), gram(40, layout.outputs, 1000)
    expected = torch.kron(outputs, inputs) / (40 * 10)
    assert_close(dense(factors), expected)
    weight, bias = factors.diagonal()
    assert weight.shape == layout.shape
    assert weight.dtype == torch.float32
    assert_close(
        layout.matrix(weight, bias), expected.diagonal().view(layout.outputs, layout.inputs)
    )
    if bias is not None:
        assert_close(factors.bias_diagonal(), bias, 1e-6)


@pytest.mark.parametrize("block", [1, 2, 3, 4, 5])
def test_blocks_with_an_uneven_last_one(block):
    """Correlations across blocks are left out; each element's importance is as without blocks."""
    layout = Layout((5, 6), bias="b")
    factors = factors_of(layout, block=block)
    sums = [gram(40, layout.outputs, 1000), gram(40, layout.inputs, 0)]
    cut = [torch.block_diag(*by_block(one, block))[: len(one), : len(one)] for one in sums]
    assert factors.input.blocks == math.ceil(7 / block)
    assert_close(dense(factors), torch.kron(*cut) / 400)
    for side in (factors.output, factors.input):
        assert departure(side) < 1e-5
    exact = factors_of(layout)
    assert_close(factors.diagonal()[0], exact.diagonal()[0])
    assert_close(factors.bias_diagonal(), exact.diagonal()[1])


def test_diagonal_sides():
    """Of a table [entries, features]: counts of entries, and the features' gradients."""
    layout = Layout((6, 4))
    counts, gradients = torch.tensor([3.0, 0, 1, 7, 0, 2]).double(), gram(13, 4, 3)
    factors = from_terms(layout, [Term(gradients[None], counts, 13)])
    assert factors.output.basis is None
    assert factors.output.blocks == 0
    expected = torch.kron(counts.diag(), gradients) / (13 * 10)
    assert_close(dense(factors), expected)
    assert_close(factors.diagonal()[0].flatten(), expected.diagonal())
    both = from_terms(layout, [Term(gradients.diagonal(), counts, 13)])
    assert_close(both.diagonal()[0].flatten(), expected.diagonal())
    assert torch.equal(both.coordinates(torch.ones(6, 4)), torch.ones(6, 4))


def test_coordinates_and_vectors_are_the_bases():
    factors = factors_of(Layout((5, 6)), block=4, energy=0.9)
    u, a = directions(factors.output), directions(factors.input)
    matrix = torch.randn(5, 6)
    z = torch.randn(u.shape[1], a.shape[1])
    assert_close(factors.coordinates(matrix), u.mT @ matrix.double() @ a)
    assert_close(factors.vectors(z), u @ z.double() @ a.mT)


def test_scaled_is_that_of_a_larger_loss():
    factors = factors_of(Layout((3, 4)))
    larger = factors.scaled(7.0)
    assert_close(dense(larger), 7 * dense(factors))
    assert_close(larger.output.matrix(), 7 * factors.output.matrix())
    assert torch.equal(larger.input.values, factors.input.values)
    assert torch.equal(factors.scaled(1e300).scale.isinf(), factors.scale > 0)
    assert torch.equal(factors.decayed(0.5).input.values, 0.5 * factors.input.values)


# --- several uses ---------------------------------------------------------------------------------


def test_uses_of_ranges_of_the_outputs():
    """A fused projection: ranges with inputs of their own, cut by blocks that do not meet them."""
    layout, block, samples = Layout((7, 4)), 3, 10
    ranges = [(0, 2, 11), (2, 2, 12), (4, 3, 13)]  # start, length, rows
    terms, expected = [], torch.zeros(28, 28, dtype=torch.float64)
    for start, length, rows in ranges:
        inputs, outputs = gram(rows, 4, start), gram(rows, length, start + 100)
        terms.append(Term(by_block(inputs, 4), by_block(outputs, 2), rows, start))
        whole = torch.zeros(7, 7, dtype=torch.float64)
        blocks = torch.block_diag(*by_block(outputs, 2))[:length, :length]
        whole[start : start + length, start : start + length] = blocks
        whole = torch.block_diag(*by_block(whole, block))[:7, :7]
        expected += torch.kron(whole, inputs) / (rows * samples)
    factors = from_terms(layout, terms, block)
    assert factors.input.blocks == 2
    assert_close(factors.scale, means(expected, factors.output, factors.input), 1e-5)
    assert departure(factors.output) < 1e-5


def test_the_tail_has_its_mean_importance():
    """S of a side that is cut: the mean over all other directions, of each use."""
    layout = Layout((7, 6), bias="b")
    terms = [
        Term(by_block(gram(20, 7, 0), 4), by_block(gram(20, 7, 1), 4), 20),
        Term(by_block(gram(9, 7, 2), 4), gram(9, 3, 3)[None], 9, start=2),
        Term(torch.rand(7).double(), torch.rand(7).double(), 5, is_map=False),
    ]
    factors = from_terms(layout, terms, block=4, energy=0.8)
    assert factors.input.rest > 0
    assert factors.output.rest > 0
    expected = torch.zeros(49, 49, dtype=torch.float64)
    for term in terms:
        a, b = (
            one.diag() if one.dim() == 1 else torch.block_diag(*one)
            for one in (term.inputs, term.outputs)
        )
        whole = torch.zeros(7, 7, dtype=torch.float64)
        length = min(len(b), 7 - term.start)
        here = slice(term.start, term.start + length)
        whole[here, here] = b[:length, :length]
        whole = torch.block_diag(*by_block(whole, 4))[:7, :7]
        expected += torch.kron(whole, a[:7, :7]) / (term.rows * 10)
    assert_close(factors.scale, means(expected, factors.output, factors.input))
    assert factors.trace() == pytest.approx(float(expected.trace()), rel=1e-5)
    weight, bias = factors.diagonal()
    assert_close(layout.matrix(weight, bias).flatten(), dense(factors).diagonal().clone())
    assert_close(factors.bias_diagonal(), bias, 1e-6)


def test_the_rank_can_be_limited():
    side = leading(gram(20, 6, 0)[None], 6, 1.0, "it", max_rank=2)
    assert (side.rank, side.kept, side.rest) == (2, 2, 4)
    assert float(side.values.sum()) + 4 * side.tail == pytest.approx(float(gram(20, 6, 0).trace()))


def test_a_range_with_the_shape_of_the_whole_stays_in_its_place():
    """3 of 4 outputs are two blocks of 2, as all 4 are."""
    inputs, outputs = gram(9, 2, 0), gram(9, 3, 1)
    term = Term(inputs[None], by_block(outputs, 2), 9, start=1)
    factors = from_terms(Layout((4, 2)), [term], block=2)
    assert torch.equal(factors.diagonal()[0][0], torch.zeros(2))
    expected = torch.outer(outputs.diagonal(), inputs.diagonal()) / 90
    assert_close(factors.diagonal()[0][1:], expected)


def test_a_lookup_beside_a_map_adds_to_the_scale_alone():
    """A tied table: the head's rows choose the directions."""
    layout = Layout((6, 3))
    head = Term(gram(9, 3, 0)[None], torch.rand(6).double(), 9)
    lookup = Term(gram(5, 3, 1)[None], torch.rand(6).double(), 5, is_map=False)
    alone, tied = from_terms(layout, [head]), from_terms(layout, [head, lookup])
    assert torch.equal(tied.input.basis, alone.input.basis)
    assert torch.equal(tied.input.values, alone.input.values)
    u = directions(alone.input)
    added = torch.outer(lookup.outputs, (u.mT @ lookup.inputs[0] @ u).diagonal()) / 50
    assert_close((tied.scale - alone.scale)[:-1, :-1], added, 1e-4)
    only = from_terms(layout, [lookup])  # nothing else could choose them
    assert_close(dense(only), torch.kron(lookup.outputs.diag(), lookup.inputs[0]) / 50)


def test_a_diagonal_of_a_side_that_another_use_has_whole():
    layout = Layout((4, 3))
    one = Term(gram(9, 3, 0)[None], gram(9, 4, 1)[None], 9)
    beside = Term(torch.rand(3).double(), torch.rand(4).double(), 5, is_map=False)
    factors = from_terms(layout, [one, beside])
    expected = torch.kron(one.outputs[0], one.inputs[0]) / 90
    expected = expected + torch.kron(beside.outputs.diag(), beside.inputs.diag()) / 50
    assert_close(factors.scale, means(expected, factors.output, factors.input))


def test_uses_without_rows_are_importance_0():
    nothing = Term(torch.zeros(1, 3, 3), torch.zeros(1, 4, 4), 0)
    factors = from_terms(Layout((4, 3)), [nothing])
    assert torch.equal(factors.diagonal()[0], torch.zeros(4, 3))
    assert departure(factors.input) == 0.0
    assert factors.input.effective_rank() == 0.0
    used = factors_of(Layout((4, 3)))
    assert_close(dense(factors.merged(used, 1.0, 1.0, "w")), dense(used))


def test_counts_that_have_decayed_below_one():
    term = Term(gram(9, 3, 0)[None], gram(9, 4, 1)[None], 9)
    small = Term(0.01 * term.inputs, 0.01 * term.outputs, 0.09)
    found, expected = (
        from_terms(Layout((4, 3)), [one], samples=samples)
        for one, samples in ((small, 0.1), (term, 10))
    )
    assert_close(found.input.values, expected.input.values)
    assert_close(dense(found), dense(expected))


# --- two tasks ------------------------------------------------------------------------------------


def test_merged_is_the_sum_where_the_bases_are_the_same():
    old = factors_of(Layout((4, 5)), 0)
    newer = from_terms(
        Layout((4, 5)),
        [Term(old.input.matrix(), 3 * old.output.matrix(), 1.0)],
        samples=1,
    )
    assert_close(dense(old.merged(newer, 0.7, 1.0, "w")), 0.7 * dense(old) + dense(newer))


@pytest.mark.parametrize("decay", [0.0, 0.6, 1.0])
@pytest.mark.parametrize(("block", "energy"), [(2, 1.0), (2048, 1.0), (3, 0.8), (2048, 0.8)])
def test_merged_is_the_mean_of_the_sum_over_the_new_projections(block, energy, decay):
    layout = Layout((4, 5), bias="b")
    old, newer = (factors_of(layout, seed, block, energy) for seed in (0, 1))
    merged = old.merged(newer, decay, energy, "w")
    for which in ("output", "input"):
        sides = [getattr(one, which) for one in (old, newer, merged)]
        assert departure(sides[2]) < 1e-5
        sum_ = decay * sides[0].matrix() + sides[1].matrix()
        expected = leading(sum_, sides[2].size, energy, "it")
        assert_close(sides[2].matrix(), expected.matrix())
        if energy == 1.0:
            assert_close(sides[2].matrix(), sum_)
    whole = decay * dense(old) + dense(newer)
    assert_close(merged.scale, means(whole, merged.output, merged.input))
    assert merged.trace() == pytest.approx(float(whole.trace()), rel=1e-5)  # nothing gets lost


def test_merged_of_diagonal_sides():
    layout = Layout((6, 3))
    old, newer = (
        from_terms(layout, [Term(gram(9, 3, seed)[None], torch.rand(6).double(), 9)])
        for seed in (0, 1)
    )
    merged = old.merged(newer, 0.5, 1.0, "w")
    assert merged.output.basis is None
    whole = 0.5 * dense(old) + dense(newer)
    assert_close(merged.scale, means(whole, merged.output, merged.input))


def test_merged_factors_of_ten_tasks_take_no_more_memory():
    layout = Layout((8, 6))
    merged = factors_of(layout, 0, energy=ENERGY)
    for seed in range(1, 10):
        merged = merged.merged(factors_of(layout, seed, energy=ENERGY), 1.0, ENERGY, "w")
    assert merged.scale.shape <= (9, 7)
    assert departure(merged.output) < 1e-5


# --- properties -----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 9),
    block=st.integers(1, 10),
    rank=st.integers(1, 9),
    energy=st.sampled_from([0.5, 0.9, 0.9999, 1.0]),
    seed=st.integers(0, 1000),
    magnitude=st.sampled_from([1e-12, 1.0, 1e12]),
)
def test_a_side_holds_its_share_by_as_few_directions_as_can_be(
    size, block, rank, energy, seed, magnitude
):
    sums = magnitude * gram(12, size, seed, rank)
    blocks = by_block(sums, block)
    side = leading(blocks, size, energy, "it")
    assert side.blocks == partition(size, block)[0] == len(blocks)
    assert departure(side) < 1e-5
    values = side.values.view(len(blocks), -1).double()
    assert bool((values >= 0).all())
    assert side.rank <= len(blocks) * blocks.shape[1]
    held, total = values.sum(1), blocks.diagonal(dim1=1, dim2=2).sum(1)
    assert bool((held >= energy * total * (1 - 1e-5)).all())
    fewer = held - torch.where(values > 0, values, math.inf).min(1).values
    assert bool((fewer < energy * total * (1 + 1e-6))[total > 0].all())  # Values are float32.
    # Directions end where the side ends, and the projection onto them is one.
    basis = side.basis.reshape(-1, side.basis.shape[2])
    assert not basis[size:].any()
    x = torch.randn(3, size)
    once = side.vectors(side.coordinates(x))
    torch.testing.assert_close(side.vectors(side.coordinates(once)), once, rtol=1e-4, atol=1e-4)
    assert 1 - 1e-9 <= side.effective_rank() <= size + 1e-9
    # The tail has what is not held: as much for each direction that is beside.
    assert side.kept == int((values > 0).sum())
    assert side.counts().sum() == size
    assert float(values.sum()) + side.rest * side.tail == pytest.approx(
        float(total.sum()), rel=1e-5
    )
    if side.rest:
        p = torch.eye(size).double() - directions(side) @ directions(side).mT
        whole = torch.block_diag(*blocks)[:size, :size]
        expected = float((p @ whole).trace()) / side.rest
        assert side.tail == pytest.approx(expected, rel=1e-4, abs=1e-6 * float(total.max()))
    approximate = directions(side) * side.values.double() @ directions(side).mT
    approximate += side.tail * (torch.eye(size) - directions(side) @ directions(side).mT)
    assert_close(torch.block_diag(*side.matrix())[:size, :size], approximate)


@settings(max_examples=30, deadline=None)
@given(
    outputs=st.integers(1, 5),
    inputs=st.integers(1, 5),
    block=st.integers(1, 6),
    bias=st.booleans(),
    energy=st.sampled_from([0.7, 1.0]),
    decay=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
def test_the_diagonal_and_the_merge_are_those_of_the_dense_matrix(
    outputs, inputs, block, bias, energy, decay, seed
):
    layout = Layout((outputs, inputs), bias="b" if bias else None)
    old, newer = (factors_of(layout, seed + at, block, energy) for at in (0, 1))
    assert_close(layout.matrix(*old.diagonal()).flatten(), dense(old).diagonal().clone(), 2e-5)
    merged = old.merged(newer, decay, energy, "w")
    whole = decay * dense(old) + dense(newer)
    assert_close(merged.scale, means(whole, merged.output, merged.input), 2e-5)
    assert merged.trace() == pytest.approx(float(whole.trace()), rel=1e-5)


def test_dead_units_take_no_part():
    """Of so many zeros LAPACK's divide and conquer may not find its way."""
    alive = torch.arange(0, 200, 7)
    rows = torch.zeros(50, 200, dtype=torch.float64)
    rows[:, alive] = torch.randn(50, len(alive), dtype=torch.float64)
    matrix = rows.mT @ rows
    side = leading(matrix[None], 200, 1.0, "x")
    assert side.kept == side.rank == len(alive)
    torch.testing.assert_close(side.matrix()[0], matrix, rtol=1e-5, atol=1e-5)
    dead = torch.ones(200, dtype=torch.bool).index_fill_(0, alive, False)
    assert not side.basis[0, dead].any()


def test_the_effective_rank_is_that_of_the_shares():
    for values, expected in (([1, 1, 1, 0], 3.0), ([5, 0], 1.0), ([3, 1], math.exp(0.5623351446))):
        side = Side(len(values), torch.tensor(values).float(), None, 0.0, len(values))
        assert side.effective_rank() == pytest.approx(expected)
    basis = torch.eye(4)[None, :, :1]
    assert Side(4, torch.ones(1), basis, 1.0, 1).effective_rank() == pytest.approx(4.0)
    assert Side(4, torch.ones(1), basis, 0.0, 1).effective_rank() == pytest.approx(1.0)
    assert Side(4, torch.zeros(1), basis, 0.0, 1).effective_rank() == 0.0


def test_rounded_bases_are_orthonormal_again():
    side = leading(by_block(gram(30, 50, 0), 20), 50, 0.999, "it")
    rounded = side.basis.bfloat16()
    assert departure(replace(side, basis=rounded)) > 1e-3
    again = orthonormal(rounded)
    assert departure(replace(side, basis=again)) < 1e-6
    assert float((again - side.basis).abs().max()) < 2**-8
    assert torch.equal(again == 0, side.basis == 0)


# --- bad input ------------------------------------------------------------------------------------

EYE = torch.eye(3).double()[None]
FOUR = torch.eye(4).double()[None]
NOT_PSD = torch.diag(torch.tensor([1.0, -0.1, 2.0])).double()[None]
LAYOUT = Layout((4, 3))


def one(inputs, outputs, start=0, **options):
    return from_terms(LAYOUT, [Term(inputs, outputs, 1, start)], **options)


BAD = [
    ("inputs that are no Σ xxᵀ", lambda: one(NOT_PSD, FOUR),
     ValueError, r"^the Kronecker factor of the inputs of 'w' must be positive semi-.* -0.1 "),
    ("a negative diagonal", lambda: one(EYE, -torch.ones(4)),
     ValueError, r"factor of the output gradients of 'w' must be positive semi-definite"),
    ("NaN", lambda: one(EYE * math.nan, FOUR),
     ValueError, r"^the Kronecker factor of the inputs of 'w' must be finite"),
    ("infinity", lambda: one(EYE, FOUR * math.inf),
     ValueError, r"^the Kronecker factor of the output gradients of 'w' must be finite"),
    ("NaN of a lookup",
     lambda: from_terms(LAYOUT, [Term(EYE, FOUR, 1), Term(EYE * math.nan, FOUR, 1, is_map=False)]),
     ValueError, r"the inputs of 'w' must be finite and positive semi-definite"),
    ("a lookup that is not positive semi-definite",
     lambda: from_terms(LAYOUT, [Term(EYE, FOUR, 1), Term(NOT_PSD, FOUR, 1, is_map=False)]),
     ValueError, r"the inputs of 'w' must be finite and positive semi-definite"),
    ("inputs of another size", lambda: one(FOUR, FOUR),
     ValueError, r"the inputs of 'w' must be that of 3 coordinates, .* not \[1, 4, 4\]"),
    ("a diagonal of another size", lambda: one(torch.ones(2), FOUR),
     ValueError, r"must be that of 3 coordinates, .* not \[2\]"),
    ("a matrix that is no block", lambda: from_terms(LAYOUT, [Term(EYE[0], FOUR, 1)]),
     ValueError, r"not \[3, 3\]"),
    ("blocks of another number", lambda: one(EYE, torch.ones(3, 2, 2)),
     ValueError, r"the output gradients of 'w' must be that of 4 coordinates, .* not \[3, 2, 2\]"),
    ("a range beyond the outputs", lambda: one(EYE, torch.ones(3), start=2),
     ValueError, r"must be that of at most 2 coordinates from 2 on, not \[3\]"),
    ("a range before them", lambda: one(EYE, torch.ones(3), start=-1),
     ValueError, r"from -1 on"),
    ("no use", lambda: from_terms(LAYOUT, []), ValueError, r"'w' need one use of it, at least"),
    ("no samples", lambda: one(EYE, FOUR, samples=0),
     ValueError, r"^samples must be positive"),
    *((f"energy {bad}", lambda bad=bad: one(EYE, FOUR, energy=bad),
       ValueError, r"^energy must be in \(0, 1\], not") for bad in (0.0, 1.1, math.nan)),
    ("merged() of two matrices",
     lambda: factors_of(LAYOUT).merged(factors_of(Layout((3, 4), transposed=True)), 1, 1, "w"),
     ValueError, r"^the Kronecker factors of 'w' are of two different matrices"),
    ("merged() of two block=",
     lambda: factors_of(LAYOUT, block=2).merged(factors_of(LAYOUT), 1, 1, "w"),
     ValueError, r"^the Kronecker factors of 'w' were made with different block=: make"),
    ("merged() with a diagonal side",
     lambda: factors_of(LAYOUT).merged(one(EYE, torch.ones(4)), 1, 1, "w"),
     ValueError, r"different block="),
]  # fmt: skip


@each_of(BAD)
def test_bad_input_is_one_sentence(given, error, message):
    with refused(error, message):
        given()


def decaying(size, seed, power=1.0):
    """A matrix whose eigenvalues are 1, 2^-power, 3^-power, …, and its directions; float64."""
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(size, size, dtype=torch.float64, generator=generator)
    basis, _ = torch.linalg.qr(square)
    values = torch.arange(1, size + 1, dtype=torch.float64) ** -power
    return (basis * values) @ basis.mT, values, basis


def test_few_of_many_directions_are_those_of_the_whole():
    matrix, values, basis = decaying(400, 0)
    side = leading(matrix[None], 400, 1.0, "it", max_rank=64)
    assert side.rank == side.kept == 64
    assert departure(side) < 1e-5
    torch.testing.assert_close(side.values.double(), values[:64], rtol=2e-2, atol=0)
    torch.testing.assert_close(side.values[:32].double(), values[:32], rtol=1e-4, atol=0)
    aligned = (side.basis[0].double().mT @ basis[:, :32]).square().sum(0)
    assert bool((aligned > 1 - 1e-3).all())
    # No trace is lost, and it is the same each time, whatever the user's random numbers.
    total = side.values.double().sum() + side.rest * side.tail
    torch.testing.assert_close(total, values.sum(), rtol=1e-6, atol=0)
    state = torch.get_rng_state()
    assert torch.equal(leading(matrix[None], 400, 1.0, "it", max_rank=64).basis, side.basis)
    assert torch.equal(torch.get_rng_state(), state)


def test_few_directions_of_what_is_not_positive_semi_definite():
    matrix, _, _ = decaying(400, 0)
    matrix[3, 3] = -1.0
    with pytest.raises(ValueError, match="positive semi-definite"):
        leading(matrix[None], 400, 0.99, "it", max_rank=64)


@pytest.mark.parametrize("block", [30, 13])
def test_sums_of_few_directions_are_those_of_whole_matrices(block):
    size = 30
    sides = []
    for seed in (0, 1):
        matrix, _, _ = decaying(size, seed, power=1.5)
        sides.append(leading(by_block(matrix, block), size, 1.0, "it", max_rank=3))
    older, newer = sides
    whole = leading(0.5 * older.matrix() + newer.matrix(), size, 1 - 1e-9, "it")
    few = merged_side(older, newer, 0.5, 1.0, "it")
    # Beyond the directions of the two all are alike: they are not kept.
    assert few.kept == older.kept + newer.kept < whole.kept == size
    torch.testing.assert_close(few.matrix(), whole.matrix(), rtol=1e-5, atol=1e-6)
    assert merged_side(older, newer, 0.5, 0.5, "it").kept < few.kept


def test_merged_sides_have_as_many_directions_as_one_of_the_two_or_the_default(monkeypatch):
    monkeypatch.setattr("cl_optim.importance.kronecker.side.MAX_RANK", 2)
    sides = [leading(decaying(30, s)[0][None], 30, 1.0, "it", max_rank=3) for s in (0, 1)]
    assert merged_side(*sides, 1.0, 1.0, "it").kept == 3
    assert merged_side(*sides, 1.0, 1.0, "it", capped=False).kept == 6
