"""Shapes for the squared-gradient kernel, in the interpreter and on a GPU alike, and the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Case:
    """Arguments of `squared_grad_sum_`, and how many tiles the schedule takes to be one wave."""

    samples: int = 3
    tokens: int = 70
    in_features: int = 33
    out_features: int = 65
    dtype: torch.dtype = F32
    weight_grad: torch.dtype | None = F32
    lengths: Sequence[int] | None = None  # of packed sequences, instead of samples and tokens
    layout: str = "contiguous"
    results_transposed: bool = False
    processors: int = 1

    def __str__(self) -> str:
        size = f"{self.samples}x{self.tokens}"
        if self.lengths is not None:
            size = f"packed {len(self.lengths)}:{sum(self.lengths)}"
        parts = [size, f"{self.in_features}to{self.out_features}", self.dtype, self.weight_grad]
        parts += [self.layout, *["transposed"] * self.results_transposed, self.processors]
        return "-".join(map(str, parts)).replace("torch.", "").replace(" ", "_")


LAYOUTS = ("contiguous", "tokens first", "features first", "expanded", "inside NaN")
PACKED = [0, 3, 0, 200, 1, 64, 129, 0, 65, 17, 0]
WEIGHT_GRADS = (F32, F16, BF16, None)

CASES = [
    # tiles of 128 × 128 and less, alone and in rows; nothing a multiple of them
    *(Case(in_features=i, out_features=o) for i in (1, 130) for o in (1, 140)),
    Case(2, 9, 300, 1200, dtype=BF16),
    *(Case(2, 3, 7, 200, dtype=BF16, weight_grad=dtype) for dtype in WEIGHT_GRADS),
    *(Case(2, 65, 129, 40, dtype=F16, weight_grad=dtype) for dtype in WEIGHT_GRADS),
    Case(3, 33, 136, 144, dtype=BF16),
    Case(2, 600, 136, 72, dtype=F16),
    # few and many samples and tokens, or none
    *(Case(n, t) for n, t in ((0, 4), (4, 0), (1, 1), (5, 1), (1, 129), (20, 2))),
    Case(in_features=0),
    Case(out_features=0),
    # strides
    *(Case(tokens=40, dtype=BF16, layout=layout) for layout in LAYOUTS),
    Case(in_features=72, dtype=F16, layout="expanded"),
    Case(in_features=72, out_features=136, dtype=BF16, layout="tokens first"),
    Case(in_features=70, out_features=66, results_transposed=True),
    # tiles shared by several programs
    Case(9, 130, 140, 72, dtype=BF16, processors=7),
    Case(9, 130, 140, 72, dtype=BF16, weight_grad=None, processors=7),
    Case(9, 130, 40, 300, dtype=F16, weight_grad=F16, processors=2),
    Case(3, 300, 260, 260, processors=7, results_transposed=True),
    # packed sequences
    Case(lengths=PACKED),
    Case(lengths=PACKED, in_features=140, dtype=BF16, weight_grad=None),
    Case(lengths=PACKED * 3, out_features=140, dtype=BF16, weight_grad=BF16, processors=5),
    Case(lengths=PACKED * 3, in_features=72, out_features=64, dtype=F16, processors=32),
    Case(lengths=[513], layout="features first"),
    *(Case(lengths=lengths) for lengths in ([], [0], [0, 0, 7])),
]  # fmt: skip


def laid_out(data: Tensor, layout: str) -> Tensor:
    """The same values elsewhere in memory; "expanded" repeats the first sample or token."""
    if layout == "tokens first":
        return data.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "features first":
        return data.mT.contiguous().mT
    if layout == "expanded":
        return data[:1].expand_as(data)
    if layout == "inside NaN":
        around = data.new_full([size + 8 for size in data.shape], torch.nan)
        inside = around[tuple(slice(size) for size in data.shape)]
        return inside.copy_(data)
    return data


def arguments(
    case: Case, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """`out`, `inputs`, `grad_outputs`, `weight_grad`, `cu_seqlens`; sums start at 2 and 3."""
    torch.manual_seed(0)
    rows = (case.samples, case.tokens) if case.lengths is None else (sum(case.lengths),)
    a = laid_out(torch.randn(*rows, case.in_features, device=device).to(case.dtype), case.layout)
    b = laid_out(torch.randn(*rows, case.out_features, device=device).to(case.dtype), case.layout)
    cu_seqlens = None
    if case.lengths is not None:
        cu_seqlens = torch.tensor(list(accumulate(case.lengths, initial=0)), device=device)

    def result(value: float, dtype: torch.dtype) -> Tensor:
        shape = case.out_features, case.in_features
        shape = shape[::-1] if case.results_transposed else shape
        full = torch.full(shape, value, dtype=dtype, device=device)
        return full.mT if case.results_transposed else full

    weight_grad = None if case.weight_grad is None else result(3, case.weight_grad)
    return result(2, F32), a, b, weight_grad, cu_seqlens


def expected(a: Tensor, b: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Σ_n g_n² and Σ_n g_n in float64, one sample at a time."""
    if cu_seqlens is not None:
        samples = [(a[i:j], b[i:j]) for i, j in pairwise(cu_seqlens.tolist())]
    else:
        samples = list(zip(a, b, strict=True))
    squares = torch.zeros(b.shape[-1], a.shape[-1], dtype=torch.float64, device=a.device)
    grad = torch.zeros_like(squares)
    for a_n, b_n in samples:
        g = b_n.double().mT @ a_n.double()
        squares += g**2
        grad += g
    return squares, grad


def assert_near(actual: Tensor, expected: Tensor, rtol: float) -> None:
    error = torch.linalg.vector_norm(actual.double() - expected)
    assert error <= rtol * torch.linalg.vector_norm(expected), error


def assert_right(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    weight_grad: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    rtol: float = 2e-6,
) -> None:
    """What `arguments` gave holds the sums beside what was there before."""
    squares, grad = expected(a, b, cu_seqlens)
    assert_near(out, squares + 2, rtol)
    if weight_grad is not None:  # rounded once, by half of eps at most
        assert_near(weight_grad, grad + 3, max(rtol, torch.finfo(weight_grad.dtype).eps / 2))
