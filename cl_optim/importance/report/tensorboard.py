"""The log as scalars for TensorBoard."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

from cl_optim.importance import watch
from cl_optim.importance.statistics import SHARES

if TYPE_CHECKING:
    from cl_optim.importance.log import ImportanceLog


class ScalarWriter(Protocol):
    """What a ``SummaryWriter`` of torch or tensorboardX has."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        """Add a number to a curve."""


def add_log(log: ImportanceLog, writer: ScalarWriter) -> None:
    """Add a log's figures: ``importance/…`` by number of the task, ``training/…`` by step."""
    for number, task in enumerate(log.tasks, start=1):
        record = log[task]
        for layer, summary in record.layers.items():
            writer.add_scalar(f"importance/mean/{layer}", summary.mean, number)
            writer.add_scalar(f"importance/largest/{layer}", summary.largest, number)
        for weight, (output, input) in record.effective_ranks.items():
            writer.add_scalar(f"importance/rank/output/{weight}", output, number)
            writer.add_scalar(f"importance/rank/input/{weight}", input, number)
        for share, carriers in zip(SHARES, record.whole.carriers, strict=True):
            writer.add_scalar(f"importance/carriers/{share:.0%}", carriers, number)
    step = 0
    for entries in watch.read(log.path / "training"):
        for entry in entries:
            at = step + entry["step"]
            penalties = []
            for layer, values in entry["layers"].items():
                penalty, drift = (
                    math.nan if values[key] is None else values[key] for key in ("penalty", "drift")
                )
                writer.add_scalar(f"training/penalty/{layer}", penalty, at)
                writer.add_scalar(f"training/drift/{layer}", drift, at)
                penalties.append(penalty)
            total = math.fsum(penalties)
            writer.add_scalar("training/penalty", total, at)
        step += entries[-1]["step"]
