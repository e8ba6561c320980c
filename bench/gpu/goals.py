"""What a GPU is to show: every goal, with the figure that it is about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Goal:
    """One figure's goal.

    Attributes:
        name: The figure's.
        comparison: How the figure must be to the limit.
        limit: In the figure's unit.
        unit: The figure's.
        only_on_gpu: Why a rehearsal on a CPU has no such figure; empty where it has.
    """

    name: str
    comparison: Literal["<=", ">="]
    limit: float
    unit: str
    only_on_gpu: str = ""

    def met(self, value: float) -> bool:
        """Whether a value meets the goal; NaN does not."""
        return value <= self.limit if self.comparison == "<=" else value >= self.limit


_SANITIZER = "compute-sanitizer counts the errors, which a CPU does not have"
_PEER = "TorchJD takes part only where it is installed"

GOALS = (
    Goal("tests that fail", "<=", 0, ""),
    Goal("tests that pass", ">=", 1, ""),
    Goal("runs of the tests that did not finish", "<=", 0, ""),
    Goal("kernels that differ from their reference", "<=", 0, ""),
    Goal("memcheck errors", "<=", 0, "", _SANITIZER),
    Goal("racecheck errors of the quadratic program", "<=", 0, "", _SANITIZER),
    Goal("synccheck errors of the quadratic program", "<=", 0, "", _SANITIZER),
    Goal("host syncs of a step", "<=", 0, ""),
    Goal("host syncs of a GEM step", "<=", 0, ""),
    Goal("host syncs of a Fisher pass", "<=", 0, ""),
    Goal("step float32: share of the copy's bandwidth at 36 B", ">=", 0.95, ""),
    Goal("step log8 / AdamW fused", "<=", 1.03, "x"),
    Goal("step log8, bf16 anchors / AdamW fused", "<=", 1.00, "x"),
    Goal("AdamW fused + autograd penalty / step float32", ">=", 8, "x"),
    Goal("step: host time per tensor", "<=", 0.6, "us"),
    Goal("Gram t = 10: share of the read's bandwidth", ">=", 0.90, ""),
    Goal("projection / floor", "<=", 1.15, "x"),
    Goal("TorchJD / projection", ">=", 2.5, "x", _PEER),
    Goal("4096 quadratic programs of 16 rows", "<=", 0.15, "ms"),
    *(
        Goal(f"sum of squares + dW, {size}, T = {tokens}: share of cuBLAS dW", ">=", share, "")
        for size in ("768-768", "768-3072", "2048-8192")
        for tokens, share in ((128, 0.65), (512, 0.80))
    ),
    Goal("Fisher pass / forward + backward, 163 M, 8 x 512", "<=", 1.15, "x"),
    Goal("training with the Fisher / forward + backward, 163 M, 8 x 512", "<=", 1.08, "x"),
    Goal("training with the Fisher / forward + backward, 814 M, 16 x 512", "<=", 1.00, "x"),
    Goal("protected training step / unprotected, 8 x 512", "<=", 1.01, "x"),
)
BY_NAME = {goal.name: goal for goal in GOALS}
