"""How times grow: with weights, tensors, memories, quadratic programs and the length of sequences.

    python bench/scaling.py [--folder bench/results] [--quick]

Ours and a peer, or a floor, take turns at each size; a point is the median of the turns. The
exponent is that of the line through the upper half of the points, log against log: 1 is in
proportion. Writes scaling.json, scaling.md and scaling.png; about four minutes.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import contenders
import fisher_contenders
import records
import torch
from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from torch import Tensor

from cl_optim import functional as F
from cl_optim.demo.machine import machine, sentence
from cl_optim.demo.report import write_markdown

Work = Callable[[], object]


class Curve(NamedTuple):
    """What is asked.

    Attributes:
        name: What takes the time.
        axis: What grows.
        sizes: How far.
        make: Makes ours and the others', by name, of a size.
        memory: Bytes that each takes; sizes are left out, and said, that take more than there are.
    """

    name: str
    axis: str
    sizes: Sequence[int]
    make: Callable[[int], dict[str, Work]]
    memory: int = 0

    def fitting(self) -> list[int]:
        """Return the sizes that the machine has the memory for, and print the others."""
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        fitting = [size for size in self.sizes if size * self.memory < there]
        for size in self.sizes[len(fitting) :]:
            print(f"left out: {size:,} {self.axis} take more than the machine's {there:,} bytes")
        return fitting


def steps(shapes: list[tuple[int, ...]]) -> dict[str, Work]:
    """Return a protected step, and torch's without protection."""
    made = {"EWCAdamW": "EWCAdamW gradient", "AdamW(fused)": "AdamW fused"}
    return {
        label: contenders.CONTENDERS[name](contenders.Problem(shapes))
        for label, name in made.items()
    }


def of_weights(count: int) -> dict[str, Work]:
    """Return steps of as many weights in a few tensors."""
    side = math.isqrt(count // 4)
    return steps([(side, side)] * 4)


def of_compact_weights(count: int) -> dict[str, Work]:
    """Return steps of as many bfloat16 weights: 9 bytes each, and torch's 8."""
    side = math.isqrt(count // 16)
    ours = contenders.ewc(
        importance_dtype="log8", anchor_dtype="bfloat16", state_dtype="8bit", rounding="stochastic"
    )
    return {
        label: make(contenders.Problem([(side, side)] * 16, dtype=torch.bfloat16))
        for label, make in (("EWCAdamW", ours), ("AdamW(fused)", contenders.adamw))
    }


def of_tensors(count: int) -> dict[str, Work]:
    """Return steps of as many tensors of 64."""
    return steps([(64,)] * count)


def of_memories(count: int) -> dict[str, Work]:
    """Return the products of as many memories of 100 000 weights, and torch's."""
    rows, gradient = torch.randn(count, 100_000), torch.randn(100_000)
    return {"gram": lambda: F.gram(rows, gradient), "G @ Gᵀ in float32": lambda: rows @ rows.T}


def programs(count: int, rows: int) -> tuple[Tensor, Tensor]:
    """Return regular quadratic programs, about half of whose rows are active."""
    generator = torch.Generator().manual_seed(0)
    rows_ = torch.randn(count, rows, 4 * rows, dtype=torch.float64, generator=generator)
    grads = torch.randn(count, 4 * rows, 1, dtype=torch.float64, generator=generator)
    return rows_ @ rows_.mT, (rows_ @ (grads - rows_.mean(1)[..., None]))[..., 0]


def of_programs(count: int) -> dict[str, Work]:
    """Return the solution of as many programs of 16 rows, and of one system for each."""
    gram, linear = programs(count, 16)
    return {
        "nnqp": lambda: F.nnqp(gram, linear),
        "one linear system each": lambda: torch.linalg.solve(gram, linear),
    }


def of_rows(count: int) -> dict[str, Work]:
    """Return the solution of one program of as many rows, and of one system."""
    gram, linear = programs(1, count)
    return {
        "nnqp": lambda: F.nnqp(gram, linear),
        "one linear system": lambda: torch.linalg.solve(gram, linear),
    }


def of_lengths(length: int) -> dict[str, Work]:
    """Return the Fisher of a transformer of 1.1 million weights, 4 sequences of that length."""
    torch.manual_seed(0)
    model = fisher_contenders.Transformer(
        layers=4, width=128, heads=4, vocabulary=1000, length=length
    )
    tokens = torch.randint(0, 1000, (4, length + 1))
    problem = fisher_contenders.Problem(model, tokens[:, :-1].clone(), tokens[:, 1:].clone())
    made = {
        "Fisher": "cl_optim, a pass of its own",
        "forward and backward": "forward + backward",
    }
    return {label: fisher_contenders.CONTENDERS[name](problem) for label, name in made.items()}


CURVES = [
    Curve("A step", "weights", (10**4, 10**5, 10**6, 10**7, 10**8), of_weights),
    Curve(
        "A step", "bfloat16 weights, compact formats", tuple(10**k for k in range(4, 10)),
        of_compact_weights, memory=20,
    ),
    Curve("A step", "tensors of 64", (1, 10, 100, 1000, 10_000), of_tensors),
    Curve("GEM's products", "memories", (1, 4, 16, 64, 256, 1024), of_memories),
    Curve("Quadratic programs", "programs of 16 rows", (1, 16, 256, 4096), of_programs),
    Curve("A quadratic program", "rows", (1, 4, 16, 64, 256, 1024), of_rows),
    Curve("Fisher information", "tokens of a sequence", (16, 64, 256, 1024), of_lengths),
]  # fmt: skip
QUICK = [curve._replace(sizes=curve.sizes[:2]) for curve in CURVES]

# Seconds of the turns, by contender and size.
Measured = dict[str, dict[int, list[float]]]


def taken(work: Work, least: float = 0.02) -> float:
    """Return the fastest call's time, of as many as take a while, ten at most."""
    times: list[float] = []
    while len(times) < 10 and (not times or sum(times) < least):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return min(times)


def measure(curve: Curve, turns: int) -> Measured:
    """Measure all sizes, the contenders of one in turns."""
    found: Measured = {}
    for size in curve.fitting():
        works = curve.make(size)
        for work in works.values():
            work()  # warms up
        for _ in range(turns):
            for name, work in works.items():
                found.setdefault(name, {}).setdefault(size, []).append(taken(work))
        del work, works  # before the next, ten times as large
    return found


def exponent(points: dict[int, float]) -> float:
    """Fit log t = a + k·log n through the upper half of the points; return k."""
    upper = sorted(points)[-max(2, (len(points) + 1) // 2) :]
    x, y = [math.log(size) for size in upper], [math.log(points[size]) for size in upper]
    return statistics.linear_regression(x, y).slope


def medians(of_sizes: dict[int, list[float]]) -> dict[int, float]:
    """Return the point of each size."""
    return {int(size): statistics.median(times) for size, times in of_sizes.items()}


def table(curve: Curve, measured: Measured, style: box.Box) -> Table:
    """Return times by size, the ratio to the other and the exponents."""
    made = Table(title=f"{curve.name}, {curve.axis}", box=style, title_justify="left")
    points = {name: medians(of_sizes) for name, of_sizes in measured.items()}
    ours, other = points
    for column in (curve.axis, f"{ours}, ms", f"{other}, ms", "÷"):
        made.add_column(column, justify="right")
    for size in points[ours]:
        both = [points[name][size] for name in (ours, other)]
        ratios = [a / b for a, b in zip(*(measured[n][size] for n in points), strict=True)]
        shown = [f"{1e3 * one:.3g}" for one in both]
        made.add_row(f"{size:,}".replace(",", " "), *shown, f"{statistics.median(ratios):.2f}")
    made.add_row("exponent", *(f"{exponent(points[name]):.2f}" for name in points), "")
    return made


def draw(found: list[tuple[Curve, Measured]], path: Path) -> None:
    """Draw small multiples, log against log."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = math.ceil(len(found) / 2)
    figure, axes = plt.subplots(2, columns, figsize=(4 * columns, 7), layout="constrained")
    for axis in axes.flat[len(found) :]:
        axis.set_visible(False)
    for (curve, measured), axis in zip(found, axes.flat, strict=False):
        for (name, of_sizes), color in zip(measured.items(), ("#0072b2", "#888888"), strict=True):
            points = medians(of_sizes)
            label = f"{name}: n^{exponent(points):.2f}"
            times = [1e3 * one for one in points.values()]
            axis.loglog(list(points), times, "o-", color=color, label=label, markersize=4)
        axis.set_title(curve.name, loc="left", fontsize=11)
        axis.set_xlabel(curve.axis)
        axis.set_ylabel("ms")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="the first two sizes, one turn")
    arguments = parser.parse_args()
    curves = QUICK if arguments.quick else CURVES
    found = []
    for curve in curves:
        found.append((curve, measure(curve, 1 if arguments.quick else arguments.turns)))
        Console(width=120).print(table(*found[-1], box.SIMPLE_HEAD))
    arguments.folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "curves": [
            {"name": curve.name, "axis": curve.axis, "seconds": measured}
            for curve, measured in found
        ],
    }
    records.write(arguments.folder / "scaling.json", figures)
    line = Text(sentence(machine()))
    tables = Group(*(table(*one, box.MARKDOWN) for one in found), Text(), line)
    write_markdown(tables, arguments.folder / "scaling.md")
    draw(found, arguments.folder / "scaling.png")


if __name__ == "__main__":
    main()
