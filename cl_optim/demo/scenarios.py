"""Data, and the sequences of tasks made from it."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# The one split that every seed and every method sees; it is not a seed of the experiment.
_SPLIT_SEED = 0
_VALIDATION_SIZE = 297
_TEST_SIZE = 360


class DataError(RuntimeError):
    """The data is not there, or not what is needed; the message says what to do."""


class Split(NamedTuple):
    """Samples and their labels.

    Attributes:
        x: float32 inputs, [samples, features].
        y: int64 labels, [samples].
    """

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Task:
    """Training samples and two held-out sets, disjoint.

    Attributes:
        train: What the network learns from, and what the Fisher is estimated on.
        validation: What hyperparameters are chosen on.
        test: What results are reported on.
    """

    train: Split
    validation: Split
    test: Split


@dataclass(frozen=True)
class Scenario:
    """Tasks to be learned one after another.

    Attributes:
        tasks: In the order of learning.
        features: Inputs of the network.
        classes: Outputs of each head.
        heads: 1 if all tasks share a head, or as many as there are tasks.
    """

    tasks: tuple[Task, ...]
    features: int
    classes: int
    heads: int = 1


def generator(seed: int, purpose: str) -> torch.Generator:
    """Return a stream of random numbers of its own for each purpose of a seed."""
    return torch.Generator().manual_seed(zlib.crc32(f"{purpose} {seed}".encode()))


def digits() -> Task:
    """Load scikit-learn's handwritten digits, 8×8 pixels in [0, 1]: 1140 + 297 + 360 samples.

    The three sets are disjoint, stratified by class and always the same.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    rest_x, test_x, rest_y, test_y = train_test_split(
        x / 16.0, y, test_size=_TEST_SIZE, stratify=y, random_state=_SPLIT_SEED
    )
    train_x, validation_x, train_y, validation_y = train_test_split(
        rest_x, rest_y, test_size=_VALIDATION_SIZE, stratify=rest_y, random_state=_SPLIT_SEED
    )

    def split(x: object, y: object) -> Split:
        return Split(torch.as_tensor(x, dtype=torch.float32), torch.as_tensor(y))

    return Task(split(train_x, train_y), split(validation_x, validation_y), split(test_x, test_y))


def permuted(data: Task, tasks: int, seed: int) -> Scenario:
    """Permute pixels (domain-incremental): each task shuffles the pixels in its own way.

    The first task leaves the pixels where they are; each later one has a permutation drawn from
    the seed, the same for all of its images. The classes, and so the head, are shared.

    Args:
        data: The task to permute.
        tasks: How many.
        seed: Draws the permutations.
    """
    features = data.train.x.shape[1]
    stream = generator(seed, "permutations")
    permutations = [torch.arange(features)]
    permutations += [torch.randperm(features, generator=stream) for _ in range(tasks - 1)]

    def shuffle(split: Split, permutation: Tensor) -> Split:
        return Split(split.x[:, permutation], split.y)

    return Scenario(
        tasks=tuple(
            Task(*(shuffle(split, p) for split in (data.train, data.validation, data.test)))
            for p in permutations
        ),
        features=features,
        classes=int(data.train.y.max()) + 1,
    )


def split(data: Task, tasks: int, seed: int) -> Scenario:
    """Split classes (task-incremental): each task has classes and a head of its own.

    Which classes go together is drawn from the seed. A task's labels count its own classes.

    Args:
        data: The task to split.
        tasks: How many; the number of classes is a multiple of it.
        seed: Draws the order of the classes.

    Raises:
        DataError: The classes cannot be dealt out evenly.
    """
    classes = int(data.train.y.max()) + 1
    if classes % tasks != 0:
        raise DataError(f"{classes} classes cannot be split into {tasks} equal tasks.")
    order = torch.randperm(classes, generator=generator(seed, "classes"))

    def take(part: Split, of_task: Tensor) -> Split:
        label = torch.full((classes,), -1)
        label[of_task] = torch.arange(len(of_task))
        rows = label[part.y] >= 0
        return Split(part.x[rows], label[part.y[rows]])

    return Scenario(
        tasks=tuple(
            Task(*(take(part, group) for part in (data.train, data.validation, data.test)))
            for group in order.chunk(tasks)
        ),
        features=data.train.x.shape[1],
        classes=classes // tasks,
        heads=tasks,
    )
