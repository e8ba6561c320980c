"""What the guard costs: a step between checks, a check with its checkpoint.

    python bench/guard.py FOLDER [--json FILE]

The peer is ``dd conv=fsync`` of as many bytes into the same folder, in turns.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import cost_figures
import records
import torch
from log_round_trip import dd, seconds
from torch import nn

from cl_optim import EWCAdamW
from cl_optim.retention import Evaluation, RetentionGuard

STEPS = 200_000


def main() -> None:
    parser = records.parser(__doc__)
    parser.add_argument("folder", type=Path, help="a folder on the disk to measure")
    arguments = parser.parse_args()
    model = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(40)])
    optimizer = EWCAdamW(model.named_parameters())
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    optimizer.consolidate(None)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        path = Path(name)
        evaluation = Evaluation("old", lambda model: 1.0)
        guard = RetentionGuard(model, optimizer, [evaluation], every=10**9, folder=path / "guard")
        guard.start()
        size = sum(file.stat().st_size for file in (path / "guard").iterdir())
        steps = seconds(lambda: [guard.step() for _ in range(STEPS)])
        turns = [{"check": seconds(guard.check), "dd": dd(path, size)} for _ in range(9)]
    weights = sum(param.numel() for param in model.parameters())
    figures = {"weights": weights, "bytes": size, "step": steps / STEPS, "turns": turns}
    print(cost_figures.guard_numbers(figures))
    records.write(arguments.json, figures)


if __name__ == "__main__":
    main()
