"""The Triton kernels on the CPU. test_gram_triton.py runs this file under TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
from gram_cases import assert_combined, assert_exact, bits, make_lists

from cl_optim.ops import gram_triton, gram_triton_tiles

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
    monkeypatch.setattr(gram_triton_tiles, "CHUNK", 1024)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What tables were made from, and in which order; none are stored."""
    made, make = [], gram_triton._entries

    def counted(arrays):
        made.append(arrays)
        return make(arrays)

    monkeypatch.setattr(gram_triton, "_entries", counted)
    monkeypatch.setattr(gram_triton, "_in_graphs", {})
    gram_triton._store.cache_clear()
    gram_triton._stored.clear()
    return made


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


@pytest.mark.parametrize("rows", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("t", "chunk"), [(41, 64), (64, 128)])
def test_many_rows_of_several_chunks(t, chunk, rows, monkeypatch):
    monkeypatch.setattr(gram_triton_tiles, "CHUNK", 64)
    assert gram_triton_tiles.chunk_size(t + 1) == chunk
    memory, grads = make_lists([(2 * chunk + 30,)], t, rows)
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


# --- tables of addresses --------------------------------------------------------------------------


def test_a_step_makes_one_table(made):
    memory, grads = make_lists(SHAPES, 3)
    v = torch.ones(2, 3, dtype=torch.float64)
    for _ in range(2):
        gram_triton.dots_per_tensor(memory, grads)
        gram_triton.gram_per_tensor(memory, grads)
        gram_triton.combine_(grads, memory, v, [0] * len(grads))
    assert len(made) == 1
    gram_triton.combine_(grads, memory, v, [1] * len(grads))  # other rows of coefficients
    assert len(made) == 2


def test_tables_begin_at_multiples_of_16_bytes():
    """So that Triton compiles no kernel anew for others."""
    memory, grads = make_lists([(40,), (2000,)], 3, torch.bfloat16)
    for kind in (torch.float32, torch.float64):
        memory.append(memory[0].to(kind))
        grads.append(grads[0].to(kind))
    tables = gram_triton._tables(memory, grads, 4)
    assert [len(table.owners) for _, table in tables] == [3, 1, 1]
    assert all(part.data_ptr() % 16 == 0 for _, table in tables for part in table)
    assert_exact(gram_triton.dots_per_tensor(memory, grads), memory, grads)


# Of rows [2, 8] and a gradient [8]; everything that is not named stays what and where it was.
CHANGES = {
    "gradient moved": lambda rows, grad: (rows, grad.clone()),
    "rows moved": lambda rows, grad: (rows.clone(), grad),
    "row stride": lambda rows, grad: (rows.as_strided((2, 8), (16, 1)), grad),
    "size": lambda rows, grad: (rows[:, :5], grad[:5]),
    "rows' dtype": lambda rows, grad: (rows.view(torch.float16), grad),
    "gradient's dtype": lambda rows, grad: (rows, grad.view(torch.float16)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_no_table_outlives_what_it_was_made_from(made, change):
    room, grad = torch.randn(32).bfloat16(), torch.randn(8).bfloat16()
    before = [room[:16].view(2, 8)], [grad]
    assert_exact(gram_triton.dots_per_tensor(*before), *before)
    rows, changed = CHANGES[change](before[0][0], grad)
    after = [rows], [changed]
    for old, new in ((room, rows), (grad, changed)):
        if new.data_ptr() != old.data_ptr():
            old.fill_(torch.nan)
    assert_exact(gram_triton.dots_per_tensor(*after), *after)
    assert_exact(gram_triton.gram_per_tensor(*after), *after)
    assert len(made) == 2


def test_a_table_is_for_one_size_of_chunks():
    """More than 64 rows have larger ones."""
    rows, grads = make_lists([(3000,)], 70)
    assert_exact(gram_triton.dots_per_tensor(rows, grads), rows, grads)
    fewer = [rows[0][:3]]
    assert_exact(gram_triton.dots_per_tensor(fewer, grads), fewer, grads)


def test_a_parameter_that_is_given_other_memory(made):
    memory, grads = make_lists([(40,)], 2)
    gram_triton.dots_per_tensor(memory, grads)
    old = grads[0].data
    grads[0].data = torch.randn(40)
    old.fill_(torch.nan)
    assert_exact(gram_triton.dots_per_tensor(memory, grads), memory, grads)


def test_another_stream_has_tables_of_its_own(made, monkeypatch):
    """Where the copy of the first one's might still be under way."""
    memory, grads = make_lists(SHAPES, 3)
    gram_triton.dots_per_tensor(memory, grads)
    monkeypatch.setattr(gram_triton, "_stream", lambda device: 7)
    gram_triton.dots_per_tensor(memory, grads)
    assert len(made) == 2


@pytest.fixture
def capturing(made, monkeypatch):
    monkeypatch.setattr(gram_triton, "is_capturing", lambda: True)
    monkeypatch.setattr(gram_triton, "_stream", lambda device: pytest.fail("not in a capture"))


def test_a_capture_takes_stored_tables(made, capturing, monkeypatch):
    memory, grads = make_lists(SHAPES, 3)
    with monkeypatch.context() as eager:
        eager.setattr(gram_triton, "is_capturing", lambda: False)
        eager.setattr(gram_triton, "_stream", lambda device: 3)
        gram_triton.dots_per_tensor(memory, grads)
    assert_exact(gram_triton.dots_per_tensor(memory, grads), memory, grads)
    gram_triton._store.cache_clear()  # a graph reads them all the same
    assert_exact(gram_triton.gram_per_tensor(memory, grads), memory, grads)
    assert len(made) == 1
    gram_triton.dots_per_tensor(memory, [grad.clone() for grad in grads])
    assert len(made) == 2


@pytest.mark.parametrize("why", ["never run", "still being copied", "too many are kept"])
def test_a_capture_else_writes_its_tables(made, capturing, monkeypatch, why):
    memory, grads = make_lists(SHAPES, 3, torch.bfloat16)
    memory += make_lists([(40,)], 3)[0]
    grads += make_lists([(40,)], 3)[1]
    if why != "never run":
        stored = gram_triton._store(arrays_of(memory, grads), 3)
        stored.arrived.fill_(why != "still being copied")
    if why == "too many are kept":
        monkeypatch.setattr(gram_triton, "_MOST_IN_GRAPHS", 0)
    made.clear()
    for _ in range(2):  # nothing is kept for it
        assert_exact(gram_triton.dots_per_tensor(memory, grads), memory, grads)
        assert_exact(gram_triton.gram_per_tensor(memory, grads), memory, grads)
    assert len(made) == 4
    assert not gram_triton._in_graphs
    v = torch.randn(2, 3, dtype=torch.float64)
    before = [grad.clone() for grad in grads]
    blocks = [1, 0, 1, 0, 1, 0, 1]
    gram_triton.combine_(grads, memory, v, blocks)
    for grad, old, rows, block in zip(grads, before, memory, blocks, strict=True):
        assert_combined(grad, old, rows, v[block])


def arrays_of(memory, grads):
    """What `_tables` looks tables up by."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gram_triton, "_for_graphs", lambda arrays: seen.append(arrays))
        gram_triton._tables(memory, grads, len(memory[0]) + 1)
    return seen[0]
