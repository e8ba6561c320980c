"""The Triton kernel of squared_grad_sum_ in Triton's interpreter, on the CPU.

test_squared_grad_triton.py runs this file in a process of its own, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
import triton.language as tl
from squared_grad_cases import CASES, PACKED, Case, arguments, assert_near, assert_right, expected
from triton.runtime import interpreter

from cl_optim.ops import squared_grad_triton as launch
from cl_optim.ops import squared_grad_triton_kernels as kernels
from cl_optim.ops.squared_grad_triton_tiles import CONFIGS, Config

dot = interpreter.InterpreterBuilder.create_dot


def dot_of_bfloat16(self, a, b, *rest):
    """The interpreter keeps bfloat16 as bits, and multiplies those as if they were integers."""

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    return dot(self, widened(a), widened(b), *rest)


@pytest.fixture(autouse=True)
def _correct_dot(monkeypatch):
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot_of_bfloat16)


def check(case: Case, config: Config | None = None) -> None:
    out, a, b, weight_grad, cu_seqlens = arguments(case)
    returned = launch.squared_grad_sum_(
        out, a, b, weight_grad, cu_seqlens, config=config, processors=case.processors
    )
    assert returned is out
    assert_right(out, a, b, weight_grad, cu_seqlens)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(case):
    check(case)


HALF = [config for config in CONFIGS["half"] if config.stages == 4]


@pytest.mark.parametrize("config", HALF, ids=str)
def test_each_configuration(config):
    """As many tokens as a block has, and some more than two blocks; shared tiles."""
    block = config.block_tokens
    for tokens in (block, 2 * block + 1):
        check(Case(9, tokens, 136, 72, torch.bfloat16, processors=8), config)


@pytest.mark.parametrize("config", CONFIGS["tf32"], ids=str)
def test_configurations_for_float32(config):
    check(Case(9, 70, 136, 72, processors=8), config)


def rows(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Columns of a wider matrix."""
    return torch.ones(shape[0], shape[1] + 3, dtype=dtype)[:, 1:-2]


def columns(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Rows of a wider matrix, transposed."""
    return rows(shape[::-1], dtype).mT


def every_second(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Not next to each other in either direction."""
    return torch.ones(2 * shape[0], 2 * shape[1], dtype=dtype)[::2, ::2]


@pytest.mark.parametrize("weight_grad", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layouts", [*product([rows, columns, every_second], repeat=2)])
def test_results_of_any_strides(layouts, weight_grad):
    _, a, b, _, _ = arguments(Case(9, 70, 140, 72, torch.bfloat16))
    shape = torch.Size((72, 140))
    out, total = layouts[0](shape, torch.float32), layouts[1](shape, weight_grad)
    launch.squared_grad_sum_(out, a, b, total, processors=7)
    squares, grad = expected(a, b)
    assert_near(out, squares + 1, 2e-6)
    assert_near(total, grad + 1, max(2e-6, torch.finfo(weight_grad).eps / 2))


def test_sequences_are_read_in_chunks(monkeypatch):
    monkeypatch.setattr(kernels, "_SEQUENCE_CHUNK", tl.constexpr(4))
    check(Case(lengths=PACKED * 3, in_features=5, processors=3))


def test_rows_are_not_taken_for_samples():
    """A case that is right by one sample axis and wrong by the other."""
    out, a, b, _, _ = arguments(Case(2, 3, 8, 8))
    launch.squared_grad_sum_(out, a, b, processors=1)
    squares, _ = expected(a, b)
    flat, _ = expected(a.view(6, 1, 8), b.view(6, 1, 8))
    assert_near(out, squares + 2, 2e-6)
    assert torch.linalg.vector_norm(flat - squares) > 0.1 * torch.linalg.vector_norm(squares)


@pytest.mark.parametrize("wrong", [[-5, 4, 1000, 3, 2**40], [0, 4, -5, 10]])
def test_rows_outside_are_never_read(wrong):
    """cu_seqlens that the host did not check cannot make the kernel read other memory."""
    a, b = torch.full((2, 40, 8), torch.nan)[:, 15:25]  # NaN before and after
    a.normal_(), b.normal_()
    out = torch.zeros(8, 8)
    launch.squared_grad_sum_(out, a, b, None, torch.tensor(wrong), processors=1)
    assert out.isfinite().all()


def test_float16_does_not_underflow():
    b = torch.full((3, 2, 4), 1e-4, dtype=torch.float16)
    out = launch.squared_grad_sum_(
        torch.zeros(4, 5), torch.ones(3, 2, 5, dtype=torch.float16), b, processors=1
    )
    assert_near(out, torch.full((4, 5), 3 * (2 * b[0, 0, 0].item()) ** 2), 1e-6)
