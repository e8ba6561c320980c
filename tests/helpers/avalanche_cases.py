"""Avalanche, or what stands in for it, with a benchmark and models for its strategies."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import fake_avalanche
import torch
from torch import Tensor, nn

IS_REAL = importlib.util.find_spec("avalanche") is not None
if not IS_REAL:
    fake_avalanche.install()

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Avalanche's, and of what it imports
    from avalanche.benchmarks import split_online_stream, tensors_benchmark
    from avalanche.models import IncrementalClassifier, MultiHeadClassifier, MultiTaskModule
    from avalanche.training.supervised import Naive

__all__ = ["Grown", "Heads", "Naive", "benchmark", "mlp", "split_online_stream", "strategy"]

FEATURES, WIDTH = 6, 8


def benchmark(tasks: int = 3, classes: int = 2, grows: bool = False, samples: int = 48) -> Any:
    """A stream of random tasks, each with a label; with ``grows`` each has one more class."""

    def tensors(seed: int) -> list[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        made = []
        for task in range(tasks):
            most = classes + task if grows else classes
            y = torch.arange(samples) % most  # none is missing, and sorted by nothing
            made.append((torch.randn(samples, FEATURES, generator=generator), y))
        return made

    return tensors_benchmark(
        train_tensors=tensors(1), test_tensors=tensors(2), task_labels=list(range(tasks))
    )


def mlp(classes: int = 2) -> nn.Sequential:
    return nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.ReLU(), nn.Linear(WIDTH, classes))


class Heads(MultiTaskModule):
    """A body, and a head for each task label."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(FEATURES, WIDTH)
        self.head = MultiHeadClassifier(WIDTH, 2)

    def forward(self, x: Tensor, task_labels: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(x)), task_labels)


class Grown(nn.Module):
    """A head that gets an output more for each new class."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(FEATURES, WIDTH)
        self.head = IncrementalClassifier(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(x)))


def strategy(
    model: nn.Module, optimizer: torch.optim.Optimizer, *plugins: Any, **options: Any
) -> Naive:
    options = {"train_mb_size": 8, "train_epochs": 2, "eval_mb_size": 16, **options}
    return Naive(model=model, optimizer=optimizer, plugins=list(plugins), evaluator=None, **options)
