"""What the guard costs: a step between checks, a check with its checkpoint.

    python bench/guard.py FOLDER [--json FILE]

The peer is ``dd conv=fsync`` of as many bytes into the same folder, in turns.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import records
import torch
from log_round_trip import dd, seconds
from torch import nn

from cl_optim import EWCAdamW
from cl_optim.retention import Evaluation, RetentionGuard

STEPS = 200_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="a folder on the disk to measure")
    parser.add_argument("--json", type=Path, help="where the figures go")
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
        print(f"a step {1e6 * steps / STEPS:.2f} µs; a checkpoint has {size / 1e6:.0f} MB")
        turns = [{"check": seconds(guard.check), "dd": dd(path, size)} for _ in range(9)]
    for turn in turns:
        print(f"check {turn['check']:.2f} s, dd {turn['dd']:.2f} s")
    if arguments.json:
        weights = sum(param.numel() for param in model.parameters())
        step = steps / STEPS
        records.write(arguments.json, weights=weights, bytes=size, step=step, turns=turns)


if __name__ == "__main__":
    main()
