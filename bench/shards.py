"""What a step of DTensors costs beside torch's AdamW of the same DTensors, in one process.

    python bench/shards.py [--turns 21] [--device cuda] [--json FILE]

A mesh of one process, so that nothing is sent, which nothing would be between several: what is
measured is the host's part of looking through DTensors, and the kernels. Contenders take turns.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable

import cost_figures
import records
import torch
import torch.distributed as dist
from contenders import Problem, adamw, ewc, gpt2_shapes
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

SHAPES = {"85 M weights in 144 tensors": gpt2_shapes(), "1 000 tensors of 64": [(64,)] * 1000}
_STEPS = 3  # in a turn


class SpreadProblem(Problem):
    """Parameters and gradients that are DTensors."""

    def __init__(
        self, shapes: list[tuple[int, ...]], device: str = "cpu", mesh: DeviceMesh | None = None
    ) -> None:
        super().__init__(shapes, device)
        assert mesh is not None
        spread = [
            torch.nn.Parameter(DTensor.from_local(p.detach(), mesh, [Shard(0)]))
            for p in self.params
        ]
        for param, grad in zip(spread, self.grads, strict=True):
            param.grad = DTensor.from_local(grad, mesh, [Shard(0)])
        self.params, self.grads = spread, [p.grad for p in spread]


def seconds(step: Callable[[], None], device: str) -> float:
    """Return the seconds that a step takes, of a turn."""
    start = time.perf_counter()
    for _ in range(_STEPS):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / _STEPS


def measure(shapes: list[tuple[int, ...]], device: str, turns: int) -> dict[str, list[float]]:
    """Return each contender's seconds a step, by turn."""
    mesh = init_device_mesh(device, (1,))
    contenders = {
        "AdamW(fused), DTensors": adamw(SpreadProblem(shapes, device, mesh)),
        "AdamW(fused)": adamw(Problem(shapes, device)),
        "EWCAdamW, DTensors": ewc()(SpreadProblem(shapes, device, mesh)),
        "EWCAdamW": ewc()(Problem(shapes, device)),
    }
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for step in contenders.values():
        for _ in range(2):
            seconds(step, device)
    for turn in range(turns):
        order = list(contenders.items())
        for name, step in order[turn % 4 :] + order[: turn % 4]:
            found[name].append(seconds(step, device))
    return found


def main() -> None:
    """Measure, print, and write JSON."""
    parser = records.parser(__doc__)
    parser.add_argument("--turns", type=int, default=21)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as meeting:
        dist.init_process_group(
            "nccl" if arguments.device == "cuda" else "gloo",
            init_method=f"file://{meeting}/store", rank=0, world_size=1,
        )  # fmt: skip
        torch.manual_seed(0)
        found = {
            name: measure(shapes, arguments.device, arguments.turns)
            for name, shapes in SHAPES.items()
        }
        dist.destroy_process_group()
    figures = {"seconds": found}
    cost_figures.show(cost_figures.shards(figures))
    records.write(arguments.json, figures)


if __name__ == "__main__":
    main()
