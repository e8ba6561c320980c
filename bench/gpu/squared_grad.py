"""Are Σ g² and dW together as fast as cuBLAS's dW alone?

`python -m gpu.squared_grad` takes the configurations that the table chooses, at the shapes of the
goals; `python -m gpu.squared_grad all` every configuration at more shapes, for whoever tunes the
table.

Calls are replayed from a CUDA graph, so that only the GPU's time counts. Several inputs take turns,
so that none is in the second-level cache.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from cl_optim import functional as F
from cl_optim.ops import squared_grad
from gpu import device as devices
from gpu import errors, report
from gpu.device import Device
from gpu.report import Check

TURNS, REPLAYS = 5, 5
INPUTS = 4
Precision = Literal["half", "tf32", "ieee"]
ALLOWED: dict[Precision, float] = {"half": 1e-4, "tf32": 1e-2, "ieee": 1e-5}
CUBLAS, BOTH, SQUARES = "cuBLAS dW", "sum of squares + dW", "sum of squares"


@dataclass(frozen=True)
class Shape:
    """A linear map, and the tokens that go through it."""

    in_features: int
    out_features: int
    tokens: int
    samples: int
    precision: Precision = "half"
    packed: bool = False

    def __str__(self) -> str:
        kind = "" if self.precision == "half" else f", {self.precision}"
        size = f"{self.in_features}-{self.out_features}, T = {self.tokens}"
        return f"{size}{kind}{', packed' * self.packed}"


def of_goals(device: Device) -> list[Shape]:
    """768 → 768, 768 → 3072 and 2048 → 8192, 8 192 tokens each in samples of 128 and 512."""
    sizes = [(768, 768), (768, 3072), (2048, 8192)]
    shapes = [Shape(*size, tokens, 8192 // tokens) for size in sizes for tokens in (128, 512)]
    return device.pick(shapes, shapes)


def others(device: Device) -> list[Shape]:
    """More, to tune for."""
    shapes = [
        *(Shape(*size, 2048, 4) for size in ((768, 768), (768, 3072), (2048, 8192))),
        Shape(768, 3072, 16, 512),
        Shape(768, 3072, 512, 16, packed=True),
        Shape(3072, 768, 512, 8),
        Shape(768, 8, 512, 8),  # the two factors of LoRA
        Shape(8, 768, 512, 8),
        Shape(768, 50304, 512, 8),  # GPT-2's head, padded and as it is: rows that need a copy
        Shape(768, 50257, 512, 8),
        *(Shape(768, 3072, 512, 8, precision) for precision in ("tf32", "ieee")),
    ]
    return device.pick(shapes, shapes[4:5])


class Problem:
    """Some inputs of a shape that take turns, and where the sums go."""

    def __init__(self, shape: Shape, device: Device) -> None:
        torch.manual_seed(0)
        dtype = torch.bfloat16 if shape.precision == "half" else torch.float32
        samples, tokens = device.pick((shape.samples, shape.tokens), (2, 5))
        rows = (samples * tokens,) if shape.packed else (samples, tokens)
        self.cu_seqlens: Tensor | None = None
        if shape.packed:
            ends = range(0, rows[0] + 1, tokens)
            self.cu_seqlens = torch.tensor(ends, device=device.name)
        out, in_ = device.pick((shape.out_features, shape.in_features), (7, 6))

        def tensors(features: int) -> list[Tensor]:
            size = (*rows, features)
            return [torch.randn(size, device=device.name, dtype=dtype) for _ in range(INPUTS)]

        self.pairs = list(zip(tensors(in_), tensors(out), strict=True))
        self.out = torch.zeros(out, in_, device=device.name)
        self.weight_grad = torch.zeros_like(self.out)

    def cublas(self) -> None:
        """The ordinary weight gradients, of the inputs' dtype."""
        for a, b in self.pairs:
            torch.mm(b.flatten(0, -2).mT, a.flatten(0, -2))

    def chosen(self, weight_grad: Tensor | None) -> None:
        """By the configuration that the table gives."""
        for a, b in self.pairs:
            F.squared_grad_sum_(self.out, a, b, weight_grad, self.cu_seqlens)

    def check(self, allowed: float) -> Check:
        """Of Σ g² and dW, against the reference in float64."""
        found, expected = [], []
        for a, b in self.pairs[:1]:
            sums = [torch.zeros_like(self.out) for _ in range(2)]
            F.squared_grad_sum_(sums[0], a, b, sums[1], self.cu_seqlens)
            wide = [torch.zeros_like(self.out, dtype=torch.float64) for _ in range(2)]
            squared_grad.squared_grad_sum_reference_(
                wide[0], a.double(), b.double(), wide[1], self.cu_seqlens
            )
            found += sums
            expected += wide
        wrong = [errors.relative([a], [b]) for a, b in zip(found, expected, strict=True)]
        return Check(max(wrong), allowed)


@contextmanager
def float32_products(precision: Precision) -> Iterator[None]:
    """Let float32 products be of TF32 where that is what is measured."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def configurations(shape: Shape, problem: Problem, device: Device) -> dict[str, devices.Call]:
    """A call for each configuration of the table that can take the shape."""
    if device.name != "cuda":
        return {}
    from cl_optim.ops import squared_grad_triton as launch
    from cl_optim.ops.squared_grad_triton_tiles import CONFIGS, Config

    def run(config: Config) -> None:
        for a, b in problem.pairs:
            sums = problem.out, a, b, problem.weight_grad, problem.cu_seqlens
            launch.squared_grad_sum_(*sums, config=config)

    result: dict[str, devices.Call] = {}
    for config in CONFIGS[shape.precision]:
        if config.descriptors and (shape.packed or torch.cuda.get_device_capability() < (9, 0)):
            continue
        name = " ".join(f"{field}={value}" for field, value in asdict(config).items())
        result[name] = partial(run, config)
    return result


def measure(shape: Shape, device: Device, every: bool) -> None:
    """Figures of a shape, and the shares of cuBLAS's speed."""
    problem = Problem(shape, device)
    right = problem.check(ALLOWED[shape.precision])
    calls: dict[str, devices.Call] = {
        CUBLAS: problem.cublas,
        BOTH: lambda: problem.chosen(problem.weight_grad),
        SQUARES: lambda: problem.chosen(None),
    }
    if every:
        calls |= configurations(shape, problem, device)
    host = devices.host_milliseconds(device, calls[BOTH], 10) / INPUTS
    graphs = {name: device.graph(call) for name, call in calls.items()}
    turns = devices.take_turns(device, graphs, TURNS, REPLAYS)
    flops = 2 * shape.samples * shape.tokens * shape.in_features * shape.out_features
    for name, times in turns.items():
        milliseconds = statistics.median(times) / INPUTS
        report.figure(
            f"{shape}: {name}",
            milliseconds,
            "ms",
            check=None if name == CUBLAS else right,
            teraflops=flops / milliseconds / 1e9,
        )
    report.figure(f"{shape}: {BOTH}, host", host, "ms")
    share = devices.ratio(turns, CUBLAS, BOTH)
    report.figure(f"{BOTH}, {shape}: share of cuBLAS dW", share, check=right)


def main() -> None:
    device = devices.find()
    every = sys.argv[1:] == ["all"]
    for shape in of_goals(device) + (others(device) if every else []):
        with float32_products(shape.precision):
            measure(shape, device, every)
        device.forget()


if __name__ == "__main__":
    main()
