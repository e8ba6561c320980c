"""What ``python -m bench.retention text`` does, with its progress bar."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Collection
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import Progress, TaskID

from bench.retention.text import report
from bench.retention.text.corpora import Corpus
from bench.retention.text.model import Sizes
from bench.retention.text.results import Before, Results
from bench.retention.text.runs import ADAMW, METHODS, learn_new, learn_old, watch
from cl_optim.demo.commands import announce, progress_bar

_Result = TypeVar("_Result")


def run_text_demo(
    old: Corpus,
    new: Corpus,
    sizes: Sizes,
    seeds: int,
    processes: int,
    families: Collection[str],
    out: Path,
    console: Console,
) -> Results:
    """Learn the old text, then the new one by methods; print, write and draw the results.

    Args:
        old: The text that must not be forgotten.
        new: The text to learn.
        sizes: Of model and training.
        seeds: How many; they are 0, 1, ...
        processes: Runs that are trained at the same time, each with one thread.
        families: Of methods; AdamW, which all are compared with, is always there.
        out: An existing directory.
        console: Where to print.
    """
    start = time.perf_counter()
    methods = [m for m in METHODS if m.family in families or m.family == ADAMW.family]
    spawn = multiprocessing.get_context("spawn")  # forking after torch's threads began hangs
    with (
        progress_bar(console) as bar,
        ProcessPoolExecutor(processes, spawn, torch.set_num_threads, (1,)) as pool,
    ):
        task = bar.add_task(f"learning {old.name}", total=seeds * (1 + len(methods)) + 1)
        learned = _collect(
            [pool.submit(learn_old, old, new, sizes, seed) for seed in range(seeds)], bar, task
        )
        bar.update(task, description=f"learning {new.name}")
        runs = _collect(
            [
                pool.submit(learn_new, method, model, old, new, sizes)
                for model in learned
                for method in methods
            ],
            bar,
            task,
        )
        bar.update(task, description="the guard at work")
        with tempfile.TemporaryDirectory() as folder:
            guard = watch(ADAMW, learned[0], old, new, sizes, folder)
        bar.advance(task)
    results = Results(
        old=old.name,
        new=new.name,
        sizes=sizes,
        before=tuple(Before(m.seed, m.old_bpb, m.new_bpb) for m in learned),
        runs=tuple(runs),
        guard=str(guard.report()),
        seconds=time.perf_counter() - start,
    )
    console.print(report.render(results))
    announce(report.write(results, out), console)
    return results


def _collect(futures: list[Future[_Result]], bar: Progress, task: TaskID) -> list[_Result]:
    """Return the results in the order of the jobs; the first failure ends them all."""
    for done in as_completed(futures):
        if done.exception() is not None:
            for other in futures:
                other.cancel()
        done.result()
        bar.advance(task)
    return [future.result() for future in futures]
