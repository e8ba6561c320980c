"""Are the products of memory rows and gradients as fast as reading them once?

`python -m gpu.gram`; `python -m gpu.gram all` adds more rows, larger tensors and smaller ones.
"""

from __future__ import annotations

import statistics
import sys

import torch
from contenders import gpt2_shapes
from torch import Tensor

from cl_optim import functional as F
from cl_optim.ops import gram
from gpu import device as devices
from gpu import report
from gpu.device import Device
from gpu.report import Check

TURNS, ROUNDS = 5, 5
CHUNK = 2**22
# Products of float32 numbers are exact in float64.
ALLOWED = 1e-11
READ = "read"

Shapes = list[tuple[int, ...]]

TINY: Shapes = [(40, 30), (17,)]
GPT2 = gpt2_shapes(embeddings=True)[:-1]  # 148 tensors, 124 M
SETS: list[tuple[str, Shapes, int, torch.dtype]] = [
    ("t = 10", GPT2, 10, torch.float32),
    ("t = 1", GPT2, 1, torch.float32),
    ("t = 31", GPT2, 31, torch.float32),
    ("t = 10, bfloat16 rows", GPT2, 10, torch.bfloat16),
]
MORE: list[tuple[str, Shapes, int, torch.dtype]] = [
    ("t = 5", GPT2, 5, torch.float32),
    ("t = 12", GPT2, 12, torch.float32),
    ("t = 10, 1 tensor of 124 M", [(124_000_000,)], 10, torch.float32),
    ("t = 63, 144 tensors, 85 M", gpt2_shapes(), 63, torch.float32),
    ("t = 128, 1 tensor of 20 M", [(20_000_000,)], 128, torch.float32),
    ("t = 10, 200 tensors of 64", [(64,)] * 200, 10, torch.float32),
]


class Rows:
    """t rows and a gradient in one matrix each, by parameter."""

    def __init__(self, shapes: Shapes, t: int, dtype: torch.dtype, device: str) -> None:
        sizes = [torch.Size(shape).numel() for shape in shapes]
        self.matrix = torch.randn(t, sum(sizes), device=device, dtype=dtype)
        self.flat = torch.randn(sum(sizes), device=device)
        pairs = list(zip(torch.split(self.matrix, sizes, dim=1), shapes, strict=True))
        self.memory = [part.unflatten(1, shape) for part, shape in pairs]
        parts = zip(torch.split(self.flat, sizes), shapes, strict=True)
        self.grads = [part.view(shape) for part, shape in parts]
        self.blocks = [0] * len(shapes)

    def products(self) -> Tensor:
        """All products in float64, [t + 1, t + 1], by plain matrix products."""
        t = len(self.matrix)
        total = torch.zeros(t + 1, t + 1, dtype=torch.float64, device=self.flat.device)
        columns = zip(
            torch.split(self.matrix, CHUNK, 1), torch.split(self.flat, CHUNK), strict=True
        )
        for rows, flat in columns:
            both = torch.cat([rows.double(), flat[None].double()])
            total += both @ both.T
        return total


def check(found: Tensor, expected: Tensor) -> Check:
    """The largest error of a product, relative to the norms of its two factors."""
    norms = expected.diagonal().sqrt()
    return Check(float(((found - expected).abs() / (norms[:, None] * norms)).max()), ALLOWED)


def combined(rows: Rows, v: Tensor) -> Check:
    """Of g + Gᵀv, against the sum of all rows in float64."""
    grads = [grad.clone() for grad in rows.grads]
    gram.combine_(grads, rows.memory, v, rows.blocks)
    found = torch.cat([grad.flatten() for grad in grads])
    difference, size = 0.0, 0.0
    columns = zip(
        torch.split(found, CHUNK),
        torch.split(rows.flat, CHUNK),
        torch.split(rows.matrix, CHUNK, 1),
        strict=True,
    )
    for here, flat, part in columns:
        expected = flat.double() + v[0] @ part.double()
        difference += float((here.double() - expected).square().sum())
        size += float(expected.square().sum())
    return Check((difference / size) ** 0.5, 1e-6)


def measure(
    name: str, shapes: Shapes, t: int, dtype: torch.dtype, device: Device
) -> tuple[devices.Turns, Check]:
    """Times of the three kernels, of cuBLAS and of a plain read."""
    torch.manual_seed(0)
    rows = Rows(shapes, t, dtype, device.name)
    expected = rows.products()
    right = check(gram.total(gram.gram_per_tensor(rows.memory, rows.grads)), expected)
    dots = gram.total(gram.dots_per_tensor(rows.memory, rows.grads))
    norms = expected.diagonal().sqrt()
    dots_error = float(((dots - expected[:, t]).abs() / (norms * norms[t])).max())
    weights = torch.full((1, t), 0.01, dtype=torch.float64, device=device.name)
    right_sum = combined(rows, weights)
    v = weights * 1e-9  # the same rows in every call, so that the gradient stays what it is
    read = rows.matrix.nbytes + rows.flat.nbytes
    calls: dict[str, devices.Call] = {
        "gram": lambda: F.gram(rows.memory, rows.grads),
        "dots": lambda: gram.dots_per_tensor(rows.memory, rows.grads),
        "combine": lambda: gram.combine_(rows.grads, rows.memory, v, rows.blocks),
        READ: lambda: (rows.matrix.sum(), rows.flat.sum()),
    }
    if t == 10:
        calls["G @ G.T"] = lambda: rows.matrix @ rows.matrix.T
    turns = devices.take_turns(device, calls, TURNS, ROUNDS)
    checks = {"gram": right, "dots": Check(dots_error, ALLOWED), "combine": right_sum}
    bytes_moved = dict.fromkeys(calls, read) | {"combine": read + rows.flat.nbytes}
    for contender, times in turns.items():
        middle = statistics.median(times)
        report.figure(
            f"Gram {name}: {contender}",
            middle,
            "ms",
            check=checks.get(contender),
            turns=times,
            gigabytes_per_second=bytes_moved[contender] / middle / 1e6,
            host_ms=devices.host_milliseconds(device, calls[contender], ROUNDS),
        )
    return turns, right


def main() -> None:
    device = devices.find()
    torch.backends.cuda.matmul.allow_tf32 = False
    every = sys.argv[1:] == ["all"]
    for name, shapes, t, dtype in SETS + (MORE if every else []):
        shapes = device.pick(shapes, TINY)
        turns, right = measure(name, shapes, t, dtype, device)
        share = devices.ratio(turns, READ, "gram")
        report.figure(f"Gram {name}: share of the read's bandwidth", share, check=right)
        device.forget()


if __name__ == "__main__":
    main()
