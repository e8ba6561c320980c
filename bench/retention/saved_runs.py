"""Runs of benchmarks that learn tasks one after another: what is told of them, done only once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from cl_optim.demo.machine import processor, versions
from cl_optim.demo.metrics import Matrix
from cl_optim.demo.scenarios import Task


@dataclass(frozen=True)
class Run:
    """One method, trained with one seed.

    Attributes:
        matrix: R [T, T], the accuracies on all tasks after each; [1, T] for joint training.
        seconds: Of training and of what the method does at the ends of tasks, by the clock.
        cpu_seconds: The same, of the process alone.
        state_bytes: What the method keeps beside the weights, and beside what the optimizer alone
            has: importance, anchors, samples, rows.
    """

    matrix: tuple[tuple[float, ...], ...]
    seconds: float
    cpu_seconds: float
    state_bytes: int

    @property
    def r(self) -> Matrix:
        """Return the accuracies as an array."""
        return np.asarray(self.matrix)


_Run = TypeVar("_Run", bound=Run)


def from_record(kind: type[_Run], record: Mapping[str, Any]) -> _Run:
    """Return a run of what was written of it; what else stands there is derived."""
    values = {field.name: record[field.name] for field in fields(kind)}
    return kind(**{**values, "matrix": tuple(map(tuple, record["matrix"]))})


def once(
    path: Path, kind: type[_Run], setting: Mapping[str, Any], train: Callable[[], _Run]
) -> _Run:
    """Return the run of a file, if it is of the same; else train, and write it.

    The same are setting, versions, and the processor, whose seconds are told.

    Args:
        path: Of the file, in a folder that exists.
        kind: Of run.
        setting: All that the run depends on and that the file's name does not say.
        train: Makes the run.
    """
    common = json.loads(json.dumps({"versions": versions(), "processor": processor(), **setting}))
    if path.exists():
        saved = json.loads(path.read_text(encoding="utf-8"))
        if saved["setting"] == common:
            return from_record(kind, saved)
    done = train()
    write(path, {"setting": common, **asdict(done)})
    return done


def about(data: tuple[str, Task]) -> dict[str, Any]:
    """Return what a run depends on of its data: other files of the same name are other data."""
    name, task = data
    return {
        "data": name,
        "samples": [len(part.y) for part in (task.train, task.validation, task.test)],
    }


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Write JSON: the whole file or none, whoever else writes the same one."""
    beside = path.with_suffix(f".{os.getpid()}.partial")
    beside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)
