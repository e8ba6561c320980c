"""squared_grad_sum_ against one sample at a time, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cl_optim.ops import squared_grad
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


def assert_near(actual: Tensor, expected: Tensor, rtol: float) -> None:
    error = torch.linalg.vector_norm(actual.double() - expected)
    assert error <= rtol * torch.linalg.vector_norm(expected), error


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


def test_device_mismatch():
    with pytest.raises(ValueError, match="out is on meta, but inputs is on cpu"):
        squared_grad_sum_(torch.zeros(4, 5, device="meta"), torch.zeros(3, 5), torch.zeros(3, 4))
