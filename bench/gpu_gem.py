"""GEM on a GPU, by CUDA events: quadratic programs, projections and whole steps; prints JSON.

Needs nothing but torch, Triton and cl_optim: `python bench/gpu_gem.py --json gem-gpu.json`. The
floor of a projection reads the rows and the gradient once for the products, the active rows and the
gradient again, and writes the gradient, at the speed of a copy of the rows.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from contenders import gpt2_shapes
from gpu_timing import milliseconds
from torch import Tensor

from cl_optim import GEM, EWCAdamW
from cl_optim import functional as F
from cl_optim.ops import gram, library, nnqp

WARMUP, ROUNDS = 10, 50
ROWS = 10
SHAPES = gpt2_shapes(embeddings=True)[:-1]  # 148 tensors, 124 M


def settled(call: Callable[[], object]) -> float:
    """Milliseconds of a call, after some to warm up."""
    milliseconds(call, WARMUP)
    return milliseconds(call, ROUNDS)


def quadratic_programs() -> dict[str, float]:
    """Batches of regular problems, half of whose rows are active."""
    results = {}
    for problems, t in ((1, 10), (4096, 16), (64, 128), (1, 128), (1, 1024)):
        rows = torch.randn(problems, t, 2 * t, dtype=torch.float64, device="cuda")
        grads = torch.randn(problems, 2 * t, 1, dtype=torch.float64, device="cuda")
        q, c = rows @ rows.mT, (rows @ (grads - rows.mean(1)[..., None]))[..., 0]
        results[f"{problems} programs of {t} rows"] = settled(lambda q=q, c=c: F.nnqp(q, c))
    return results


def bytes_per_millisecond() -> float:
    """Of a copy of 2.5 GB."""
    source = torch.empty(620_000_000, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / settled(lambda: target.copy_(source))


def projections() -> dict[str, float]:
    """Of GPT-2's gradient; of ten rows those that are in conflict with it are active."""
    params = [torch.nn.Parameter(torch.randn(s, device="cuda") * 0.02) for s in SHAPES]
    memory = [torch.randn(ROWS, *s, device="cuda") for s in SHAPES]
    for param, rows in zip(params, memory, strict=True):
        param.grad = torch.randn_like(param) - 0.3 * rows[::2].sum(0)
    grads = [param.grad for param in params]
    blocks = [0] * len(grads)

    def linear() -> Tensor:
        return gram.total(gram.dots_per_tensor(memory, grads))[None, :ROWS]

    def products() -> tuple[Tensor, Tensor]:
        both = gram.total(gram.gram_per_tensor(memory, grads))[None]
        return both[:, :ROWS, :ROWS], both[:, :ROWS, ROWS]

    q, c = products()
    v = nnqp.nnqp(q, c).v
    state = nnqp.new_state(1, ROWS, "cuda")

    def recomputed() -> None:
        nnqp.nnqp(*products(), only_violated=True)
        gram.combine_(grads, memory, v, blocks)  # the same rows in every call

    def between_refreshes() -> None:
        nnqp.nnqp(q, linear(), only_violated=True, state=state)
        gram.combine_(grads, memory, v, blocks)

    active = int((v != 0).sum())
    numel = sum(param.numel() for param in params)
    floor = (ROWS + 1 + active + 2) * numel * 4 / bytes_per_millisecond()
    results = {
        f"floor of a projection, {active} active rows": floor,
        "projection, rows recomputed": settled(recomputed),
        "projection, between refreshes": settled(between_refreshes),
    }
    optimizer = GEM(EWCAdamW(params, fused=True))
    for k in range(ROWS):
        row = partial(torch.autograd.backward, params, [rows[k] for rows in memory])
        optimizer.remember(str(k), row, refresh_every=None)
    results["step of EWCAdamW"] = settled(optimizer.optimizer.step)
    results["step of GEM around it, between refreshes"] = settled(optimizer.step)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    path = parser.parse_args().json
    if not library.available("cuda"):
        raise SystemExit(library.explain("cuda"))
    torch.manual_seed(0)
    results = {**quadratic_programs(), **projections()}
    for name, time in results.items():
        print(f"{name:50}{time:9.3f} ms")
    report = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "unit": "ms"}
    path.write_text(json.dumps({**report, **results}, indent=1))


if __name__ == "__main__":
    main()
