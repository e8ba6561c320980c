"""Time of the Gram products on a GPU, by CUDA events; prints JSON and fractions of read bandwidth.

Needs nothing but torch, Triton and cl_optim: `python bench/gpu_gram.py --json gram-gpu.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from contenders import gpt2_shapes
from gpu_timing import milliseconds

from cl_optim import functional as F
from cl_optim.ops import gram

TURNS, ROUNDS = 5, 10
GPT2 = gpt2_shapes(embeddings=True)[:-1]
# name: shapes, rows, dtype of the rows
SETS: dict[str, tuple[list[tuple[int, ...]], int, torch.dtype]] = {
    "GPT-2 148 tensors 124 M, t = 10": (GPT2, 10, torch.float32),
    "GPT-2 148 tensors 124 M, t = 10, bfloat16 rows": (GPT2, 10, torch.bfloat16),
    "1 tensor of 124 M, t = 10": ([(124_000_000,)], 10, torch.float32),
    "GPT-2 148 tensors 124 M, t = 1": (GPT2, 1, torch.float32),
    "GPT-2 148 tensors 124 M, t = 5": (GPT2, 5, torch.float32),
    "GPT-2 148 tensors 124 M, t = 12": (GPT2, 12, torch.float32),
    "GPT-2 148 tensors 124 M, t = 31": (GPT2, 31, torch.float32),
    "GPT-2 144 tensors 85 M, t = 63": (gpt2_shapes(), 63, torch.float32),
    "1 tensor of 20 M, t = 128": ([(20_000_000,)], 128, torch.float32),
    "200 tensors of 64, t = 10": ([(64,)] * 200, 10, torch.float32),
}


def contenders(
    shapes: list[tuple[int, ...]], t: int, dtype: torch.dtype
) -> dict[str, tuple[Callable[[], object], int]]:
    """What to call, and the bytes that it must read and write at least."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    rows = torch.randn(t, sum(sizes), device="cuda", dtype=dtype)
    flat = torch.randn(sum(sizes), device="cuda")
    memory = [
        part.unflatten(1, shape)
        for part, shape in zip(rows.split(sizes, dim=1), shapes, strict=True)
    ]
    grads = [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]
    active = torch.full((1, t), 1e-9, dtype=torch.float64, device="cuda")
    half = active * (torch.arange(t, device="cuda") % 2 == 0)
    none = torch.zeros_like(active)
    blocks = [0] * len(shapes)
    read = rows.nbytes + flat.nbytes
    half_read = rows.nbytes // t * ((t + 1) // 2)

    def combine(v: torch.Tensor) -> Callable[[], object]:
        return lambda: gram.combine_(grads, memory, v, blocks)

    calls: dict[str, tuple[Callable[[], object], int]] = {
        "gram": (lambda: F.gram(memory, grads), read),
        "dots": (lambda: gram.dots_per_tensor(memory, grads), read),
        "combine": (combine(active), read + flat.nbytes),
        "combine, half active": (combine(half), half_read + 2 * flat.nbytes),
        "combine, nothing active": (combine(none), 0),
        "G @ G.T": (lambda: rows @ rows.T, rows.nbytes),
        "plain read (sum)": (lambda: (rows.sum(), flat.sum()), read),
    }
    if dtype == torch.float32 and rows.nbytes < 10e9:
        wide = rows.double()
        calls["G @ G.T float64"] = (lambda: wide @ wide.T, wide.nbytes)
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where the samples go")
    path = parser.parse_args().json
    if gram.choose("cuda").name != "triton":
        raise SystemExit("The Gram products on a GPU need Triton.")
    torch.backends.cuda.matmul.allow_tf32 = False
    report: dict[str, object] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "unit": "ms, the median of each turn",
    }
    for name, (shapes, t, dtype) in SETS.items():
        calls = contenders(shapes, t, dtype)
        turns: dict[str, list[float]] = {contender: [] for contender in calls}
        for turn in range(TURNS + 1):
            for contender, (call, _) in calls.items():
                time = milliseconds(call, ROUNDS)
                if turn > 0:  # the first one warms up
                    turns[contender].append(time)
        report[name] = {
            contender: {"ms": turns[contender], "bytes": traffic}
            for contender, (_, traffic) in calls.items()
        }
        rates = {
            contender: traffic / statistics.median(turns[contender]) / 1e6
            for contender, (_, traffic) in calls.items()
        }
        print(name)
        for contender, rate in rates.items():
            time = statistics.median(turns[contender])
            of_read = rate / rates["plain read (sum)"]
            print(f"  {contender:24}{time:9.3f} ms {rate:8.0f} GB/s {of_read:6.0%} of a plain read")
        del calls
        torch.cuda.empty_cache()
    path.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
