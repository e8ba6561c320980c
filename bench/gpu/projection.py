"""Is a projection as fast as memory, and how long do quadratic programs and a step of GEM take?"""

from __future__ import annotations

import importlib.util
import math
import statistics
from functools import partial

import torch
from torch import Tensor

from cl_optim import GEM, EWCAdamW
from cl_optim import functional as F
from cl_optim.ops import gram, nnqp
from gpu import device as devices
from gpu import errors, report
from gpu.device import Device
from gpu.gram import GPT2, TINY, Rows
from gpu.report import Check

TURNS, ROUNDS = 5, 5
ROWS = 10
ALLOWED = 1e-6  # a projected gradient is rounded to float32


def optimality(q: Tensor, c: Tensor, v: Tensor) -> float:
    """How far v is from the solution: its gradient w, relative to the sizes of w's terms.

    w is 0 where v > 0, and at least 0 where v = 0.
    """
    w = (q @ v[..., None])[..., 0] + c
    size = (q.abs() @ v[..., None])[..., 0] + c.abs()
    off = torch.where(v > 0, w.abs(), -w) / size
    return float(off.clamp(min=0.0).max()) if bool((v >= 0).all()) else math.inf


def quadratic_programs(device: Device) -> None:
    """Batches of regular problems, half of whose rows are active."""
    for problems, t in device.pick(
        [(1, 10), (4096, 16), (64, 128), (1, 128), (1, 1024)], [(3, 10), (2, 40)]
    ):
        torch.manual_seed(0)
        rows = torch.randn(problems, t, 2 * t, dtype=torch.float64, device=device.name)
        grads = torch.randn(problems, 2 * t, 1, dtype=torch.float64, device=device.name)
        q, c = rows @ rows.mT, (rows @ (grads - rows.mean(1)[..., None]))[..., 0]
        right = Check(optimality(q, c, F.nnqp(q, c).v), 1e-10)
        times = device.milliseconds(partial(F.nnqp, q, c), 20)
        report.figure(
            f"{device.pick(problems, 4096)} quadratic programs of {device.pick(t, 16)} rows",
            statistics.median(times),
            "ms",
            check=right,
        )


class Problem(Rows):
    """GPT-2's gradient and ten rows, half of which are in conflict with it."""

    def __init__(self, device: Device) -> None:
        shapes = device.pick(GPT2, TINY)
        super().__init__(shapes, ROWS, torch.float32, device.name)
        for row in self.matrix[::2]:
            self.flat.sub_(row, alpha=0.3)
        self.start = self.flat.clone()
        self.q, self.c = self.quadratic()
        self.active = int((nnqp.nnqp(self.q, self.c, only_violated=True).v > 0).sum())
        self.state = nnqp.new_state(1, ROWS, device.name)

    def quadratic(self) -> tuple[Tensor, Tensor]:
        both = gram.total(gram.gram_per_tensor(self.memory, self.grads))[None]
        return both[:, :ROWS, :ROWS], both[:, :ROWS, ROWS]

    def recomputed(self) -> None:
        """All of it: products, program, sum.

        The program is that of the first call, in which rows are in conflict with the gradient; a
        gradient that was projected is in conflict with none.
        """
        q, _ = self.quadratic()
        v = nnqp.nnqp(q, self.c, only_violated=True).v
        gram.combine_(self.grads, self.memory, v, self.blocks)

    def between_refreshes(self) -> None:
        """What a step does whose rows are as old as the last one's."""
        gram.total(gram.dots_per_tensor(self.memory, self.grads))
        v = nnqp.nnqp(self.q, self.c, only_violated=True, state=self.state).v
        gram.combine_(self.grads, self.memory, v, self.blocks)

    def check(self) -> Check:
        """Of the projected gradient, against float64 and the reference's active set."""
        products = self.products()
        solution = nnqp.nnqp_reference(
            products[None, :ROWS, :ROWS], products[None, :ROWS, ROWS], only_violated=True
        )
        expected = self.flat.double() + solution.v[0] @ self.matrix.double()
        self.recomputed()
        found = self.flat.clone()
        self.flat.copy_(self.start)
        return Check(errors.relative([found], [expected]), ALLOWED)


def projection(device: Device) -> None:
    """One projection, with its rows' products and without, against the floor and TorchJD."""
    torch.manual_seed(0)
    problem = Problem(device)
    right = problem.check()
    copied = torch.empty_like(problem.matrix)
    calls: dict[str, devices.Call] = {
        "rows recomputed": problem.recomputed,
        "between refreshes": problem.between_refreshes,
        "copy of the rows": lambda: copied.copy_(problem.matrix),
    }
    if importlib.util.find_spec("torchjd") is not None:
        from torchjd.aggregation import DualProj

        weights = torch.zeros(ROWS + 1, device=device.name)
        weights[-1] = 1.0
        aggregator = DualProj(pref_vector=weights)
        both = torch.cat([problem.matrix, problem.start[None]])
        calls["TorchJD"] = lambda: aggregator(both)
    turns = devices.take_turns(device, calls, TURNS, ROUNDS)
    # Rows and gradient are read for the products; the active rows and the gradient again, for the
    # sum, which is written.
    passes = (ROWS + 1 + problem.active + 2) / (2 * ROWS)
    turns["floor"] = [passes * time for time in turns["copy of the rows"]]
    for name, times in turns.items():
        report.figure(
            f"projection: {name}", statistics.median(times), "ms", check=right, turns=times
        )
    over_floor = devices.ratio(turns, "rows recomputed", "floor")
    report.figure("projection / floor", over_floor, "x", check=right, active_rows=problem.active)
    if "TorchJD" in turns:
        ratio = devices.ratio(turns, "TorchJD", "rows recomputed")
        report.figure("TorchJD / projection", ratio, "x", check=right)


def steps(device: Device) -> None:
    """A step of GEM around EWCAdamW, between refreshes."""
    torch.manual_seed(0)
    shapes = device.pick(GPT2, TINY)
    rows = Rows(shapes, ROWS, torch.float32, device.name)
    params = [torch.nn.Parameter(torch.randn_like(grad) * 0.02) for grad in rows.grads]
    for param, grad in zip(params, rows.grads, strict=True):
        param.grad = grad
    optimizer = GEM(EWCAdamW(params, fused=True))
    for k in range(ROWS):
        row = partial(torch.autograd.backward, params, [part[k] for part in rows.memory])
        optimizer.remember(str(k), row, refresh_every=None)
    calls: dict[str, devices.Call] = {
        "EWCAdamW alone": optimizer.optimizer.step,
        "GEM around it, between refreshes": optimizer.step,
    }
    turns = devices.take_turns(device, calls, TURNS, ROUNDS)
    for name, times in turns.items():
        host = devices.host_milliseconds(device, calls[name], ROUNDS)
        report.figure(f"step, 124 M: {name}", statistics.median(times), "ms", host_ms=host)
    found, why = devices.count_syncs(device, optimizer.step)
    report.figure("host syncs of a GEM step", found, why=why)


def main() -> None:
    device = devices.find()
    quadratic_programs(device)
    projection(device)
    device.forget()
    steps(device)


if __name__ == "__main__":
    main()
