"""Evaluations that watch a run, and what they measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

Role = Literal["old", "new", "mixed"]


@dataclass(frozen=True)
class Evaluation:
    """A number that says how well a model does a task.

    Attributes:
        name: In logs and the report.
        measure: Takes the model, which is in eval mode, and returns the number. It runs without
            gradients, and the random numbers it draws are not missed by the training.
        role: ``"old"``: is not to be forgotten. ``"new"``: is being learned. ``"mixed"``: is only
            watched.
        higher_is_better: An accuracy, or a loss.

    Raises:
        ValueError: The role is another, or the name is empty.
    """

    name: str
    measure: Callable[[nn.Module], float]
    role: Role = "old"
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        if self.role not in get_args(Role):
            raise ValueError(
                f"role of evaluation {self.name!r} must be one of {get_args(Role)}, not "
                f"{self.role!r}."
            )
        if not self.name:
            raise ValueError("name of an evaluation must not be empty.")

    def relative_loss(self, value: float, baseline: float) -> float:
        """Return what part of the baseline is lost; negative: gained. Not finite: ∞.

        Of a baseline of zero (a new task before it is learned) any change is infinite.
        """
        if not math.isfinite(value):
            return math.inf
        loss = baseline - value if self.higher_is_better else value - baseline
        if baseline == 0.0:
            return math.copysign(math.inf, loss) if loss else 0.0
        return loss / abs(baseline)


@dataclass(frozen=True)
class Measured:
    """One evaluation at one step.

    Attributes:
        evaluation: What was measured.
        value: Its number.
        baseline: The number at the start of the run.
        loss: What part of the baseline is lost; ∞ where the value is not finite.
    """

    evaluation: Evaluation
    value: float
    baseline: float
    loss: float


@dataclass(frozen=True)
class Check:
    """All evaluations at one step, and what followed.

    Attributes:
        step: Training steps taken.
        measured: One entry for each evaluation, in their order.
        breached: Names of the old tasks of which more than the threshold is lost, and of any
            whose number is not finite.
        ewc_lambda: The largest λ of the optimizer's groups; None where it has none.
        action: What the guard did, in words; empty where nothing.
        rolled_back_to: The step that everything went back to; None where nothing did.
        stopped: Whether it stopped training.
    """

    step: int
    measured: tuple[Measured, ...]
    breached: tuple[str, ...]
    ewc_lambda: float | None
    action: str = ""
    rolled_back_to: int | None = None
    stopped: bool = False

    @property
    def is_finite(self) -> bool:
        """Whether all numbers are."""
        return all(math.isfinite(one.value) for one in self.measured)
