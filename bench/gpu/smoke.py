"""Does each kernel give what its reference gives, called once, and replayed from a CUDA graph?

`python -m gpu.smoke` also writes how many kernels differ; `python -m gpu.smoke NAME…` runs the
cases whose names contain one of these, without graphs, as for a sanitizer.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from contenders import LAMBDA, Problem, ewc
from torch import Tensor

from cl_optim import EWCAdamW
from cl_optim import functional as F
from cl_optim.ops import gram, squared_grad
from gpu import device as devices
from gpu import errors, report
from gpu.device import Device
from gpu.projection import optimality
from gpu.report import Check
from gpu.step import Shapes, allowed

# Tensors of several units of work and of less than one, of odd sizes.
SHAPES: Shapes = [(700, 300), (257,), (33, 5), (1,), (64, 128)]
TINY: Shapes = [(65, 70), (257,), (33, 5), (1,)]


@dataclass
class Case:
    """A call, its reference, and what both have written.

    Attributes:
        run: Calls the kernel, on tensors that stay where they are.
        reference: Does the same to tensors of its own.
        results: The kernel's results and the reference's.
        allowed: The largest relative error of a result.
    """

    run: Callable[[], object]
    reference: Callable[[], object]
    results: Callable[[], tuple[list[Tensor], list[Tensor]]]
    allowed: float


def step(options: dict[str, Any], device: Device, dtype: torch.dtype = torch.float32) -> Case:
    """A step of EWCAdamW, and its moves."""
    steps, sides, starts = [], [], []
    for implementation in ({"fused": True}, {"fused": False, "foreach": True}):
        torch.manual_seed(0)
        problem = Problem(device.pick(SHAPES, TINY), device.name, dtype)
        steps.append(ewc(**options, **implementation)(problem))
        sides.append(problem.params)
        starts.append([param.detach().clone() for param in problem.params])

    def moves(side: int) -> list[Tensor]:
        return [p.detach() - s for p, s in zip(sides[side], starts[side], strict=True)]

    return Case(steps[0], steps[1], lambda: (moves(0), moves(1)), allowed(options, dtype))


def projected_step(device: Device) -> Case:
    """A step that adds memory rows to the gradients."""
    steps, sides = [], []
    for fused in (True, False):
        torch.manual_seed(0)
        problem = Problem(device.pick(SHAPES, TINY), device.name)
        params: list[Tensor] = [*problem.params]
        optimizer = EWCAdamW(params, ewc_lambda=LAMBDA, fused=fused, foreach=not fused)
        rows = {p: torch.randn(3, *p.shape, device=device.name) * 1e-3 for p in params}
        v = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64, device=device.name)
        steps.append(partial(optimizer.step_projected, rows, dict.fromkeys(rows, v)))
        sides.append((params, [p.detach().clone() for p in params]))

    def moves(side: int) -> list[Tensor]:
        return [p.detach() - s for p, s in zip(*sides[side], strict=True)]

    return Case(steps[0], steps[1], lambda: (moves(0), moves(1)), 1e-5)


def rows_and_grads(
    t: int, dtype: torch.dtype, device: Device
) -> tuple[list[Tensor], list[Tensor], list[int]]:
    torch.manual_seed(0)
    shapes = device.pick(SHAPES, TINY)
    memory = [torch.randn(t, *shape, device=device.name).to(dtype) for shape in shapes]
    return memory, [torch.randn(shape, device=device.name) for shape in shapes], [0] * len(shapes)


def products(
    kernel: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    t: int,
    dtype: torch.dtype,
    device: Device,
) -> Case:
    """The Gram products, or those with the gradient."""
    memory, grads, _ = rows_and_grads(t, dtype, device)
    found: dict[str, Tensor] = {}
    return Case(
        lambda: found.update(here=kernel(memory, grads)),
        lambda: found.update(there=reference(memory, grads)),
        lambda: ([found["here"]], [found["there"]]),
        1e-12,
    )


def combination(t: int, device: Device) -> Case:
    """g ← g + Gᵀv."""
    memory, grads, blocks = rows_and_grads(t, torch.float32, device)
    expected = [grad.clone() for grad in grads]
    v = torch.linspace(0, 1, t, dtype=torch.float64, device=device.name)[None]
    return Case(
        lambda: gram.combine_(grads, memory, v, blocks),
        lambda: gram.combine_reference_(expected, memory, v, blocks),
        lambda: (grads, expected),
        1e-6,
    )


def quadratic_program(problems: int, t: int, device: Device) -> Case:
    """Regular problems, about half of whose rows are active."""
    torch.manual_seed(0)
    rows = torch.randn(problems, t, 2 * t, dtype=torch.float64, device=device.name)
    grads = torch.randn(problems, 2 * t, 1, dtype=torch.float64, device=device.name)
    q, c = rows @ rows.mT, (rows @ grads)[..., 0]
    found: dict[str, Tensor] = {}

    def violation() -> tuple[list[Tensor], list[Tensor]]:
        """Of the conditions that only the solution meets; it needs no reference."""
        return [torch.tensor(optimality(q, c, found["v"]))], [torch.zeros(())]

    return Case(lambda: found.update(v=F.nnqp(q, c).v), lambda: None, violation, 1e-10)


def squares(
    device: Device,
    samples: int,
    tokens: int,
    size: tuple[int, int],
    dtype: torch.dtype = torch.bfloat16,
    packed: bool = False,
) -> Case:
    """Σ g² and dW of a linear map."""
    torch.manual_seed(0)
    out_features, in_features = size
    a = torch.randn(samples, tokens, in_features, device=device.name, dtype=dtype)
    b = torch.randn(samples, tokens, out_features, device=device.name, dtype=dtype)
    cu_seqlens = None
    if packed:
        a, b = a.flatten(0, 1), b.flatten(0, 1)
        cu_seqlens = torch.arange(samples + 1, device=device.name) * tokens
    here = [torch.zeros(size, device=device.name) for _ in range(2)]
    there = [torch.zeros(size, device=device.name, dtype=torch.float64) for _ in range(2)]

    def reference() -> None:
        squared_grad.squared_grad_sum_reference_(
            there[0], a.double(), b.double(), there[1], cu_seqlens
        )

    return Case(
        lambda: F.squared_grad_sum_(here[0], a, b, here[1], cu_seqlens),
        reference,
        lambda: (here, there),
        1e-4,
    )


def cases(device: Device) -> dict[str, Callable[[], Case]]:
    """Every kernel, in the variants that differ in code."""
    half, full = torch.bfloat16, torch.float32
    narrow = {"importance_dtype": "log8", "state_dtype": "8bit"}
    kahan = {"importance_dtype": "log8", "state_dtype": "bfloat16", "rounding": "kahan"}
    gram_of = partial(products, gram.gram_per_tensor, gram.gram_per_tensor_reference)
    dots_of = partial(products, gram.dots_per_tensor, gram.dots_per_tensor_reference)
    return {
        "step gradient": lambda: step({"penalty": "gradient"}, device),
        "step decoupled": lambda: step({"penalty": "decoupled"}, device),
        "step proximal, amsgrad": lambda: step({"penalty": "proximal", "amsgrad": True}, device),
        "step tracked": lambda: step({"track_penalty": True}, device),
        "step log8": lambda: step({"importance_dtype": "log8"}, device),
        "step log8, bf16 anchors": lambda: step(
            {"importance_dtype": "log8", "anchor_dtype": "bfloat16"}, device
        ),
        "step log8, 8-bit moments": lambda: step(narrow, device),
        "step bfloat16, Kahan": lambda: step(kahan, device, half),
        "step float64": lambda: step({}, device, torch.float64),
        "step projected": lambda: projected_step(device),
        "gram t = 10": lambda: gram_of(10, full, device),
        "gram t = 10, bfloat16 rows": lambda: gram_of(10, half, device),
        "gram t = 40": lambda: gram_of(40, full, device),
        "dots t = 10": lambda: dots_of(10, full, device),
        "combine t = 10": lambda: combination(10, device),
        "quadratic program by warps": lambda: quadratic_program(50, 10, device),
        "quadratic program by blocks": lambda: quadratic_program(3, 100, device),
        "quadratic program in global memory": lambda: quadratic_program(2, 400, device),
        "squares T = 64": lambda: squares(device, 9, 64, (140, 264)),
        "squares T = 512": lambda: squares(device, 4, 512, (136, 264)),
        "squares narrow": lambda: squares(device, 9, 64, (8, 264)),
        "squares packed": lambda: squares(device, 9, 64, (140, 264), packed=True),
        "squares float32": lambda: squares(device, 9, 64, (72, 40), full),
    }


def check(case: Case) -> Check:
    """The largest relative error of a result."""
    here, there = case.results()
    wrong = [errors.relative([a], [b]) for a, b in zip(here, there, strict=True)]
    return Check(next((e for e in wrong if e != e), max(wrong)), case.allowed)


def try_case(name: str, make: Callable[[], Case], device: Device, graphs: bool) -> bool:
    """Whether a case is right; says what is not."""
    try:
        case = make()
        case.run()
        case.reference()
        checks = {"called": check(case)}
        if graphs:
            replay = device.graph(case.run)  # two calls, and none that counts while it is captured
            replay()
            for _ in range(3):
                case.reference()
            checks["replayed"] = check(case)
    except Exception:
        traceback.print_exc()
        report.append({"differs": name, "error": traceback.format_exc(limit=-1)})
        return False
    for how, one in checks.items():
        if not one.right:
            report.append({"differs": name, "how": how, "error": str(one.error)})
        print(f"{name:36}{how:10}{one.error:10.2e} {'ok' if one.right else 'WRONG'}", flush=True)
    return all(one.right for one in checks.values())


def main() -> None:
    device = devices.find()
    parts = sys.argv[1:]
    chosen = {
        name: make
        for name, make in cases(device).items()
        if not parts or any(part in name for part in parts)
    }
    if not chosen:
        sys.exit(f"No case has {' or '.join(parts)} in its name.")
    right = [try_case(name, make, device, graphs=not parts) for name, make in chosen.items()]
    differing = right.count(False)
    if not parts:
        report.figure("kernels that differ from their reference", differing, of=len(right))
    sys.exit(differing > 0)


if __name__ == "__main__":
    main()
