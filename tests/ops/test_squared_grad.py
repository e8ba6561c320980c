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


OUT, A, B = torch.zeros(4, 5), torch.ones(3, 5), torch.ones(3, 4)


def packed(cu_seqlens, *rows):
    """Rows of all samples, and where each sample begins."""
    return OUT, torch.ones(*rows, 5), torch.ones(*rows, 4), None, torch.tensor(cu_seqlens)


RISE = "cu_seqlens must rise from 0 to the 8 rows of inputs"
BAD_INPUT = {
    "inputs": ("inputs must be", (OUT, A[0], B[0])),
    "samples": ("grad_outputs must have", (OUT, A, B[:2])),
    "tokens": ("grad_outputs must have", (OUT, torch.ones(3, 2, 5), B)),
    "shape of out": ("out must have shape", (OUT.mT, A, B)),
    "shape of weight_grad": ("weight_grad must have shape", (OUT, A, B, OUT.mT)),
    "float64 weight_grad": ("weight_grad must be float", (OUT, A, B, OUT.double())),
    "bfloat16 out": ("out must be float32", (OUT.bfloat16(), A, B)),
    "float32 out": ("out must be float64", (OUT, A.double(), B)),
    "integers": ("inputs must be of a real", (OUT, A.long(), B)),
    "complex": ("grad_outputs must be of a", (OUT, A, B.cfloat())),
    "unpacked": (r"inputs must be \[ΣT, in\] with cu_seqlens", packed([0, 8], 2, 4)),
    "matrix": (r"cu_seqlens must be \[N \+ 1\], not \[1, 2\]", packed([[0, 8]], 8)),
    "empty": (r"cu_seqlens must be \[N \+ 1\], not \[0\]", packed([], 8)),
    "floats": ("cu_seqlens must be int32 or int64, not torch.float32", packed([0.0, 8.0], 8)),
    "short": (RISE, packed([0, 7], 8)),
    "late": (RISE, packed([1, 8], 8)),
    "falling": (RISE, packed([0, 5, 4, 8], 8)),
    "lazy out": ("out is written and must not be lazily negated", (torch._neg_view(OUT), A, B)),
    "lazy weight_grad": (
        "weight_grad is written and must not be lazily negated", (OUT, A, B, torch._neg_view(OUT)),
    ),
    "expanded out": ("out must not be expanded", (OUT[:1].expand(4, 5), A, B)),
    "expanded weight_grad": (
        "weight_grad must not be expanded", (OUT, A, B, OUT[:, :1].expand(4, 5)),
    ),
    "sparse inputs": ("inputs must be a dense tensor, not torch.sparse", (OUT, A.to_sparse(), B)),
    "sparse out": ("out must be a dense tensor, not torch.sparse", (OUT.to_sparse(), A, B)),
    "device": ("out is on meta, but inputs is on cpu", (OUT.to("meta"), A, B)),
}  # fmt: skip


@pytest.mark.parametrize("given", BAD_INPUT)
def test_bad_input_is_refused_and_nothing_summed(given):
    message, tensors = BAD_INPUT[given]
    with pytest.raises(ValueError, match=f"^{message}"):
        squared_grad_sum_(*tensors)
    assert not OUT.any()


def test_lazy_negations():
    a, b = torch.randn(4, 3, 5), torch.randn(4, 3, 2)
    expected = squared_grad_sum_(torch.zeros(2, 5), a, b, total := torch.zeros(2, 5))
    lazy = torch._neg_view(-a), torch._neg_view(-b)
    ours = squared_grad_sum_(torch.zeros(2, 5), *lazy, sums := torch.zeros(2, 5))
    assert torch.equal(ours, expected)
    assert torch.equal(sums, total)


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
