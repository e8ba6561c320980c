"""squared_grad_sum_ against one sample at a time, in float64, and who computes it."""

import importlib.util
import itertools
import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from squared_grad_cases import CASES, arguments, assert_near, assert_right
from torch import Tensor

from cl_optim.ops import library, squared_grad
from cl_optim.ops.squared_grad import squared_grad_sum_

SIZE = st.integers(0, 5)


def brute_force(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_n g_n² and Σ_n g_n, with g_n summed token by token."""
    squares = torch.zeros(b.shape[-1], a.shape[-1], dtype=torch.float64)
    grad = torch.zeros_like(squares)
    for n in range(a.shape[0]):
        g = torch.zeros_like(squares)
        for t in range(a.shape[1]):
            g += torch.outer(b[n, t].double(), a[n, t].double())
        squares += g**2
        grad += g
    return squares, grad


@settings(deadline=None, max_examples=200)
@given(
    n=SIZE,
    t=SIZE,
    inputs=SIZE,
    outputs=SIZE,
    flat=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    chunk=st.sampled_from([1, 100, 2**18]),
    with_grad=st.booleans(),
    transposed=st.booleans(),
)
def test_brute_force(n, t, inputs, outputs, flat, dtype, chunk, with_grad, transposed):
    torch.manual_seed(n * 1000 + t * 100 + inputs * 10 + outputs)
    t = 1 if flat else t
    if transposed:  # tokens first in memory
        a = torch.randn(t, n, inputs).to(dtype).transpose(0, 1)
        b = torch.randn(t, n, outputs).to(dtype).transpose(0, 1)
    else:
        a, b = torch.randn(n, t, inputs).to(dtype), torch.randn(n, t, outputs).to(dtype)
    squares, grad = brute_force(a, b)
    if flat:
        a, b = a.squeeze(1), b.squeeze(1)
    out_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    out = torch.full((outputs, inputs), 2.0, dtype=out_dtype)
    weight_grad = torch.full_like(out, 3.0) if with_grad else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(squared_grad, "_CHUNK_BYTES_CPU", chunk)
        returned = squared_grad_sum_(out, a, b, weight_grad)

    rtol = 1e-13 if dtype == torch.float64 else 2e-6
    assert returned is out
    assert_near(out, squares + 2, rtol)
    if weight_grad is not None:
        assert_near(weight_grad, grad + 3, rtol)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(case):
    """What the Triton kernel is tested with: strides, packed sequences, every dtype of the sums."""
    out, a, b, weight_grad, cu_seqlens = arguments(case)
    assert squared_grad.choose(out, a, cu_seqlens) == "reference"
    squared_grad_sum_(out, a, b, weight_grad, cu_seqlens)
    assert_right(out, a, b, weight_grad, cu_seqlens)


@settings(deadline=None, max_examples=100)
@given(
    lengths=st.lists(st.integers(0, 5), max_size=6),
    inputs=SIZE,
    outputs=SIZE,
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    with_grad=st.booleans(),
)
def test_packed_sequences(lengths, inputs, outputs, dtype, index_dtype, with_grad):
    torch.manual_seed(sum(lengths))
    ends = list(itertools.accumulate(lengths, initial=0))
    a = torch.randn(ends[-1], inputs).to(dtype)
    b = torch.randn(ends[-1], outputs).to(dtype)
    squares = torch.zeros(outputs, inputs, dtype=torch.float64)
    grad = torch.zeros_like(squares)
    for first, end in itertools.pairwise(ends):
        squares_n, grad_n = brute_force(a[None, first:end], b[None, first:end])
        squares += squares_n
        grad += grad_n
    out = torch.full_like(squares, 2, dtype=torch.promote_types(dtype, torch.float32))
    weight_grad = torch.full_like(out, 3) if with_grad else None
    squared_grad_sum_(out, a, b, weight_grad, torch.tensor(ends, dtype=index_dtype))
    assert_near(out, squares + 2, 2e-6)
    if weight_grad is not None:
        assert_near(weight_grad, grad + 3, 2e-6)


def test_weight_grad_in_half_precision_is_rounded_once():
    """Adding sample after sample in bfloat16 would lose all but the first."""
    a, b = torch.full((1000, 2, 1), 0.5), torch.full((1000, 2, 1), 0.001)
    weight_grad = torch.tensor([[1.0]], dtype=torch.bfloat16)
    squared_grad_sum_(torch.zeros(1, 1), a, b, weight_grad)
    assert weight_grad.item() == 2


@pytest.mark.parametrize("packed", [False, True])
def test_autocast_does_not_round_the_products(packed):
    a, b = torch.randn(3, 40, 5), torch.randn(3, 40, 4)
    squares, _ = brute_force(a, b)
    cu_seqlens = torch.tensor([0, 40, 80, 120]) if packed else None
    if packed:
        a, b = a.flatten(0, 1), b.flatten(0, 1)
    with torch.autocast("cpu", torch.bfloat16):
        out = squared_grad_sum_(torch.zeros(4, 5), a, b, None, cu_seqlens)
    assert_near(out, squares, 2e-6)


def test_float16_does_not_underflow():
    b = torch.full((3, 2, 4), 1e-4, dtype=torch.float16)  # b² is 0 in float16
    a = torch.ones(3, 2, 5, dtype=torch.float16)
    for inputs, grads in ((a, b), (a[:, 0], b[:, 0])):
        out = squared_grad_sum_(torch.zeros(4, 5), inputs, grads)
        expected, _ = brute_force(inputs.view(3, -1, 5), grads.view(3, -1, 4))
        assert_near(out, expected, 1e-6)
        assert (out > 0).all()


def test_takes_tensors_that_require_gradients():
    a = torch.randn(3, 2, 5, requires_grad=True)
    b = torch.randn(3, 2, 4, requires_grad=True)
    out = squared_grad_sum_(torch.zeros(4, 5), a, b)
    assert not out.requires_grad


@pytest.mark.parametrize("t", [1, 8])
def test_memory_is_bounded(t):
    """No tensor of the size of all products is made."""
    n, size = 512, 64
    a, b = torch.randn(n, t, size), torch.randn(n, t, size)
    out = torch.zeros(size, size)
    with torch.profiler.profile(profile_memory=True) as profile:
        squared_grad_sum_(out, a, b)
    largest = max(event.cpu_memory_usage for event in profile.events())
    products = n * out.numel() * out.element_size()
    assert largest <= max(2**19, a.numel() * 4) < products / 4


F32, F64 = torch.float32, torch.float64


@pytest.mark.parametrize(
    ("message", "out", "inputs", "grad_outputs", "weight_grad"),
    [
        ("^inputs must be", (4, 5, F32), (5, F32), (4, F32), None),
        ("^grad_outputs must have", (4, 5, F32), (3, 5, F32), (2, 4, F32), None),
        ("^grad_outputs must have", (4, 5, F32), (3, 2, 5, F32), (3, 4, F32), None),
        ("^out must have shape", (5, 4, F32), (3, 5, F32), (3, 4, F32), None),
        ("^weight_grad must have shape", (4, 5, F32), (3, 5, F32), (3, 4, F32), (5, 4, F32)),
        ("^weight_grad must be float", (4, 5, F32), (3, 5, F32), (3, 4, F32), (4, 5, F64)),
        ("^out must be float32", (4, 5, torch.bfloat16), (3, 5, F32), (3, 4, F32), None),
        ("^out must be float64", (4, 5, F32), (3, 5, F64), (3, 4, F32), None),
        ("^inputs must be of a real", (4, 5, F32), (3, 5, torch.int64), (3, 4, F32), None),
        ("^grad_outputs must be of a", (4, 5, F32), (3, 5, F32), (3, 4, torch.cfloat), None),
    ],
)
def test_bad_arguments(message, out, inputs, grad_outputs, weight_grad):
    tensors = [
        None if spec is None else torch.zeros(spec[:-1], dtype=spec[-1])
        for spec in (out, inputs, grad_outputs, weight_grad)
    ]
    with pytest.raises(ValueError, match=message):
        squared_grad_sum_(*tensors)


@pytest.mark.parametrize(
    ("message", "inputs", "cu_seqlens"),
    [
        (r"^inputs must be \[ΣT, in\] with cu_seqlens", (2, 4, 5), torch.tensor([0, 8])),
        (r"^cu_seqlens must be \[N \+ 1\], not \[1, 2\]", (8, 5), torch.tensor([[0, 8]])),
        (r"^cu_seqlens must be \[N \+ 1\], not \[0\]", (8, 5), torch.tensor([], dtype=torch.int64)),
        ("^cu_seqlens must be int32 or int64, not torch.float32", (8, 5), torch.tensor([0.0, 8.0])),
        ("^cu_seqlens must rise from 0 to the 8 rows of inputs", (8, 5), torch.tensor([0, 7])),
        ("^cu_seqlens must rise from 0 to the 8 rows of inputs", (8, 5), torch.tensor([1, 8])),
        ("^cu_seqlens must rise from 0 to the 8 rows", (8, 5), torch.tensor([0, 5, 4, 8])),
    ],
)
def test_bad_cu_seqlens(message, inputs, cu_seqlens):
    out = torch.zeros(4, 5)
    with pytest.raises(ValueError, match=message):
        squared_grad_sum_(out, torch.ones(inputs), torch.ones(*inputs[:-1], 4), None, cu_seqlens)
    assert (out == 0).all()


def test_lazy_negations():
    a, b = torch.randn(4, 3, 5), torch.randn(4, 3, 2)
    expected = squared_grad_sum_(torch.zeros(2, 5), a, b, total := torch.zeros(2, 5))
    lazy = torch._neg_view(-a), torch._neg_view(-b)
    ours = squared_grad_sum_(torch.zeros(2, 5), *lazy, sums := torch.zeros(2, 5))
    assert torch.equal(ours, expected)
    assert torch.equal(sums, total)
    negated = torch._neg_view(torch.zeros(2, 5))
    for name, results in (("out", (negated, a, b)), ("weight_grad", (ours, a, b, negated))):
        with pytest.raises(ValueError, match=f"^{name} is written and must not be lazily negated"):
            squared_grad_sum_(*results)


def test_sums_that_share_memory_are_refused():
    a, b = torch.zeros(3, 2, 5), torch.zeros(3, 2, 4)
    with pytest.raises(ValueError, match=r"^out must not be expanded"):
        squared_grad_sum_(torch.zeros(1, 5).expand(4, 5), a, b)
    with pytest.raises(ValueError, match=r"^weight_grad must not be expanded"):
        squared_grad_sum_(torch.zeros(4, 5), a, b, torch.zeros(4, 1).expand(4, 5))


class TestBackend:
    """The choice for a GPU, of which only device and dtype are looked at."""

    @pytest.fixture(autouse=True)
    def _gpu(self, monkeypatch):
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
        caches = library.why_not_triton, library.warn_once
        for cache in caches:
            cache.cache_clear()
        yield
        for cache in caches:
            cache.cache_clear()

    @staticmethod
    def chosen(dtype=torch.float32, shape=(3, 2, 5), cu_seqlens=None):
        out = SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype)
        return squared_grad.choose(out, torch.zeros(shape), cu_seqlens)

    def test_triton(self):
        assert self.chosen() == "triton"
        assert self.chosen(shape=(6, 5), cu_seqlens=torch.tensor([0, 6])) == "triton"

    def test_reference(self):
        assert self.chosen(dtype=torch.float64) == "reference"
        assert self.chosen(shape=(3, 1, 5)) == "reference"
        assert self.chosen(shape=(3, 5)) == "reference"

    @pytest.mark.parametrize(
        ("owner", "name", "value", "reason"),
        [
            (torch.version, "cuda", None, "is built without"),
            (torch.cuda, "get_device_capability", lambda device: (7, 5), "cuda:0 has 7.5"),
            (importlib.util, "find_spec", lambda name: None, "Triton is not installed"),
        ],
    )
    def test_a_gpu_that_has_to_do_without_warns_once(self, monkeypatch, owner, name, value, reason):
        monkeypatch.setattr(owner, name, value)
        with pytest.warns(UserWarning, match=reason):
            assert self.chosen() == "reference"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert self.chosen() == "reference"


def test_opcheck():
    a, b = torch.randn(3, 2, 5), torch.randn(3, 2, 4)
    operator = torch.ops.cl_optim.squared_grad_sum_.default
    torch.library.opcheck(operator, (torch.zeros(4, 5), a, b))
    flat = a.flatten(0, 1), b.flatten(0, 1)
    packed = torch.zeros(4, 5), *flat, torch.zeros(4, 5), torch.tensor([0, 1, 6])
    torch.library.opcheck(operator, packed)
    out = torch.zeros(4, 5)
    operator(out, a, b)
    assert torch.equal(out, squared_grad_sum_(torch.zeros(4, 5), a, b))


def test_sparse_tensors_are_refused():
    out, a, b = torch.zeros(4, 5), torch.zeros(3, 5), torch.zeros(3, 4)
    for name, bad in (("inputs", (out, a.to_sparse(), b)), ("out", (out.to_sparse(), a, b))):
        with pytest.raises(ValueError, match=f"^{name} must be a dense tensor, not torch.sparse"):
            squared_grad_sum_(*bad)


def test_device_mismatch():
    with pytest.raises(ValueError, match="out is on meta, but inputs is on cpu"):
        squared_grad_sum_(torch.zeros(4, 5, device="meta"), torch.zeros(3, 5), torch.zeros(3, 4))
