"""Σ g² against cuBLAS's dW on a GPU: every configuration of the table; prints tables, writes JSON.

Needs nothing but torch, Triton and cl_optim: `python bench/gpu_squared_grad.py --json OUT.json`.

Calls are replayed from a CUDA graph, so that only the GPU's time counts; "host" is what one takes
to launch. A figure like 80 % is cuBLAS's time for the ordinary weight gradient, by one product of
all tokens, over ours. Several inputs take turns, so that none is in the second-level cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from gpu_timing import milliseconds
from torch import Tensor

from cl_optim import functional as F
from cl_optim.ops import squared_grad
from cl_optim.ops import squared_grad_triton as kernels
from cl_optim.ops.squared_grad_triton import CONFIGS, Config, Precision

TURNS = 7
INPUTS = 4
REPLAYS = 5
HALF: Precision = "half"


@dataclass(frozen=True)
class Shape:
    """A linear map, and the tokens that go through it."""

    in_features: int
    out_features: int
    tokens: int
    samples: int
    precision: Precision = HALF
    packed: bool = False

    def __str__(self) -> str:
        size = f"{self.samples}×{self.tokens}, {self.in_features} → {self.out_features}"
        return f"{size} {self.precision}{' packed' * self.packed}"


SIZES = [(768, 768), (768, 3072), (2048, 8192)]
SHAPES = [
    *(Shape(*size, tokens, 8192 // tokens) for size in SIZES for tokens in (128, 512, 2048)),
    Shape(768, 3072, 16, 512),
    Shape(768, 3072, 512, 16, packed=True),
    Shape(3072, 768, 512, 8),
    Shape(768, 8, 512, 8),  # the two factors of LoRA
    Shape(8, 768, 512, 8),
    Shape(768, 50304, 512, 8),  # GPT-2's head, padded and as it is: rows that need a copy
    Shape(768, 50257, 512, 8),
    *(Shape(768, 3072, 512, 8, precision) for precision in ("tf32", "ieee")),
]


class Problem:
    """Some inputs of a shape that take turns, and where the sums go."""

    def __init__(self, shape: Shape) -> None:
        dtype = torch.bfloat16 if shape.precision == HALF else torch.float32
        rows = (shape.samples, shape.tokens)
        self.cu_seqlens: Tensor | None = None
        if shape.packed:
            rows = (shape.samples * shape.tokens,)
            ends = range(0, rows[0] + 1, shape.tokens)
            self.cu_seqlens = torch.tensor(ends, device="cuda")

        def tensors(features: int) -> list[Tensor]:
            size = (*rows, features)
            return [torch.randn(size, device="cuda", dtype=dtype) for _ in range(INPUTS)]

        self.pairs = list(zip(tensors(shape.in_features), tensors(shape.out_features), strict=True))
        self.out = torch.zeros(shape.out_features, shape.in_features, device="cuda")
        self.weight_grad = torch.zeros_like(self.out)

    def cublas(self) -> None:
        """The ordinary weight gradients, of the inputs' dtype."""
        for a, b in self.pairs:
            torch.mm(b.flatten(0, -2).mT, a.flatten(0, -2))

    def chosen(self, weight_grad: Tensor | None) -> None:
        for a, b in self.pairs:
            F.squared_grad_sum_(self.out, a, b, weight_grad, self.cu_seqlens)

    def configured(self, weight_grad: Tensor | None, config: Config) -> None:
        for a, b in self.pairs:
            kernels.squared_grad_sum_(self.out, a, b, weight_grad, self.cu_seqlens, config=config)

    def reference(self) -> None:
        for a, b in self.pairs:
            squared_grad.reference(self.out, a, b, self.weight_grad)


@contextmanager
def float32_products(precision: Precision) -> Iterator[None]:
    """Let float32 products be of TF32 where that is what is measured."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def contenders(shape: Shape, problem: Problem) -> dict[str, Callable[[], None]]:
    """cuBLAS first; what the table gives with and without dW; each configuration with dW."""
    result: dict[str, Callable[[], None]] = {
        "cuBLAS dW": problem.cublas,
        "chosen, Σg² and dW": lambda: problem.chosen(problem.weight_grad),
        "chosen, Σg²": lambda: problem.chosen(None),
    }
    if not shape.packed:  # the reference waits for their lengths, which a graph cannot
        result["chunked bmm, Σg² and dW"] = problem.reference
    for config in CONFIGS[shape.precision]:
        if config.descriptors and (shape.packed or torch.cuda.get_device_capability() < (9, 0)):
            continue
        name = " ".join(f"{field}={value}" for field, value in asdict(config).items())
        result[name] = lambda config=config: problem.configured(problem.weight_grad, config)
    return result


def replay(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """A graph of the calls; the first ones compile and warm up."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def host_microseconds(run: Callable[[], None]) -> float:
    """Time until the call returns, with nothing in the GPU's queue."""
    times = []
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) / INPUTS)
    return statistics.median(times) * 1e6


def measure(shape: Shape) -> dict[str, object]:
    """The times of all contenders, and a table of them."""
    problem = Problem(shape)
    runs = contenders(shape, problem)
    with float32_products(shape.precision):
        graphs = {name: replay(run) for name, run in runs.items()}
        host = host_microseconds(runs["chosen, Σg² and dW"])
    turns: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(TURNS + 1):
        for name, graph in graphs.items():
            taken = milliseconds(graph.replay, REPLAYS) / INPUTS
            if turn > 0:  # the first one warms up
                turns[name].append(taken)
    flops = 2 * shape.samples * shape.tokens * shape.in_features * shape.out_features
    cublas = turns["cuBLAS dW"]
    print(f"{shape}   host {host:.0f} µs")
    for name, times in turns.items():
        fraction = statistics.median(a / b for a, b in zip(cublas, times, strict=True))
        middle = statistics.median(times)
        rate = flops / middle / 1e9
        print(f"  {name:86}{middle:9.4f} ms {rate:7.1f} TFLOP/s {fraction:6.0%}")
    return {"shape": asdict(shape), "host_us": host, "ms": turns}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where the samples go")
    parser.add_argument("--only", default="", help="shapes whose name holds this")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench/gpu_squared_grad.py needs a CUDA device.")
    report: dict[str, object] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": kernels.triton.__version__,
        "unit": "ms per call, the median of each turn",
    }
    for shape in SHAPES:
        if arguments.only in str(shape):
            report[str(shape)] = measure(shape)
            torch.cuda.empty_cache()
    arguments.json.write_text(json.dumps(report, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
