"""An importance of 124 M weights in 148 tensors, written to disk and read, against other files.

Ours has in it statistics of each layer, checksums and their check. All that is written is synced to
the disk; what is read has just been written, and is in the page cache. The folder is BENCH_FOLDER,
else the system's for temporary files.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from log_round_trip import fisher, gpt2
from suite import Contender, Question, Work
from torch import Tensor

from cl_optim import ImportanceLog

Importance = dict[str, Tensor]


class Store(NamedTuple):
    """Writes an importance into a folder, and reads it."""

    write: Callable[[Importance, Path], object]
    read: Callable[[Path], Importance]


def synced(save: Callable[[Importance, Path], object]) -> Callable[[Importance, Path], None]:
    def write(importance: Importance, folder: Path) -> None:
        folder.mkdir()
        save(importance, folder / "file")
        with (folder / "file").open("rb") as file:
            os.fsync(file.fileno())

    return write


def log(codec: str) -> Store:
    return Store(
        lambda importance, folder: ImportanceLog(folder).record("task", importance, codec=codec),
        lambda folder: dict(ImportanceLog(folder).load("task").sums),
    )


def plain_write(importance: Importance, path: Path) -> None:
    """As many bytes, without a name or a shape."""
    with path.open("wb", buffering=0) as file:
        for value in importance.values():
            file.write(value.numpy().data)


STORES: dict[str, tuple[Store, str]] = {
    "cl_optim, float32": (log("float32"), "ours"),
    "cl_optim, bfloat16": (log("bfloat16"), "variant"),
    "cl_optim, log8": (log("log8"), "variant"),
    "safetensors": (
        Store(
            synced(safetensors.torch.save_file),
            lambda folder: {
                name: value.clone()  # else nothing is read yet
                for name, value in safetensors.torch.load_file(folder / "file").items()
            },
        ),
        "peer",
    ),
    "torch.save": (
        Store(synced(torch.save), lambda folder: torch.load(folder / "file", weights_only=True)),
        "peer",
    ),
    "bytes alone": (
        Store(synced(plain_write), lambda folder: {"": (folder / "file").read_bytes()}),
        "floor",
    ),
}


class Problem:
    """An importance, and a folder to itself."""

    def __init__(self, reading: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        self.importance = {name: fisher(shape, generator) for name, shape in gpt2().items()}
        self.reading = reading
        self.parent = Path(tempfile.mkdtemp(dir=os.environ.get("BENCH_FOLDER")))
        self.folder = self.parent / "importance"

    def __del__(self) -> None:
        shutil.rmtree(self.parent, ignore_errors=True)


def make(store: Store) -> Callable[[Problem], Work]:
    def work(problem: Problem) -> Work:
        def read() -> Importance:
            return store.read(problem.folder)

        def write() -> Callable[[], Importance]:
            shutil.rmtree(problem.folder, ignore_errors=True)
            store.write(problem.importance, problem.folder)
            return read

        if not problem.reading:
            return write
        write()
        return read

    return work


def outcome(problem: Problem, work: Work) -> list[Tensor]:
    found = work() if problem.reading else work()()
    return [found[name] for name in sorted(problem.importance)]


OURS = "cl_optim, float32"
WRITTEN, READ = "124 M weights of importance written", "124 M weights of importance read"
QUESTION = Question(
    problems={WRITTEN: (partial(Problem, False), 1), READ: (partial(Problem, True), 1)},
    contenders={name: Contender(make(store), kind) for name, (store, kind) in STORES.items()},
    reference=OURS,
    base="bytes alone",
    outcome=outcome,
    tolerance=0.0,
)


def test_log(ask: Callable[[], None]) -> None:
    ask()
