"""Methods that the demo does not have: plain SGD, replay, progressive networks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_optim.demo.arguments import MAX_TASKS
from cl_optim.demo.methods import (
    MEMORY_SAMPLES,
    WEIGHT_DECAY,
    Learner,
    Method,
    Protected,
    base_optimizer,
    head_in_use,
    use_head,
)
from cl_optim.demo.scenarios import Split
from cl_optim.retention import ProgressiveNetwork, ReplayBuffer


class ReplayingLearner(Learner):
    """Another learner whose batches get samples of earlier tasks, each answered by its own head."""

    def __init__(self, inner: Learner, samples: int, ratio: float) -> None:
        super().__init__(inner.model, inner.optimizer)
        self.inner, self.samples, self.ratio = inner, samples, ratio
        self.buffer = ReplayBuffer(MAX_TASKS * samples)  # is never full: a task keeps its share

    @property
    def backend(self) -> str:
        """Name what the other learner's last step ran on."""
        return self.inner.backend

    def begin_task(self, number: int) -> None:
        """Let the other learner prepare; `end_task` fills the buffer."""
        self.inner.begin_task(number)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the mean over new and replayed samples."""
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
        """Return logits [samples, classes]."""
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
        """Return logits of the task's classes, [samples, classes]."""
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
class PlainSGD(Method):
    """Plain SGD, without momentum."""

    def learner(self, model: nn.Module) -> Learner:
        """Start training a model."""
        return Learner(model, base_optimizer("sgd", model, self.lr))


@dataclass(frozen=True)
class Replaying(Method):
    """AdamW on batches with samples of earlier tasks.

    Attributes:
        samples: How many of each task are kept.
        ratio: The share of replayed samples in a batch.
    """

    protects: ClassVar[bool] = True
    samples: int = MEMORY_SAMPLES
    ratio: float = 0.5

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

    protects: ClassVar[bool] = True

    def learner(self, model: nn.Module) -> Learner:
        """Start training a model."""
        return ProgressiveLearner(model, self)
