"""Training on one task after another, and what is recorded on the way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from cl_optim import ImportanceLog
from cl_optim.demo.methods import Learner, Method, use_head
from cl_optim.demo.scenarios import Scenario, Split, generator

HeldOut = Literal["validation", "test"]

# Weights beyond this have left every useful region; waiting for infinity only makes it later.
_DIVERGED = 1e6


class DivergedError(RuntimeError):
    """Training left the region of useful weights."""


@dataclass(frozen=True)
class Config:
    """What all methods have in common.

    Attributes:
        tasks: How many tasks follow each other.
        epochs: Per task; joint training has as many over all tasks together.
        batch_size: Samples per step.
        hidden: Width of the one hidden layer.
        points: Points of the accuracy curves per task; 0 for no curves.
    """

    tasks: int = 5
    epochs: int = 10
    batch_size: int = 32
    hidden: int = 1000
    points: int = 20


@dataclass(frozen=True)
class Run:
    """One method, trained with one seed.

    Attributes:
        method: What was trained.
        seed: Fixes permutations, initial weights and the order of the samples.
        matrix: R [T, T], the accuracies on all tasks after each; [1, T] for joint training.
        curve_steps: Steps taken at each point of the curves, [points].
        curves: Accuracy on each task at these points, [points, T]; NaN before a task begins.
        step_seconds: Of one training step: forward, backward, optimizer; see :func:`per_step`.
        optimizer_seconds: Of the optimizer in it, likewise.
        end_task_seconds: Of what a method does at a task's end (Fisher, consolidation); the median.
        backend: What the optimizer's steps ran on.
        initial: Accuracy of the untrained network on each task, [T].
        parameters: Of the network at the end.
        seconds: All steps and ends of tasks.
        conflicts: For GEM [T, 1 + T]: the fraction of each task's steps whose gradient had a
            negative product with any memory row, then with the row of each task; NaN where there
            is none. A-GEM has the first number only. For other methods [0, 0].
    """

    method: Method
    seed: int
    matrix: NDArray[np.float64]
    curve_steps: NDArray[np.int64]
    curves: NDArray[np.float64]
    step_seconds: float
    optimizer_seconds: float
    end_task_seconds: float
    backend: str
    initial: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    parameters: int = 0
    seconds: float = 0.0
    conflicts: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread inside.

    A step of a small MLP takes a third of a millisecond, in kernels of a few dozen microseconds. A
    second thread made it 15 % faster on an idle machine and several times slower on a busy one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Network(nn.Module):
    """An MLP with one hidden layer and one head, or one for each task.

    Attributes:
        task: Whose head is used.
    """

    def __init__(self, scenario: Scenario, hidden: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(scenario.features, hidden)
        heads = (nn.Linear(hidden, scenario.classes) for _ in range(scenario.heads))
        self.heads = nn.ModuleList(heads)
        self.task = 0

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of the task's classes, [samples, classes]."""
        head = self.heads[self.task if len(self.heads) > 1 else 0]
        logits: Tensor = head(F.relu(self.hidden(x)))
        return logits


def network(scenario: Scenario, hidden: int, seed: int) -> Network:
    """Make a network whose weights the seed fixes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Network(scenario, hidden)


def train(
    method: Method,
    scenario: Scenario,
    config: Config,
    seed: int,
    held_out: HeldOut = "test",
    on_progress: Callable[[float], None] = lambda fraction: None,
    log: ImportanceLog | None = None,
) -> Run:
    """Train a network on the scenario's tasks, one after another, or jointly.

    Methods given the same seed start from the same weights and see the same batches.

    Args:
        method: How to train.
        scenario: What to learn.
        config: The network and the length of training.
        seed: Of the weights and the order of the samples.
        held_out: The split that accuracies are measured on.
        on_progress: Called now and then with the fraction of the training that is done.
        log: Where to record the importance of each task, if the method knows it.

    Raises:
        DivergedError: The weights have become useless.
    """
    learner = method.learner(network(scenario, config.hidden, seed))
    model = learner.model
    order = generator(seed, "order")
    recorder = _Recorder(model, [getattr(task, held_out) for task in scenario.tasks])
    stages = _stages(scenario, method.joint)
    # As many points from every run, whatever its number of steps, so that runs have a mean.
    points = config.points * len(scenario.tasks) // len(stages)
    with nullcontext() if log is None else learner.watch(log):
        for number, stage in enumerate(stages):
            if not method.joint:
                learner.begin_task(number)
            begun = len(scenario.tasks) if method.joint else number + 1
            batches = config.epochs * sum(-(-len(data.x) // config.batch_size) for _, data in stage)
            added = 0
            for done, (task, x, y) in enumerate(_batches(stage, config, order), start=1):
                recorder.step(learner, task, x, y)
                learner.after_step()
                while added < points * done // batches:
                    learner.settle()
                    recorder.add_point(begun)
                    added += 1
                    on_progress((number + done / batches) / len(stages))
            learner.settle()
            _check_weights(model, method, number)
            recorder.add_row()
            if not method.joint:
                ((task, data),) = stage
                use_head(model, task)
                start = time.perf_counter()
                learner.end_task(data)
                recorder.end_task_seconds.append(time.perf_counter() - start)
                if log is not None:
                    learner.record(log, f"task {number + 1}")
    on_progress(1.0)
    return recorder.run(method, seed, learner)


# What is learned at a time: the training samples of each task in it, with the task's number.
Stage: TypeAlias = list[tuple[int, Split]]


def _stages(scenario: Scenario, joint: bool) -> list[Stage]:
    parts = [(number, task.train) for number, task in enumerate(scenario.tasks)]
    if not joint:
        return [[part] for part in parts]
    if scenario.heads > 1:
        return [parts]
    samples = zip(*(data for _, data in parts), strict=True)
    return [[(0, Split(*(torch.cat(tensors) for tensors in samples)))]]


def _batches(
    stage: Stage, config: Config, order: torch.Generator
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield all batches, each of one task; one gather per epoch keeps Python out of the step."""
    for _ in range(config.epochs):
        batches: list[tuple[int, Tensor, Tensor]] = []
        for task, data in stage:
            shuffled = torch.randperm(len(data.x), generator=order)
            xs = torch.split(data.x[shuffled], config.batch_size)
            ys = torch.split(data.y[shuffled], config.batch_size)
            batches += [(task, x, y) for x, y in zip(xs, ys, strict=True)]
        if len(stage) > 1:
            batches = [batches[i] for i in torch.randperm(len(batches), generator=order)]
        yield from batches


class _Recorder:
    """Takes the steps of one run, times them, and keeps its accuracies."""

    def __init__(self, model: nn.Module, held_out: list[Split]) -> None:
        self.model = model
        self.held_out = held_out
        self.initial = self.accuracies(len(held_out))
        self.matrix: list[list[float]] = []
        self.curve_steps: list[int] = []
        self.curves: list[list[float]] = []
        self.step_seconds: list[float] = []
        self.optimizer_seconds: list[float] = []
        self.end_task_seconds: list[float] = []

    @property
    def steps(self) -> int:
        return len(self.step_seconds)

    def step(self, learner: Learner, task: int, x: Tensor, y: Tensor) -> None:
        use_head(self.model, task)
        optimizer = learner.optimizer
        start = time.perf_counter()
        optimizer.zero_grad()
        torch.autograd.backward(learner.loss(x, y))
        middle = time.perf_counter()
        optimizer.step()
        end = time.perf_counter()
        self.step_seconds.append(end - start)
        self.optimizer_seconds.append(end - middle)

    @torch.inference_mode()
    def accuracies(self, begun: int) -> list[float]:
        accuracies = [float("nan")] * len(self.held_out)
        for task, (x, y) in enumerate(self.held_out[:begun]):
            use_head(self.model, task)
            accuracies[task] = (self.model(x).argmax(1) == y).double().mean().item()
        return accuracies

    def add_point(self, begun: int) -> None:
        self.curve_steps.append(self.steps)
        self.curves.append(self.accuracies(begun))

    def add_row(self) -> None:
        self.matrix.append(self.accuracies(len(self.held_out)))

    def run(self, method: Method, seed: int, learner: Learner) -> Run:
        tasks = len(learner.conflicts)
        fractions = np.full((tasks, 1 + tasks if tasks else 0), np.nan)
        for row, values in zip(fractions, learner.conflicts, strict=True):
            row[: len(values)] = values
        return Run(
            method=method,
            seed=seed,
            matrix=np.array(self.matrix),
            curve_steps=np.array(self.curve_steps, dtype=np.int64),
            curves=np.array(self.curves).reshape(-1, len(self.held_out)),
            step_seconds=per_step(self.step_seconds),
            optimizer_seconds=per_step(self.optimizer_seconds),
            end_task_seconds=float(np.median(self.end_task_seconds or [0.0])),
            backend=learner.backend,
            initial=np.array(self.initial),
            parameters=sum(param.numel() for param in self.model.parameters()),
            seconds=sum(self.step_seconds) + sum(self.end_task_seconds),
            conflicts=fractions,
        )


def per_step(seconds: list[float]) -> float:
    """Return the median of the means of ten steps each: some methods do more in each tenth one."""
    whole = len(seconds) // 10 * 10
    tens = np.array(seconds[:whole] or seconds).reshape(-1, 10 if whole else len(seconds))
    return float(np.median(tens.mean(1)))


def _check_weights(model: nn.Module, method: Method, number: int) -> None:
    largest = max(param.detach().abs().max().item() for param in model.parameters())
    if not largest < _DIVERGED:  # true for NaN as well
        raise DivergedError(f"{method.label} diverged while learning task {number + 1}.")
