"""Lists of rows and gradients of all sorts, and their products by brute force."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def make_lists(
    shapes: Sequence[tuple[int, ...]],
    t: int,
    rows: torch.dtype = torch.float32,
    grads: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[list[Tensor], list[Tensor]]:
    """Memory and gradients; the same numbers on every device."""
    generator = torch.Generator().manual_seed(1)
    memory = [torch.randn((t, *shape), generator=generator).to(device, rows) for shape in shapes]
    gradients = [torch.randn(shape, generator=generator).to(device, grads) for shape in shapes]
    return memory, gradients


def strided_like(tensor: Tensor, order: random.Random, gaps: bool) -> Tensor:
    """The same numbers in a random order of dimensions, with gaps between them or without."""
    dims = list(range(tensor.dim()))
    order.shuffle(dims)
    step = 2 if gaps else 1
    memory = torch.zeros([tensor.shape[d] * step for d in dims], dtype=tensor.dtype)
    view = memory[tuple(slice(None, None, step) for _ in dims)]
    return view.permute([dims.index(d) for d in range(tensor.dim())]).copy_(tensor)


def exact(memory: Sequence[Tensor], grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """[n, t + 1, t + 1] products in 64 bits of precision, and what their rounding is relative to.

    That is Σ|a_i b_i|, from which the products of rows of any scale are as exact as each other.
    """
    products, sizes = [], []
    for rows, grad in zip(memory, grads, strict=True):
        both = [*(row.reshape(-1) for row in rows), grad.reshape(-1)]
        stack = np.array([x.double().numpy().astype(np.longdouble) for x in both])
        magnitude = abs(stack)
        with np.errstate(invalid="ignore"):
            products.append((stack @ stack.T).astype(np.float64))
            sizes.append((magnitude @ magnitude.T).astype(np.float64))
    return torch.from_numpy(np.array(products)), torch.from_numpy(np.array(sizes))


def assert_exact(
    actual: Tensor, memory: Sequence[Tensor], grads: Sequence[Tensor], bound: float = 1e-14
) -> None:
    """Within rounding of a float64 sum; ``actual`` may be the last line of each matrix alone."""
    expected, size = exact(memory, grads)
    if actual.dim() == 2:
        expected, size = expected[:, -1], size[:, -1]
    assert actual.shape == expected.shape
    assert ((actual.cpu() - expected).abs() <= bound * size).all()


def assert_combined(actual: Tensor, before: Tensor, rows: Tensor, v: Tensor) -> None:
    """g + Gᵀv within the rounding of a float64 sum, and of the gradient's dtype."""
    shape = (-1, *[1] * before.dim())
    terms = torch.cat([before[None].double(), v.view(shape) * rows.double()])
    info = torch.finfo(before.dtype)
    rounding = info.eps * (terms.sum(0).abs() + info.smallest_normal)
    bound = rounding + len(terms) * 2.0**-52 * terms.abs().sum(0)
    assert actual.dtype == before.dtype
    assert ((actual.cpu().double() - terms.sum(0)).abs() <= bound).all()


def bits(tensor: Tensor) -> Tensor:
    """For comparisons in which −0.0 is not 0.0 and NaN is NaN."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(integers[tensor.element_size()])
