"""The Gram products against brute force, their bitwise properties, and the projection's sum."""

from __future__ import annotations

import importlib.util
import itertools
import warnings

import pytest
import torch
from gram_cases import (
    DTYPES,
    assert_combined,
    assert_exact,
    bits,
    exact,
    make_lists,
    strided_like,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from cl_optim import functional as F
from cl_optim.ops import gram, library

SHAPES = [(3, 5), (), (0,), (2, 3, 4, 4), (1000,), (1, 7, 1)]
# Several groups of chunks, and a part of a chunk, a lane and a tile.
LONG = [(2 * 65536 + 515,)]
PAIRS = [*((d, d) for d in DTYPES), (torch.bfloat16, torch.float32), (torch.float16, torch.float64)]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    expected = {"cpu": "cpu", "cuda": "triton"}[request.param]
    assert gram.choose("gram_per_tensor", request.param) == expected
    return request.param


class Operators(TorchDispatchMode):
    """Notes which operators of ours ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "cl_optim":
            self.names.append(function._opname)
        return function(*args, **kwargs or {})


def test_the_compiled_operators_run():
    memory, grads = make_lists(SHAPES, 3)
    v = torch.ones(1, 3, dtype=torch.float64)
    with Operators() as operators:
        gram.gram_per_tensor(memory, grads)
        gram.dots_per_tensor(memory, grads)
        gram.combine_(grads, memory, v, [0] * len(grads))
    assert operators.names == ["gram_per_tensor", "gram_dots_per_tensor", "gram_combine_"]


# --- the products ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "grads"), PAIRS)
@pytest.mark.parametrize("t", [1, 2, 3, 4, 7, 10, 12, 40, 70])
def test_products(t, rows, grads, device):
    memory, gradients = make_lists(SHAPES, t, rows, grads)
    moved = [m.to(device) for m in memory], [g.to(device) for g in gradients]
    products = gram.gram_per_tensor(*moved)
    assert products.dtype == torch.float64
    assert products.device.type == device
    assert_exact(products, memory, gradients)
    assert torch.equal(products, products.mT)
    dots = gram.dots_per_tensor(*moved)
    assert_exact(dots, memory, gradients)
    if device == "cpu":
        assert torch.equal(dots, products[:, -1])


@pytest.mark.parametrize(
    "function", [gram.gram_per_tensor_reference, gram.dots_per_tensor_reference]
)
def test_references(function):
    for t, (rows, grads) in itertools.product((1, 5), PAIRS):
        memory, gradients = make_lists(SHAPES, t, rows, grads)
        assert_exact(function(memory, gradients), memory, gradients)


def test_many_rows(device):
    memory, grads = make_lists([(50,), (1,)], gram.MAX_ROWS, device=device)
    products = gram.gram_per_tensor(memory, grads)
    stack = torch.cat([memory[0], grads[0][None]]).double()
    torch.testing.assert_close(products[0], stack @ stack.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gram.dots_per_tensor(memory, grads), products[:, -1])


@pytest.mark.parametrize("rows", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("t", [41, 64, 200])
def test_many_rows_of_several_chunks(t, rows, device):
    """On a GPU a chunk is the longer, the more rows there are: 131 072 elements for 200."""
    sizes = (150_001, 131_136) if device == "cuda" else (9_001,)
    memory, grads = make_lists([(size,) for size in sizes], t, rows, device=device)
    products, dots = gram.gram_per_tensor(memory, grads), gram.dots_per_tensor(memory, grads)
    assert torch.equal(products, products.mT)
    for i, (row, grad) in enumerate(zip(memory, grads, strict=True)):
        stack = torch.cat([row.double(), grad[None].double()])
        bound = 1e-13 * (stack.abs() @ stack.abs().mT)
        assert ((products[i] - stack @ stack.mT).abs() <= bound).all()
        assert ((dots[i] - stack @ stack[-1]).abs() <= bound[-1]).all()


def test_nothing(device):
    memory, grads = make_lists([(3,), (0,)], 0, device=device)
    norms = torch.stack([g.double().square().sum() for g in grads])
    torch.testing.assert_close(gram.gram_per_tensor(memory, grads), norms.view(2, 1, 1))
    torch.testing.assert_close(gram.dots_per_tensor(memory, grads), norms.view(2, 1))
    gram.combine_(grads, memory, torch.zeros(1, 0, dtype=torch.float64, device=device), [0, 0])
    assert gram.gram_per_tensor([], []).shape == (0, 1, 1)
    assert gram.dots_per_tensor([], []).shape == (0, 1)
    gram.combine_([], [], torch.zeros(1, 4, dtype=torch.float64), [])
    for q, c in (F.gram([], []), F.gram(memory, grads)):
        assert q.shape == (0, 0)
        assert c.shape == (0,)
    memory, grads = make_lists([(0,), (3, 0)], 2, device=device)
    assert torch.equal(gram.gram_per_tensor(memory, grads).cpu(), torch.zeros(2, 3, 3).double())


@settings(deadline=None, max_examples=80)
@given(
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=1, max_size=5),
    t=st.integers(1, 13),
    dtypes=st.sampled_from(PAIRS),
    order=st.randoms(use_true_random=False),
    scales=st.sampled_from([(1.0, 1.0), (1e20, 1e-20), (1e-20, 1e-20), (1e20, 1e20)]),
)
def test_any_shapes_strides_and_scales(shapes, t, dtypes, order, scales):
    memory, grads = make_lists([tuple(shape) for shape in shapes], t, *dtypes)
    # Scales are kept out of dtypes whose range they leave.
    factors = [1.0 if d == torch.float16 else s for d, s in zip(dtypes, scales, strict=True)]
    memory = [strided_like(m * factors[0], order, order.random() < 0.3) for m in memory]
    grads = [strided_like(g * factors[1], order, order.random() < 0.3) for g in grads]
    products = gram.gram_per_tensor(memory, grads)
    assert_exact(products, memory, grads)
    assert products.isfinite().all()
    dots = gram.dots_per_tensor(memory, grads)
    # Rows that are copied to be contiguous for one function are so for the other.
    assert torch.equal(dots, products[:, -1])
    before = [g.clone() for g in grads]
    v = torch.randn(1, t, dtype=torch.float64) * factors[1] / factors[0]
    gram.combine_(grads, memory, v, [0] * len(grads))
    for grad, old, rows in zip(grads, before, memory, strict=True):
        assert_combined(grad, old, rows, v[0])


def test_rows_are_read_as_they_lie():
    """Channels last, and rows with room between them: neither is copied."""
    rows = torch.randn(3, 8, 4, 5, 5).permute(0, 1, 3, 4, 2)
    room = torch.randn(6, 40)[::2, 3:33]
    grads = [torch.randn(8, 4, 5, 5).permute(0, 2, 3, 1), torch.randn(30)]
    memory = [rows, room]
    arranged, gradients = gram.in_one_order(memory, grads)
    assert [r.data_ptr() for r in arranged] == [r.data_ptr() for r in memory]
    assert [g.data_ptr() for g in gradients] == [g.data_ptr() for g in grads]
    assert_exact(gram.gram_per_tensor(memory, grads), memory, grads)
    # Of a gradient in another order, the gradient is copied: it is the smaller.
    other = grads[0].contiguous()
    arranged, gradients = gram.in_one_order([rows], [other])
    assert arranged[0] is rows
    assert gradients[0].stride() == rows[0].stride()
    assert torch.equal(
        gram.gram_per_tensor([rows], [other]), gram.gram_per_tensor([rows], [grads[0]])
    )


@pytest.mark.parametrize(("rows", "grads"), PAIRS)
@pytest.mark.parametrize("t", [1, 5, 10, 12, 17, 40])
def test_every_entry_is_summed_in_the_same_order(t, rows, grads, device):
    """Equal and opposite rows have equal and opposite products, bit for bit."""
    memory, gradients = make_lists([*LONG, (77,)], t, rows, grads, device=device)
    for k in range(0, t, 3):
        same = [m[k].to(grads).to(rows) for m in memory]  # what both dtypes can represent
        for m, row in zip(memory, same, strict=True):
            m[k] = row
        opposite = [-row.to(grads) for row in same]
        products = gram.gram_per_tensor(memory, opposite)
        assert torch.equal(products[:, :t, t], -products[:, :t, k])
        q, c = F.gram(memory, opposite)
        assert torch.equal(c, -q[k])
    order = torch.randperm(t, device=device)
    products = gram.gram_per_tensor(memory, gradients)
    permuted = gram.gram_per_tensor([m[order] for m in memory], gradients)
    corner = torch.cat([order, torch.tensor([t], device=device)])
    assert torch.equal(permuted, products[:, corner][:, :, corner])


def test_neither_threads_nor_other_tensors_change_a_bit():
    memory, grads = make_lists([*LONG, (1000,), (), (300, 300)], 7)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            moved = [g.clone() for g in grads]
            v = torch.linspace(-1, 1, 7, dtype=torch.float64)[None]
            gram.combine_(moved, memory, v, [0] * 4)
            results.append([gram.gram_per_tensor(memory, grads), *moved])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    alone = [gram.gram_per_tensor([m], [g])[0] for m, g in zip(memory, grads, strict=True)]
    assert torch.equal(torch.stack(alone), results[0][0])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("t", [3, 10, 40])
def test_what_is_not_finite_stays_in_its_row(value, t, device):
    memory, grads = make_lists([(1003,)], t, device=device)
    clean = gram.gram_per_tensor(memory, grads)
    for k in (0, t - 1, t):
        rows, grad = memory[0].clone(), grads[0].clone()
        (grad if k == t else rows[k])[1001] = value
        products = gram.gram_per_tensor([rows], [grad])
        touched = torch.zeros_like(products, dtype=torch.bool)
        touched[:, k] = touched[:, :, k] = True
        assert torch.equal(products.isfinite(), ~touched)
        assert torch.equal(products[~touched], clean[~touched])
        assert torch.equal(gram.dots_per_tensor([rows], [grad]).isfinite(), ~touched[:, -1])


@pytest.mark.parametrize("shape", [(5, 3), (37, 41)], ids=["few", "many"])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 148])
def test_total_keeps_the_order(n, shape):
    parts = torch.randn(n, *shape, dtype=torch.float64)
    torch.testing.assert_close(gram.total(parts), parts.sum(0))
    columns = parts[:, :1, :1].expand(n, *shape).contiguous()
    assert len(gram.total(columns).unique()) == 1


def test_functional():
    memory, grads = make_lists(SHAPES, 6)
    q, c = F.gram(memory, grads)
    products, _ = exact(memory, grads)
    torch.testing.assert_close(q, products.sum(0)[:6, :6])
    torch.testing.assert_close(c, products.sum(0)[:6, 6])
    q, c = F.gram(memory[0], grads[0])
    torch.testing.assert_close(q, products[0, :6, :6])
    torch.testing.assert_close(c, products[0, :6, 6])
    weight = torch.nn.Parameter(torch.ones(5))
    assert not F.gram(memory[0][:, 0], weight)[1].requires_grad
    with pytest.raises(ValueError, match="memory and grad must be two tensors, or two lists"):
        F.gram(memory, grads[0])


@pytest.mark.parametrize("side", ["memory", "grads", "both"])
def test_lazy_negations(side):
    memory, grads = make_lists(G, 3)
    lazy_memory, lazy_grads = (
        [torch._neg_view(-t) if side in (name, "both") else t.clone() for t in tensors]
        for name, tensors in (("memory", memory), ("grads", grads))
    )
    for function in (gram.gram_per_tensor, gram.dots_per_tensor):
        assert torch.equal(function(lazy_memory, lazy_grads), function(memory, grads))
    v = torch.rand(1, 3, dtype=torch.float64)
    gram.combine_(lazy_grads, lazy_memory, v, [0, 0])
    gram.combine_(grads, memory, v, [0, 0])
    for ours, expected in zip(lazy_grads, grads, strict=True):
        assert torch.equal(ours, expected)
        assert ours.is_neg() == (side != "memory")


# --- the projection's sum -------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "grads"), PAIRS)
@pytest.mark.parametrize("t", [1, 3, 10, 130])
def test_combine(t, rows, grads, device):
    memory, gradients = make_lists([*SHAPES, (70_001,)], t, rows, grads)
    v = torch.randn(3, t, dtype=torch.float64)
    v[1] = 0.0
    v[2, ::2] = 0.0
    blocks = [0, 1, 2, 0, 1, 2, 2]
    lists = [m.to(device) for m in memory], v.to(device), blocks
    for combine_ in (gram.combine_, gram.combine_reference_):
        moved = [g.to(device, copy=True) for g in gradients]
        combine_(moved, *lists)
        for actual, old, row, block in zip(moved, gradients, memory, blocks, strict=True):
            assert_combined(actual, old, row, v[block])
            still = old.numel() == 0 or not v[block].any()
            assert torch.equal(bits(actual.cpu()), bits(old)) == still


@pytest.mark.parametrize("reference", [False, True])
def test_rows_without_a_part_are_not_read(reference, device):
    combine_ = gram.combine_reference_ if reference else gram.combine_
    memory, grads = make_lists([(3000,)], 4, device=device)
    memory[0][1] = torch.nan
    memory[0][3] = torch.inf
    grads[0][:3] = torch.tensor([-0.0, torch.nan, torch.inf])
    before = grads[0].clone()
    combine_(grads, memory, torch.zeros(1, 4, dtype=torch.float64, device=device), [0])
    assert torch.equal(bits(grads[0]), bits(before))
    v = torch.tensor([[1.0, 0.0, -0.5, -0.0]], dtype=torch.float64, device=device)
    combine_(grads, memory, v, [0])
    expected = before.double() + memory[0][0].double() - 0.5 * memory[0][2].double()
    assert torch.equal(bits(grads[0][3:]), bits(expected.float()[3:]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_opposite_of_a_row_vanishes(dtype, device):
    memory, _ = make_lists([(2000,), (3, 7)], 5, dtype, device=device)
    grads = [-m[2] for m in memory]
    v = torch.zeros(1, 5, dtype=torch.float64, device=device)
    v[0, 2] = 1.0
    gram.combine_(grads, memory, v, [0, 0])
    assert all((g == 0).all() for g in grads)


def test_coefficients_beyond_float32(device):
    """Rows and gradient of different scales: v itself is outside float32's range."""
    memory, _ = make_lists([(500,)], 1, device=device)
    for scale in (1e-20, 1e20):
        rows, grad = [memory[0] * scale], [memory[0][0] / -scale]
        q, c = F.gram(rows, grad)
        gram.combine_(grad, rows, -c / q, [0])
        assert (grad[0].abs() <= 1e-6 / scale).all()


def test_writes_are_visible_to_autograd(device):
    memory, grads = make_lists([(5,)], 2, device=device)
    x = torch.ones(5, device=device, requires_grad=True)
    y = (x * grads[0]).sum()
    gram.combine_(grads, memory, torch.ones(1, 2, dtype=torch.float64, device=device), [0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


# --- operators, checks and the choice -------------------------------------------------------------


def test_opcheck():
    memory, grads = make_lists([(3, 2), (5,)], 3)
    v = torch.randn(2, 3, dtype=torch.float64)
    operators = torch.ops.cl_optim
    torch.library.opcheck(operators.gram_per_tensor.default, (memory, grads))
    torch.library.opcheck(operators.gram_dots_per_tensor.default, (memory, grads))
    torch.library.opcheck(operators.gram_combine_.default, (grads, memory, v, [1, 0]))


M, G = [(3, 4, 2), (3, 5)], [(4, 2), (5,)]


M0, M1, G0, G1 = (torch.ones(shape) for shape in (*M, *G))
BAD_INPUT = {
    "count": (r"memory must hold 2 tensors, as grads, not 1\.", [M0], [G0, G1]),
    "shape": (
        r"memory\[1\] must be \[3, 5\], rows of the shape of grads\[1\]", [M0, M1[:2]], [G0, G1],
    ),
    "order": (r"memory\[0\] must be \[3, 4, 2\], rows of the shape", [M0.mT, M1], [G0, G1]),
    "scalar": (
        r"memory\[0\] must be \[0\], rows of the shape of grads\[0\], not \[\]\.",
        [torch.ones(())], [torch.ones(())],
    ),
    "rows": (r"memory may have 1024 rows at most, not 1025\.", [torch.ones(1025, 1)], [G0[0, :1]]),
    "int64": (r"memory\[1\] must be float32, .* not torch.int64\.$", [M0, M1.long()], [G0, G1]),
    "cfloat": (r"grads\[0\] must be float32, .* not torch.complex64\.$", [M0, M1], [G0 + 0j, G1]),
    "meta": (r"grads\[1\] is on meta, but grads\[0\] is on cpu\.$", [M0, M1], [G0, G1.to("meta")]),
    "sparse": (r"grads\[0\] must be a dense tensor, not torch.sparse", [M0, M1],
               [G0.to_sparse(), G1]),
}  # fmt: skip


@pytest.mark.parametrize("given", BAD_INPUT)
def test_bad_input_is_refused_and_nothing_written(given):
    message, memory, grads = BAD_INPUT[given]
    v = torch.ones(1, 3, dtype=torch.float64)
    for call in (
        lambda: gram.gram_per_tensor(memory, grads),
        lambda: gram.dots_per_tensor(memory, grads),
        lambda: gram.combine_(grads, memory, v, [0, 0]),
        lambda: F.gram(memory, grads),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            call()
    assert all((g.to_dense() == 1).all() for g in grads if g.is_cpu)


V = torch.ones(2, 3, dtype=torch.float64)
BAD_COMBINATION = {
    "count": (r"blocks must hold 2 numbers, one per tensor, not 1\.", G1, V, [0]),
    "above": (r"blocks\[1\] must be in \[0, 2\), a row of coefficients, not 2\.", G1, V, [0, 2]),
    "below": (r"blocks\[0\] must be in \[0, 2\), a row of coefficients, not -1\.", G1, V, [-1, 0]),
    "float32": (r"coefficients must be float64 \[B, t\], not torch.float32", G1, V.float(), [0, 0]),
    "vector": (r"coefficients must be float64 \[B, t\], not torch.float64 \[3\]", G1, V[0], [0, 0]),
    "columns": (r"coefficients must be \[B, 3\], one per row of memory, not \[2, 2\]",
                G1, V[:, :2], [0, 0]),
    "meta": (r"coefficients is on meta, but grads\[0\] is on cpu", G1, V.to("meta"), [0, 0]),
    "expanded": (r"grads\[1\] must not be expanded", G1[:1].expand(5), V, [0, 0]),
}  # fmt: skip


@pytest.mark.parametrize("given", BAD_COMBINATION)
def test_a_combination_is_refused_and_nothing_written(given):
    message, grad, coefficients, blocks = BAD_COMBINATION[given]
    with pytest.raises(ValueError, match=f"^{message}"):
        gram.combine_([G0, grad], [M0, M1], coefficients, blocks)
    assert all((g == 1).all() for g in (G0, G1))


def test_the_operators_check_what_memory_safety_needs():
    memory, grads = make_lists(G, 3)
    operators = torch.ops.cl_optim
    v = torch.ones(1, 3, dtype=torch.float64)
    for rows in (
        memory[:1],
        [memory[0], memory[1][:2]],
        [memory[0].mT.contiguous().mT, memory[1]],
        [memory[0], torch.ones(3, 10)[:, ::2]],
    ):
        with pytest.raises(RuntimeError, match="gram: memory"):
            operators.gram_per_tensor(rows, grads)
    with pytest.raises(RuntimeError, match="must be float32"):
        operators.gram_per_tensor(memory, [grads[0].int(), grads[1]])
    for coefficients, blocks in ((v.float(), [0, 0]), (v[:, :2], [0, 0]), (v, [0]), (v, [0, 1])):
        with pytest.raises(RuntimeError, match=r"gram: (coefficients|blocks)"):
            operators.gram_combine_(grads, memory, coefficients, blocks)


@pytest.mark.parametrize(
    ("device_type", "reason"),
    [("cpu", "was not built"), ("cuda", "Triton is not installed"), ("mps", "no compiled kernels")],
)
def test_without_kernels_the_reference_runs_and_says_so_once(monkeypatch, device_type, reason):
    missing = library.Backend("cpu", False, "The extension cl_optim._C was not built.")
    monkeypatch.setattr(library, "backends", lambda: {"cpu": missing})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    caches = library.why_not_triton, library.warn_once
    for cache in caches:
        cache.cache_clear()
    try:
        with pytest.warns(UserWarning, match=reason):
            assert gram.choose("gram_per_tensor", device_type) == "reference"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert gram.choose("gram_per_tensor", device_type) == "reference"
            if device_type == "cpu":
                memory, grads = make_lists(SHAPES, 4)
                assert_exact(gram.gram_per_tensor(memory, grads), memory, grads)
                assert_exact(gram.dots_per_tensor(memory, grads), memory, grads)
                v = torch.ones(1, 4, dtype=torch.float64)
                expected = grads[0].double() + memory[0].double().sum(0)
                gram.combine_(grads, memory, v, [0] * len(grads))
                assert torch.equal(grads[0], expected.float())
    finally:
        for cache in caches:
            cache.cache_clear()


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
class TestOnTheGPU:
    def test_nothing_waits_for_the_gpu(self):
        for t in (10, 40):
            memory, grads = make_lists([*SHAPES, *LONG], t, device="cuda")
            v = torch.randn(1, t, dtype=torch.float64, device="cuda")
            blocks = [0] * len(grads)
            torch.cuda.set_sync_debug_mode("error")
            try:
                for _ in range(3):
                    F.gram(memory, grads)
                    gram.dots_per_tensor(memory, grads)
                    gram.combine_(grads, memory, v, blocks)
                    grads = [g.clone() for g in grads]  # other addresses: another table
            finally:
                torch.cuda.set_sync_debug_mode("default")

    def test_the_result_is_the_same_every_time(self):
        memory, grads = make_lists([(3_000_017,), (512, 768)], 10, device="cuda")
        results = [gram.gram_per_tensor(memory, grads) for _ in range(5)]
        assert all(torch.equal(r, results[0]) for r in results)

    def test_tables_follow_what_moves(self):
        """On streams of which none waits for another."""
        memory, grads = make_lists([(70_000,), (33, 5)], 6, device="cuda")
        expected = gram.dots_per_tensor_reference(memory, grads)
        torch.cuda.synchronize()
        results = []
        for _ in range(3):
            for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
                with torch.cuda.stream(stream):
                    moved = [m.clone() for m in memory], [g.clone() for g in grads]
                    results += [gram.dots_per_tensor(*moved) for _ in range(2)]
        torch.cuda.synchronize()
        for result in results:
            torch.testing.assert_close(result, expected)

    @pytest.mark.parametrize("stored", [True, False])
    def test_in_a_graph(self, stored, monkeypatch):
        """With stored tables or its own; replayed with other numbers in the same places."""
        from cl_optim.ops import gram_triton

        monkeypatch.setattr(gram_triton, "_in_graphs", {})
        gram_triton._store.cache_clear()
        gram_triton._stored.clear()
        memory, grads = make_lists([(70_000,), (33, 5)], 6, device="cuda")
        others = make_lists([(70_000,), (33, 5)], 6, device="cuda")
        v = torch.zeros(1, 6, dtype=torch.float64, device="cuda")
        for rows, gradients in [others, (memory, grads)][: 1 + stored]:  # compiles the kernels
            F.gram(rows, gradients)
            gram.combine_(gradients, rows, v, [0, 0])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # which waits until all that came before is done
            q, c = F.gram(memory, grads)
            gram.combine_(grads, memory, v, [0, 0])
        assert len(gram_triton._in_graphs) == stored
        for _ in range(3):
            for tensor in (*memory, *grads, v):
                tensor.normal_()
            expected = [g.clone() for g in grads]
            graph.replay()
            torch.testing.assert_close(c, F.gram(memory, expected)[1])
            torch.testing.assert_close(q, F.gram(memory, expected)[0])
            gram.combine_reference_(expected, memory, v, [0, 0])
            for actual, same in zip(grads, expected, strict=True):
                torch.testing.assert_close(actual, same)

    def test_the_operators_are_the_functions(self):
        memory, grads = make_lists(SHAPES, 6, device="cuda")
        v = torch.randn(1, 6, dtype=torch.float64, device="cuda")
        moved, blocks = [g.clone() for g in grads], [0] * len(grads)
        operators = torch.ops.cl_optim
        products = operators.gram_per_tensor(memory, grads)
        assert torch.equal(products, gram.gram_per_tensor(memory, grads))
        products = operators.gram_dots_per_tensor(memory, grads)
        assert torch.equal(products, gram.dots_per_tensor(memory, grads))
        operators.gram_combine_(moved, memory, v, blocks)
        gram.combine_(grads, memory, v, blocks)
        assert all(torch.equal(a, b) for a, b in zip(moved, grads, strict=True))

    def test_more_than_2_31_elements(self):
        rows = torch.zeros(2, 2**30 + 2**12, dtype=torch.bfloat16, device="cuda")
        rows[1, -3:] = 2.0
        grad = torch.ones(rows.shape[1], dtype=torch.bfloat16, device="cuda")
        _, c = F.gram(rows, grad)
        assert c.tolist() == [0.0, 6.0]
        v = torch.tensor([[0.0, -0.5]], dtype=torch.float64, device="cuda")
        gram.combine_([grad], [rows], v, [0])
        assert grad[-4:].tolist() == [1.0, 0.0, 0.0, 0.0]
