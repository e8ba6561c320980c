"""The methods that the demo compares; experiments.py has their settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from cl_optim import EWCAdamW, estimate_fisher
from cl_optim.demo.scenarios import Split

WEIGHT_DECAY = 1e-2  # AdamW's default in torch
FISHER_SAMPLES = 500  # nearly as good as all of them (van de Ven 2025, arXiv:2502.11756)
_FISHER_BATCH = 128


class Learner:
    """A network in training: its optimizer, and what a method does when a task ends.

    Attributes:
        optimizer: Takes the steps.
    """

    optimizer: torch.optim.Optimizer

    def __init__(self, model: nn.Module, lr: float) -> None:
        # AdamW in its fastest form, so that the seconds per step are compared with the best.
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=lr, weight_decay=WEIGHT_DECAY, fused=True
        )

    @property
    def backend(self) -> str:
        """What the last step ran on."""
        return "torch"

    def end_task(self, train: Split) -> None:
        """Protect what has been learned; plain AdamW does nothing here."""


class ProtectedLearner(Learner):
    """EWCAdamW, consolidated at the end of each task."""

    optimizer: EWCAdamW

    def __init__(self, model: nn.Module, method: Protected) -> None:
        self.model = model
        self.importance = method.importance
        self.anchors = method.anchors
        self.optimizer = EWCAdamW(
            model.named_parameters(),
            lr=method.lr,
            weight_decay=WEIGHT_DECAY,
            ewc_lambda=method.ewc_lambda,
            penalty=method.penalty,
        )

    @property
    def backend(self) -> str:
        """What the last step ran on: ``"cpu"`` is the compiled extension."""
        return self.optimizer.backend

    def end_task(self, train: Split) -> None:
        """Make the weights of now the anchor; add this task's importance to the earlier ones'."""
        if self.importance == "ones":
            self.optimizer.consolidate(None, decay=0.0)  # L2-SP: F = 1, however many tasks
            return
        fisher = estimate_fisher(
            self.model,
            torch.split(train.x, _FISHER_BATCH),  # the exact Fisher needs no labels
            labels="exact",
            max_samples=FISHER_SAMPLES,
            progress=False,
        )
        self.optimizer.consolidate(fisher, decay=1.0, anchors=self.anchors)


@dataclass(frozen=True)
class Method:
    """Plain AdamW, on one task after another or on all at once.

    Attributes:
        key: In JSON.
        label: In tables and pictures.
        lr: Learning rate.
        joint: Train on all tasks together: the ceiling, not a method of continual learning.
    """

    key: str
    label: str
    lr: float
    joint: bool = False

    def learner(self, model: nn.Module) -> Learner:
        """Start training a model."""
        return Learner(model, self.lr)


@dataclass(frozen=True)
class Protected(Method):
    """EWCAdamW with one form of the penalty.

    Attributes:
        ewc_lambda: λ.
        penalty: The penalty's form.
        importance: The exact Fisher (EWC), or one for every weight (L2-SP).
        anchors: The newest weights (online EWC), or the sum of all tasks' quadratics.
    """

    ewc_lambda: float = 1.0
    penalty: Literal["gradient", "decoupled", "proximal"] = "gradient"
    importance: Literal["fisher", "ones"] = "fisher"
    anchors: Literal["latest", "exact"] = "latest"

    def learner(self, model: nn.Module) -> Learner:
        """Start training a model."""
        return ProtectedLearner(model, self)
