"""What EWC around another optimizer costs: its step, its pull alone, a step in the backward pass.

    python bench/any_optimizer.py [--json FILE]

Contenders take turns on the CPU; times are medians, ratios medians of those within a turn. Memory
is the most that a process of its own has had.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import cost_figures
import records
import torch
from contenders import LAMBDA, Problem, adamw, around_adamw, ewc, gpt2_shapes
from torch import nn

from cl_optim import EWC, EWCAdamW

SHAPES: dict[str, tuple[list[tuple[int, ...]], int, int]] = {
    # name: shapes, turns, steps in a turn; whole rounds of every = 4
    "GPT-2, 144 tensors, 85 M": (gpt2_shapes(), 15, 4),
    "1 000 tensors of 64": ([(64,)] * 1000, 40, 20),
}
WIDTH, DEPTH = 2048, 16


class Nothing(torch.optim.Optimizer):
    """Whose step does nothing."""

    def step(self, closure: Any = None) -> None:
        pass


def alone(problem: Problem) -> Callable[[], None]:
    """The pull without another's step."""
    named = [(str(i), p) for i, p in enumerate(problem.params)]
    optimizer = EWC(Nothing(named, {"lr": 1e-3}), ewc_lambda=LAMBDA)
    problem.consolidate(optimizer)
    return optimizer.step


ADAMW, ALONE = "AdamW(fused)", "the pull alone"
CONTENDERS: dict[str, Callable[[Problem], Callable[[], None]]] = {
    ADAMW: adamw,
    "EWC(AdamW), proximal": around_adamw(),
    "EWC(AdamW), proximal, every 4": around_adamw(every=4),
    "EWC(AdamW), gradient": around_adamw(penalty="gradient"),
    "EWC(AdamW), log8": around_adamw(importance_dtype="log8"),
    "EWCAdamW, proximal": ewc(penalty="proximal"),
    ALONE: alone,
}


def seconds(shapes: list[tuple[int, ...]], turns: int, count: int) -> dict[str, list[float]]:
    """Return each contender's seconds a step, by turn."""
    found: dict[str, list[float]] = {label: [] for label in CONTENDERS}
    made = {}
    for label, make in CONTENDERS.items():
        torch.manual_seed(0)
        made[label] = make(Problem(shapes))
    for turn in range(turns + 2):
        for label, step in made.items():
            start = time.perf_counter()
            for _ in range(count):
                step()
            if turn >= 2:  # after plans are made
                found[label].append((time.perf_counter() - start) / count)
    return found


def peak_of(kind: str) -> None:
    """Take three steps, and print the most memory in MiB."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)))

    def make(params: Any) -> torch.optim.Optimizer:
        if kind.startswith("EWCAdamW"):
            return EWCAdamW(params, lr=1e-3, penalty="proximal")
        return EWC(torch.optim.AdamW(params, lr=1e-3, fused=True))

    one = make(model.named_parameters()) if kind.endswith("plain") else None
    if one is not None:
        one.consolidate(None)
    else:
        optimizers = {param: make([(name, param)]) for name, param in model.named_parameters()}
        for param, optimizer in optimizers.items():
            optimizer.consolidate(None)

            def hook(param: torch.Tensor) -> None:
                optimizers[param].step()
                optimizers[param].zero_grad()

            param.register_post_accumulate_grad_hook(hook)
    for _ in range(3):
        model(torch.randn(64, WIDTH)).square().mean().backward()
        if one is not None:
            one.step()
            one.zero_grad()
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith("VmHWM"))
    print(int(line.split()[1]) / 1024)


def memory() -> dict[str, list[float]]:
    """Return the most memory of a step, plain and in the backward pass, in MiB."""
    found: dict[str, list[float]] = {}
    for kind in ("EWCAdamW", "EWC(AdamW)"):
        for how in ("plain", "in the backward pass"):
            command = [sys.executable, __file__, "--peak-of", f"{kind}, {how}"]
            shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found.setdefault(kind, []).append(float(shown))
    return found


def main() -> None:
    parser = records.parser(__doc__)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)  # a process of its own
    arguments = parser.parse_args()
    if arguments.peak_of:
        peak_of(arguments.peak_of)
        return
    figures = {
        "seconds": {name: seconds(*sizes) for name, sizes in SHAPES.items()},
        "peaks": memory(),
        "gradients": 4 * (WIDTH * WIDTH + WIDTH) * DEPTH / 2**20,
    }
    cost_figures.show(cost_figures.any_optimizer(figures), cost_figures.backward_memory(figures))
    records.write(arguments.json, figures)


if __name__ == "__main__":
    main()
