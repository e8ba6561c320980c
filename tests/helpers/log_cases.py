"""Importances and logs that the log's tests share."""

from __future__ import annotations

import time
import warnings
from ctypes import c_double
from multiprocessing.synchronize import Event
from pathlib import Path

import torch
from torch import Tensor

from cl_optim.importance import Importance, ImportanceLog

SHAPES = {"a.weight": (20, 30), "a.bias": (20,), "b/c.weight": (3, 4, 5), "empty": (0, 2)}
SCALE = 40  # makes a record long enough to be hit in all its parts


def importance_of(task: int, scale: int = 1) -> Importance:
    """The importance of a task, different for each, the same whenever it is made."""
    generator = torch.Generator().manual_seed(task)
    sums = {
        name: torch.rand((scale * shape[0], *shape[1:]), generator=generator) ** 6
        for name, shape in SHAPES.items()
    }
    return Importance(sums, samples=10 + task, tokens=100, metadata={"labels": "exact"})


def assert_is(found: Importance, expected: Importance) -> None:
    """That everything in it is what was recorded, bit for bit."""
    assert list(found) == list(expected)
    assert (found.samples, found.tokens) == (expected.samples, expected.tokens)
    assert {**found.metadata, "task": None} == {**expected.metadata, "task": None}
    for name, value in expected.sums.items():
        assert torch.equal(found.sums[name], value), name


def make_log(path: Path, tasks: int = 2) -> ImportanceLog:
    log = ImportanceLog(path)
    for task in range(tasks):
        log.record(f"task {task}", importance_of(task))
    return log


def opened(path: Path, mode: str = "a") -> tuple[ImportanceLog, list[str]]:
    """The log, and the warnings of opening it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        log = ImportanceLog(path, mode)
    return log, [str(warning.message) for warning in caught]


def weights(task: int) -> dict[str, Tensor]:
    return {name: value.sqrt() for name, value in importance_of(task).sums.items()}


def record_until_killed(path: str, first: int, started: Event, seconds: c_double) -> None:
    """Record one task after another, and tell how long the last took."""
    log = ImportanceLog(path)
    started.set()
    for task in range(first, first + 1000):
        begun = time.monotonic()
        log.record(f"task {task}", importance_of(task, SCALE))
        seconds.value = time.monotonic() - begun
