"""The methods that the demo compares; experiments.py has their settings."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from cl_optim import GEM, EWCAdamW, estimate_fisher
from cl_optim.demo.scenarios import Split
from cl_optim.retention import ProgressiveNetwork, ReplayBuffer

WEIGHT_DECAY = 1e-2  # AdamW's default in torch
FISHER_SAMPLES = 500  # nearly as good as all of them (van de Ven 2025, arXiv:2502.11756)
_FISHER_BATCH = 128
MEMORY_SAMPLES = 128  # of each task, kept by GEM; Lopez-Paz & Ranzato 2017 have 256
_MOST_TASKS = 50  # that the command line allows

Base = Literal["adamw", "sgd"]


def base_optimizer(base: Base, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """The optimizer of a method without protection.

    Both in their fastest form, so that the seconds per step are compared with the best.
    """
    if base == "sgd":
        return torch.optim.SGD(model.parameters(), lr=lr, fused=True)
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=WEIGHT_DECAY, fused=True)


def use_head(model: nn.Module, task: int) -> None:
    """Let a network that has a head for each task use this one's."""
    model.task = task  # type: ignore[assignment]  # a number, not a module


def head_in_use(model: nn.Module) -> int:
    """The task whose head the network uses; 0 for a network that does not know tasks."""
    return int(getattr(model, "task", 0))


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
        """What the last step ran on."""
        return "torch"

    @property
    def conflicts(self) -> list[NDArray[np.float64]]:
        """Of each task so far, how often its gradient was in conflict; only GEM knows."""
        return []

    def begin_task(self, number: int) -> None:
        """Prepare for a task, counted from 0."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss of a batch of the task whose head is in use."""
        return F.cross_entropy(self.model(x), y)

    def after_step(self) -> None:
        """Look at what the step did; its time does not count."""

    def end_task(self, train: Split) -> None:
        """Protect what has been learned; without protection there is nothing to do."""


class ProtectedLearner(Learner):
    """EWCAdamW, consolidated at the end of each task."""

    optimizer: EWCAdamW

    def __init__(self, model: nn.Module, method: Protected) -> None:
        optimizer = EWCAdamW(
            model.named_parameters(),
            lr=method.lr,
            weight_decay=WEIGHT_DECAY,
            ewc_lambda=method.ewc_lambda,
            penalty=method.penalty,
        )
        super().__init__(model, optimizer)
        self.importance = method.importance
        self.anchors = method.anchors

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
        """For each task so far the fractions that `Run.conflicts` has: [1 + t] for t memories."""
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


class ReplayingLearner(Learner):
    """Another learner whose batches get samples of earlier tasks, each answered by its own head."""

    def __init__(self, inner: Learner, samples: int, ratio: float) -> None:
        super().__init__(inner.model, inner.optimizer)
        self.inner, self.samples, self.ratio = inner, samples, ratio
        self.buffer = ReplayBuffer(_MOST_TASKS * samples)  # is never full: a task keeps its share

    @property
    def backend(self) -> str:
        """The other learner's."""
        return self.inner.backend

    def begin_task(self, number: int) -> None:
        """Nothing: `end_task` fills the buffer."""
        self.inner.begin_task(number)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean over new and replayed samples."""
        now = head_in_use(self.model)
        ((x, y, tasks),) = self.buffer.mix([(x, y, torch.full_like(y, now))], self.ratio)
        total = x.new_zeros(())
        for task in tasks.unique().tolist():
            use_head(self.model, task)
            rows = tasks == task
            total = total + F.cross_entropy(self.model(x[rows]), y[rows], reduction="sum")
        use_head(self.model, now)
        return total / len(x)

    def end_task(self, train: Split) -> None:
        """Keep the first samples of the task, as GEM does, beside those of earlier tasks."""
        self.inner.end_task(train)
        x, y = train.x[: self.samples], train.y[: self.samples]
        self.buffer.add((x, y, torch.full_like(y, head_in_use(self.model))))


class _Column(nn.Module):
    """A network with one hidden layer and one head."""

    def __init__(self, features: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(features, hidden)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [samples, classes]."""
        logits: Tensor = self.head(F.relu(self.hidden(x)))
        return logits


class _Columns(nn.Module):
    """A progressive network; the newest column answers for tasks that have none yet."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        (width, features), (classes, _) = (
            model.get_parameter(name).shape for name in ("hidden.weight", "heads.0.weight")
        )
        factory = partial(_Column, features, width, classes)
        with torch.random.fork_rng(devices=[]):
            self.net = ProgressiveNetwork(factory, lateral=["head"])
            # The weights that other methods begin with.
            self.net.columns[0].load_state_dict(
                {
                    name.replace("heads.0", "head"): value
                    for name, value in model.state_dict().items()
                    if name.startswith(("hidden", "heads.0"))
                }
            )
        self.task = 0

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the task's classes, [samples, classes]."""
        logits: Tensor = self.net(x, task=min(self.task, len(self.net) - 1))
        return logits


class ProgressiveLearner(Learner):
    """A progressive network; each column is trained by an AdamW of its own."""

    def __init__(self, model: nn.Module, method: Progressive) -> None:
        self.columns, self.lr = _Columns(model), method.lr
        super().__init__(self.columns, self._new_optimizer())

    def begin_task(self, number: int) -> None:
        """Add a column, unless it is the first task, with weights that the task's number fixes."""
        if number:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(number)
                self.columns.net.add_column()
            self.optimizer = self._new_optimizer()

    def _new_optimizer(self) -> torch.optim.Optimizer:
        new = [param for _, param in self.columns.net.new_parameters()]
        return torch.optim.AdamW(new, lr=self.lr, weight_decay=WEIGHT_DECAY, fused=True)


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

    @property
    def protects(self) -> bool:
        """Whether it does anything against forgetting."""
        return False

    def learner(self, model: nn.Module) -> Learner:
        """Start training a model."""
        return Learner(model, base_optimizer("adamw", model, self.lr))


@dataclass(frozen=True)
class PlainSGD(Method):
    """Plain SGD, without momentum."""

    def learner(self, model: nn.Module) -> Learner:
        """Start training a model."""
        return Learner(model, base_optimizer("sgd", model, self.lr))


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

    @property
    def protects(self) -> bool:
        """Yes."""
        return True

    def learner(self, model: nn.Module) -> Learner:
        """Start training a model."""
        return ProtectedLearner(model, self)


@dataclass(frozen=True)
class Remembering(Method):
    """GEM around an optimizer.

    Attributes:
        base: The optimizer.
        refresh_every: Steps between computations of a memory row; None: it is computed once.
        average: A-GEM: one row, the mean of all.
        samples: How many of each task are kept.
    """

    base: Base = "adamw"
    refresh_every: int | None = 1
    average: bool = False
    samples: int = MEMORY_SAMPLES

    @property
    def protects(self) -> bool:
        """Yes."""
        return True

    def learner(self, model: nn.Module) -> Learner:
        """Start training a model."""
        return RememberingLearner(model, self)


@dataclass(frozen=True)
class Replaying(Method):
    """AdamW on batches with samples of earlier tasks.

    Attributes:
        samples: How many of each task are kept.
        ratio: The share of replayed samples in a batch.
    """

    samples: int = MEMORY_SAMPLES
    ratio: float = 0.5

    @property
    def protects(self) -> bool:
        """Yes."""
        return True

    def learner(self, model: nn.Module) -> Learner:
        """Start training a model."""
        return ReplayingLearner(super().learner(model), self.samples, self.ratio)


@dataclass(frozen=True)
class ProtectedReplaying(Protected):
    """EWCAdamW on batches with samples of earlier tasks.

    Attributes:
        samples: How many of each task are kept.
        ratio: The share of replayed samples in a batch.
    """

    samples: int = MEMORY_SAMPLES
    ratio: float = 0.5

    def learner(self, model: nn.Module) -> Learner:
        """Start training a model."""
        return ReplayingLearner(super().learner(model), self.samples, self.ratio)


@dataclass(frozen=True)
class Progressive(Method):
    """A column of a progressive network for each task, by AdamW."""

    @property
    def protects(self) -> bool:
        """Yes."""
        return True

    def learner(self, model: nn.Module) -> Learner:
        """Start training a model."""
        return ProgressiveLearner(model, self)
