"""functional.gem_project against GEM as published and against what a projection must satisfy."""

from __future__ import annotations

import pytest
import torch
from gem_cases import problem, published
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cl_optim import functional as F
from cl_optim.ops.nnqp import Status


def bits(tensor: Tensor) -> Tensor:
    """Equal bits, where == calls 0.0 and −0.0 the same."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(integers[tensor.element_size()])


class TestProjection:
    @pytest.mark.parametrize("margin", [0.0, 0.5])
    @pytest.mark.parametrize("rows", [1, 2, 5, 8])
    def test_as_published(self, rows, margin):
        for seed in range(5):
            grad, memory = problem(rows, 40, seed)
            projected, certificate = F.gem_project(grad.double(), memory.double(), margin)
            expected = published(grad, memory, margin)
            torch.testing.assert_close(projected, expected, rtol=0, atol=1e-10)
            assert certificate.status == Status.SOLVED
            assert (certificate.v >= margin).all()

    @pytest.mark.parametrize("strength", [0.0, 0.5])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_nothing_violated_nothing_changed(self, dtype, strength):
        grad = torch.tensor([[-0.0, 1.0, 2.0], [1.0, -0.0, -1.0]], dtype=dtype)
        memory = torch.tensor([[[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]] * 2, dtype=dtype)
        memory[1] *= -1  # the second problem is violated
        memory[1, 1] = 0
        projected, certificate = F.gem_project(grad, memory, strength)
        assert certificate.status.tolist() == [Status.INACTIVE, Status.INACTIVE]
        assert torch.equal(bits(projected), bits(grad))
        assert projected.data_ptr() != grad.data_ptr()

    def test_an_opposite_row_leaves_exactly_nothing(self):
        grad = torch.randn(1000)
        projected, _ = F.gem_project(grad, torch.stack([torch.zeros(1000), -grad]))
        assert (projected == 0).all()

    def test_shapes(self):
        grad, memory = torch.randn(3, 10), torch.randn(3, 4, 10)
        projected, certificate = F.gem_project(grad, memory)
        assert [tuple(part.shape) for part in certificate] == [(3, 4), (3,), (3,)]
        for k in range(3):
            alone, its = F.gem_project(grad[k], memory[k])
            assert torch.equal(alone, projected[k])
            assert [tuple(part.shape) for part in its] == [(4,), (), ()]

    @pytest.mark.parametrize("shape", [(0, 2, 3), (2, 0, 3), (2, 3, 0)])
    def test_empty(self, shape):
        grad = torch.randn(shape[0], shape[2])
        projected, certificate = F.gem_project(grad, torch.randn(shape))
        assert torch.equal(projected, grad)
        assert (certificate.status == Status.INACTIVE).all()

    def test_the_arguments_are_not_touched(self):
        grad, memory = torch.randn(5, requires_grad=True), torch.randn(3, 5)
        before = grad.detach().clone(), memory.clone()
        projected, _ = F.gem_project(grad, memory.bfloat16())
        assert projected.dtype == grad.dtype
        assert not projected.requires_grad
        assert torch.equal(grad, before[0])
        assert torch.equal(memory, before[1])

    def test_nan_is_a_matter_of_its_own_problem(self):
        grad, memory = torch.randn(3, 5), torch.randn(3, 2, 5)
        clean, _ = F.gem_project(grad, memory)
        memory[1, 0, 3] = torch.nan
        projected, certificate = F.gem_project(grad, memory)
        assert certificate.status[1] == Status.INVALID
        assert torch.equal(projected[1], grad[1])
        assert torch.equal(projected[[0, 2]], clean[[0, 2]])

    @settings(max_examples=60, deadline=None)
    @given(
        rows=st.integers(1, 7),
        size=st.integers(1, 9),  # with more rows than dimensions
        seed=st.integers(0, 2**31),
        scale=st.sampled_from([1e-12, 1.0, 1e12]),
        kind=st.sampled_from(["random", "repeated", "opposite", "zero", "scaled", "whole numbers"]),
        strength=st.sampled_from([0.0, 0.5]),
    )
    def test_never_violates(self, rows, size, seed, scale, kind, strength):
        generator = torch.Generator().manual_seed(seed)
        grad = torch.randn(size, generator=generator, dtype=torch.float64)
        memory = torch.randn(rows, size, generator=generator, dtype=torch.float64)
        if kind == "repeated":
            memory[1:] = memory[0]
        elif kind == "opposite":
            memory[1::2] = -memory[0]
        elif kind == "zero":
            memory[::2] = 0
        elif kind == "scaled":
            memory *= 10.0 ** torch.randint(-6, 7, (rows, 1), generator=generator)
        elif kind == "whole numbers":
            grad, memory = grad.mul(2).round(), memory.round()
        grad *= scale
        projected, certificate = F.gem_project(grad, memory, strength)
        assert certificate.status >= 0
        # A dependent row may be off by the root of the rounding (nnqp.threshold).
        slack = 1e-6 if certificate.status == Status.DEPENDENT else 1e-11
        moved = grad.norm() + memory.norm(dim=1) @ certificate.v
        assert (memory @ projected >= -slack * memory.norm(dim=1) * moved).all()


ROW, ROWS = torch.ones(2), torch.ones(3, 2)
BAD_INPUT = {
    "grad of 3 dimensions": (r"grad must be \[P\] or \[B, P\]", torch.ones(2, 2, 2), ROWS),
    "scalar grad": (r"grad must be \[P\] or \[B, P\]", torch.ones(()), ROWS),
    "one row": (r"memory must be \[t, P\] .* not \[2\]", ROW, ROW),
    "other size": (r"memory must be \[t, P\] .* not \[3, 4\]", ROW, torch.ones(3, 4)),
    "no batch": (r"memory must be \[B, t, P\]", torch.ones(2, 3), torch.ones(4, 3)),
    "other batch": (r"memory must be \[B, t, P\]", torch.ones(2, 3), torch.ones(1, 4, 3)),
    "integers": ("grad must be of a real floating-point", ROW.long(), ROWS),
    "complex": ("memory must be of a real floating-point", ROW, ROWS * 1j),
    "device": ("memory is on meta, but grad is on", ROW, ROWS.to("meta")),
    "strength -1": ("memory_strength must be finite", ROW, ROWS, -1.0),
    "strength NaN": ("memory_strength must be finite", ROW, ROWS, torch.nan),
    "strength inf": ("memory_strength must be finite", ROW, ROWS, torch.inf),
}


@pytest.mark.parametrize("given", BAD_INPUT)
def test_bad_input_is_refused(given):
    message, *arguments = BAD_INPUT[given]
    with pytest.raises(ValueError, match=message):
        F.gem_project(*arguments)
