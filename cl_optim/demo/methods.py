"""The methods that the demo compares; experiments.py has their settings."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from cl_optim import GEM, EWCAdamW, Importance, ImportanceLog, InputProjection, estimate_fisher
from cl_optim.demo.scenarios import Split
from cl_optim.optim.settling import settle

WEIGHT_DECAY = 1e-2  # AdamW's default in torch
FISHER_SAMPLES = 500  # nearly as good as all of them (van de Ven 2025, arXiv:2502.11756)
_FISHER_BATCH = 128
_WATCH_EVERY = 10  # steps
MEMORY_SAMPLES = 128  # of each task, kept by GEM; Lopez-Paz & Ranzato 2017 have 256

Base = Literal["adamw", "sgd"]
Structure = Literal["diagonal", "kronecker"]


def base_optimizer(base: Base, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Return the optimizer of a method without protection.

    Both in their fastest form, so that the seconds per step are compared with the best.
    """
    if base == "sgd":
        return torch.optim.SGD(model.parameters(), lr=lr, fused=True)
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=WEIGHT_DECAY, fused=True)


def use_head(model: nn.Module, task: int) -> None:
    """Let a network that has a head for each task use this one's."""
    model.task = task  # type: ignore[assignment]  # a number, not a module


def head_in_use(model: nn.Module) -> int:
    """Return the task whose head the network uses; 0 for a network that does not know tasks."""
    return int(getattr(model, "task", 0))


def exact_fisher(model: nn.Module, train: Split, structure: Structure) -> Importance:
    """Estimate the Fisher information of the head that is in use; it needs no labels."""
    return estimate_fisher(
        model,
        torch.split(train.x, _FISHER_BATCH),
        labels="exact",
        max_samples=FISHER_SAMPLES,
        structure=structure,
        progress=False,
    )


class Learner:
    """A network in training: its optimizer, and what a method does when a task begins and ends.

    Attributes:
        model: What is trained.
        optimizer: Takes the steps.
    """

    optimizer: torch.optim.Optimizer

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model = model
        self.optimizer = optimizer

    @property
    def backend(self) -> str:
        """Name what the last step ran on."""
        return "torch"

    @property
    def conflicts(self) -> list[NDArray[np.float64]]:
        """Say how often each task's gradient was in conflict; only GEM knows."""
        return []

    def begin_task(self, number: int) -> None:
        """Prepare for a task, counted from 0."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss of a batch of the task whose head is in use."""
        return F.cross_entropy(self.model(x), y)

    def after_step(self) -> None:
        """Look at what the step did; its time does not count."""

    def settle(self) -> None:
        """Let what a method does every so many steps be done, before the network is looked at."""
        settle(self.optimizer)

    def end_task(self, train: Split) -> None:
        """Protect what has been learned; without protection there is nothing to do."""

    def record(self, log: ImportanceLog, task: str) -> None:
        """Put what the task that has ended needs into the log; only EWC knows."""

    def watch(self, log: ImportanceLog) -> AbstractContextManager[object]:
        """Let the log follow the training; only where weights are protected."""
        return nullcontext()


class ProtectedLearner(Learner):
    """EWCAdamW, consolidated at the end of each task."""

    optimizer: EWCAdamW

    def __init__(self, model: nn.Module, method: Protected) -> None:
        optimizer = EWCAdamW(
            model.named_parameters(),
            lr=method.lr,
            weight_decay=WEIGHT_DECAY,
            ewc_lambda=method.ewc_lambda,
            strength=method.strength,
            penalty=method.penalty,
            importance_dtype=method.importance_dtype,
            anchor_dtype=method.anchor_dtype,
            state_dtype=method.state_dtype,
        )
        super().__init__(model, optimizer)
        self.importance = method.importance
        self.structure = method.structure
        self.anchors = method.anchors
        self._fisher: Importance | None = None  # of the task that ended last

    @property
    def backend(self) -> str:
        """Name what the last step ran on: ``"cpu"`` is the compiled extension."""
        return self.optimizer.backend

    def end_task(self, train: Split) -> None:
        """Make the weights of now the anchor; add this task's importance to the earlier ones'."""
        if self.importance == "ones":
            self.optimizer.consolidate(None, decay=0.0)  # L2-SP: F = 1, however many tasks
            return
        self._fisher = exact_fisher(self.model, train, self.structure)
        self.optimizer.consolidate(self._fisher, decay=1.0, anchors=self.anchors)

    def record(self, log: ImportanceLog, task: str) -> None:
        """Record the task's Fisher information, and the weights that it left."""
        if self._fisher is not None:
            params = dict(self.model.named_parameters())
            log.record(task, self._fisher, model=self.model, anchors=params)

    def watch(self, log: ImportanceLog) -> AbstractContextManager[object]:
        """Follow penalty and drift."""
        return log.watch(self.optimizer, every=_WATCH_EVERY)


class ProjectingLearner(Learner):
    """AdamW, whose updates are kept away from the inputs of earlier tasks."""

    optimizer: InputProjection

    def __init__(self, model: nn.Module, method: Projecting) -> None:
        base = base_optimizer("adamw", model, method.lr)
        super().__init__(model, InputProjection(base, strength=method.strength, every=method.every))

    def end_task(self, train: Split) -> None:
        """Add this task's inputs to the earlier ones'."""
        self.optimizer.consolidate(exact_fisher(self.model, train, "kronecker"), model=self.model)


class RememberingLearner(Learner):
    """GEM around AdamW or SGD; some samples of each task are kept."""

    optimizer: GEM

    def __init__(self, model: nn.Module, method: Remembering) -> None:
        base = base_optimizer(method.base, model, method.lr)
        super().__init__(model, GEM(base, average=method.average))
        self.samples = method.samples
        self.refresh_every = method.refresh_every
        self._steps: list[NDArray[np.float64]] = []  # of the task that is learned now
        self._conflicts: list[NDArray[np.float64]] = []

    @property
    def conflicts(self) -> list[NDArray[np.float64]]:
        """Return the fractions that `Run.conflicts` has: [1 + t] of each task with t memories."""
        return self._conflicts

    def after_step(self) -> None:
        """Count conflicts."""
        if self.optimizer.memories:
            negative = (self.optimizer.conflicts() < 0).numpy()
            each = negative[:0] if self.optimizer.average else negative
            self._steps.append(np.array([negative.any(), *each], dtype=np.float64))

    def end_task(self, train: Split) -> None:
        """Remember the first samples of the task; the training split is in random order."""
        self._conflicts.append(np.mean(self._steps, axis=0) if self._steps else np.zeros(0))
        self._steps = []
        x, y = train.x[: self.samples], train.y[: self.samples]
        head = head_in_use(self.model)

        def backward() -> None:
            now = head_in_use(self.model)
            use_head(self.model, head)
            torch.autograd.backward(F.cross_entropy(self.model(x), y))
            use_head(self.model, now)

        self.optimizer.remember(f"task {len(self._conflicts)}", backward, self.refresh_every)


@dataclass(frozen=True)
class Method:
    """Plain AdamW, on one task after another or on all at once.

    Attributes:
        key: In JSON.
        label: In tables and pictures.
        lr: Learning rate.
        joint: Train on all tasks together: the ceiling, not a method of continual learning.
        protects: It does something against forgetting.
    """

    key: str
    label: str
    lr: float
    joint: bool = False
    protects: ClassVar[bool] = False

    def learner(self, model: nn.Module) -> Learner:
        """Start training a model."""
        return Learner(model, base_optimizer("adamw", model, self.lr))


@dataclass(frozen=True)
class Protected(Method):
    """EWCAdamW with one form of the penalty.

    Attributes:
        ewc_lambda: λ, where there is no strength.
        strength: λ without a unit.
        penalty: The penalty's form.
        importance: The exact Fisher (EWC), or one for every weight (L2-SP).
        structure: Of the Fisher information.
        anchors: The newest weights (online EWC), or the sum of all tasks' quadratics.
        importance_dtype: As EWCAdamW's, and so the next two.
        anchor_dtype: How anchors are stored.
        state_dtype: How moments are stored.
    """

    protects: ClassVar[bool] = True
    ewc_lambda: float = 1.0
    strength: float | None = None
    penalty: Literal["gradient", "decoupled", "proximal"] = "gradient"
    importance: Literal["fisher", "ones"] = "fisher"
    structure: Structure = "diagonal"
    anchors: Literal["latest", "exact"] = "latest"
    importance_dtype: Literal["float32", "bfloat16", "log8"] = "float32"
    anchor_dtype: Literal["float32", "bfloat16"] | None = None
    state_dtype: Literal["float32", "bfloat16", "8bit"] = "float32"

    def learner(self, model: nn.Module) -> Learner:
        """Start training a model."""
        return ProtectedLearner(model, self)


@dataclass(frozen=True)
class Projecting(Method):
    """AdamW with its updates projected away from the inputs of earlier tasks.

    Attributes:
        strength: How strongly.
        every: Steps from one projection to the next.
    """

    protects: ClassVar[bool] = True
    strength: float = 10.0
    every: int = 10

    def learner(self, model: nn.Module) -> Learner:
        """Start training a model."""
        return ProjectingLearner(model, self)


@dataclass(frozen=True)
class Remembering(Method):
    """GEM around an optimizer.

    Attributes:
        base: The optimizer.
        refresh_every: Steps between computations of a memory row; None: it is computed once.
        average: A-GEM: one row, the mean of all.
        samples: How many of each task are kept.
    """

    protects: ClassVar[bool] = True
    base: Base = "adamw"
    refresh_every: int | None = 1
    average: bool = False
    samples: int = MEMORY_SAMPLES

    def learner(self, model: nn.Module) -> Learner:
        """Start training a model."""
        return RememberingLearner(model, self)
