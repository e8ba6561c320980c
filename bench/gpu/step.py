"""Is a protected step as fast as memory, and as fast as one without protection?

`python -m gpu.step`; `python -m gpu.step compiled` adds what torch.compile makes of a foreach
penalty, which takes half a minute.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import torch
from contenders import (
    BFLOAT16_PROTECTED,
    CONTENDERS,
    PROTECTED,
    Problem,
    adamw,
    compilable_foreach,
    ewc,
    foreach_penalty,
    gpt2_shapes,
)

from gpu import device as devices
from gpu import errors, report
from gpu.device import Device
from gpu.report import Check

TURNS, ROUNDS = 5, 10
PLAIN, COPY = "AdamW fused", "36 B per parameter copied"
AUTOGRAD = "AdamW fused + autograd penalty"
HEADLINE = "EWCAdamW gradient"
# Of the move that two steps make, against the reference: moments of 8 bits and weights of 16 are
# rounded, and rounding may fall the other way.
ALLOWED = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}
ALLOWED_NARROW = 1e-2
TINY: list[tuple[int, ...]] = [(8192,), (33, 5), (64,)]

Shapes = list[tuple[int, ...]]


def error(options: dict[str, Any], shapes: Shapes, device: Device, dtype: torch.dtype) -> float:
    """How far the fused step's moves are from the foreach reference's, after two steps."""
    moves = []
    for implementation in ({"fused": True}, {"fused": False, "foreach": True}):
        torch.manual_seed(1)
        problem = Problem(shapes, device.name, dtype)
        step = ewc(**options, **implementation)(problem)
        before = [param.detach().clone() for param in problem.params]
        step()
        step()
        moves.append([p.detach() - b for p, b in zip(problem.params, before, strict=True)])
    return errors.relative(*moves)


def allowed(options: dict[str, Any], dtype: torch.dtype) -> float:
    """The largest `error` that is rounding."""
    narrow = options.get("state_dtype", "float32") != "float32"
    return max(ALLOWED[dtype], ALLOWED_NARROW if narrow else 0.0)


def measure(
    where: str,
    shapes: Shapes,
    device: Device,
    protected: dict[str, dict[str, Any]],
    others: tuple[str, ...],
    dtype: torch.dtype = torch.float32,
) -> tuple[devices.Turns, dict[str, Check]]:
    """All contenders' times, a figure for each, and how right the protected ones are."""
    checks = {
        name: Check(error(options, shapes, device, dtype), allowed(options, dtype))
        for name, options in protected.items()
    }
    torch.manual_seed(0)
    makers = {name: ewc(**options) for name, options in protected.items()}
    makers |= {name: CONTENDERS[name] for name in others}
    steps = {name: make(Problem(shapes, device.name, dtype)) for name, make in makers.items()}
    turns = devices.take_turns(device, steps, TURNS, ROUNDS)
    for name, step in steps.items():
        figure = f"{where}: {name}"
        middle = statistics.median(turns[name])
        report.figure(figure, middle, "ms", check=checks.get(name), turns=turns[name])
        report.figure(f"{figure}, host", devices.host_milliseconds(device, step, ROUNDS), "ms")
        report.figure(f"{figure}, from idle", devices.idle_milliseconds(device, step, ROUNDS), "ms")
    return turns, checks


def headline(device: Device) -> None:
    """GPT-2's 149 tensors, 163 M weights of float32."""
    shapes = device.pick(gpt2_shapes(embeddings=True), TINY)
    protected = {
        name: PROTECTED[name]
        for name in (
            HEADLINE,
            "EWCAdamW tracked",
            "EWCAdamW log8",
            "EWCAdamW log8, bf16 anchors",
            "EWCAdamW log8, 8-bit moments",
        )
    }
    turns, checks = measure("step, 163 M", shapes, device, protected, (PLAIN, COPY, AUTOGRAD))
    report.figure(
        "step float32: share of the copy's bandwidth at 36 B",
        devices.ratio(turns, COPY, HEADLINE),
        check=checks[HEADLINE],
    )
    for short in ("log8", "log8, bf16 anchors"):
        name = f"EWCAdamW {short}"
        against_plain = devices.ratio(turns, name, PLAIN)
        report.figure(f"step {short} / AdamW fused", against_plain, "x", check=checks[name])
    report.figure(
        f"{AUTOGRAD} / step float32",
        devices.ratio(turns, AUTOGRAD, HEADLINE),
        "x",
        check=checks[HEADLINE],
    )


def many_small(device: Device) -> None:
    """1 000 tensors of 64: what the host takes."""
    count = device.pick(1000, 20)
    shapes: Shapes = [(64,)] * count
    protected = {HEADLINE: PROTECTED[HEADLINE]}
    _, checks = measure(f"step, {count} tensors of 64", shapes, device, protected, (PLAIN,))
    step = ewc(**PROTECTED[HEADLINE])(Problem(shapes, device.name))
    step()
    report.figure(
        "step: host time per tensor",
        1e3 * devices.host_milliseconds(device, step, 5 * ROUNDS) / count,
        "us",
        check=checks[HEADLINE],
    )


def syncs(device: Device) -> None:
    """Whether a step waits for the GPU."""
    step = ewc(**PROTECTED["EWCAdamW tracked"])(Problem(TINY, device.name))
    found, why = devices.count_syncs(device, step)
    report.figure("host syncs of a step", found, why=why)


def compiled(device: Device) -> None:
    """What torch.compile makes of a foreach penalty and AdamW, beside ours."""
    shapes = device.pick(gpt2_shapes(embeddings=True), TINY)
    step = device.compiled(compilable_foreach(Problem(shapes, device.name)))
    start = time.perf_counter()
    step()
    device.synchronize()
    begun = time.perf_counter() - start
    report.figure("torch.compile of foreach: before its first step", begun, "s")
    steps = {
        "torch.compile of foreach": step,
        "AdamW fused + foreach penalty": foreach_penalty(Problem(shapes, device.name)),
        PLAIN: adamw(Problem(shapes, device.name)),
        HEADLINE: ewc(**PROTECTED[HEADLINE])(Problem(shapes, device.name)),
    }
    turns = devices.take_turns(device, steps, TURNS, ROUNDS)
    for name in steps:
        over_ours = devices.ratio(turns, name, HEADLINE)
        report.figure(f"{name} / step float32", over_ours, "x", turns=turns[name])


def main() -> None:
    device = devices.find()
    if sys.argv[1:] == ["compiled"]:
        compiled(device)
        return
    headline(device)
    device.forget()
    shapes = device.pick(gpt2_shapes(embeddings=True), TINY)
    measure("step, 163 M of bfloat16", shapes, device, BFLOAT16_PROTECTED, (PLAIN,), torch.bfloat16)
    device.forget()
    one: Shapes = [(device.pick(163_000_000, 5000),)]
    measure("step, 1 tensor of 163 M", one, device, {HEADLINE: PROTECTED[HEADLINE]}, (PLAIN, COPY))
    device.forget()
    many_small(device)
    syncs(device)


if __name__ == "__main__":
    main()
