"""What ``python -m bench.retention pretrained`` does: it takes up where it was cut short."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from rich.console import Console

from bench.retention.pretrained import report
from bench.retention.pretrained.methods import ADAMW, LORA, METHODS, Method, Setting
from bench.retention.pretrained.results import Results
from bench.retention.pretrained.runs import Place, choose, prepare, rate_of, run
from cl_optim.demo.commands import announce, progress_bar
from cl_optim.demo.methods import Structure


class _Job(NamedTuple):
    """Something to be done, unless its files are there.

    Attributes:
        paths: What it writes; the first says with which setting.
        function: Does it.
        arguments: Of that.
        rate: The learning rate that the first file must have; None: any.
    """

    paths: list[Path]
    function: Callable[..., None]
    arguments: tuple[Any, ...]
    rate: Callable[[], float] | None = None

    def is_done(self, setting: Setting) -> bool:
        """Say whether its files are there, made with the setting and the learning rate."""
        if not all(path.exists() for path in self.paths):
            return False
        record = json.loads(self.paths[0].read_text())
        if record["setting"] != setting.record():
            return False
        return self.rate is None or bool(record["rate"] == self.rate())


def run_pretrained(
    place: Place,
    setting: Setting,
    seeds: int,
    processes: int,
    methods: Sequence[Method],
    out: Path,
    console: Console,
) -> Results:
    """Learn the new domain by methods; print, write and draw the results of all runs there are.

    A run whose file is there, with the same setting, is not done again.

    Args:
        place: Where texts are, and what is prepared and measured goes.
        setting: Of model and training.
        seeds: How many; they are 0, 1, ...
        processes: Runs at the same time, each in a process of its own with its part of the cores;
            0: all in this one.
        methods: AdamW, which all are compared with, is always run.
        out: An existing directory for table and pictures.
        console: Where to print.
    """
    methods = [method for method in METHODS if method in {ADAMW, *methods}]
    stages: list[list[_Job]] = [[], [], []]
    for seed in range(seeds):
        prepared = [place.before(seed), place.base, place.own(seed)]
        prepared += [place.importance(structure, seed) for structure in get_args(Structure)]
        stages[0].append(_Job(prepared, prepare, (place, setting, seed)))
        stages[2] += [
            _Job(
                [place.run(method, seed)], run, (method, place, setting, seed),
                partial(rate_of, method, place, setting),
            )
            for method in methods
        ]  # fmt: skip
    for method, rates in ((ADAMW, setting.rates), (LORA, setting.lora_rates)):
        if any(one.kind == method.kind for one in methods):
            stages[1] += [
                _Job([place.choice(method, rate)], choose, (method, rate, place, setting))
                for rate in rates
            ]
    with progress_bar(console) as bar:
        names = ("preparing", "choosing learning rates", "learning")
        for name, stage in zip(names, stages, strict=True):
            left = [job for job in stage if not job.is_done(setting)]
            task = bar.add_task(name, total=len(stage), completed=len(stage) - len(left))
            # The base model is shared: seeds are prepared one after another.
            at_once = min(processes, 1) if stage is stages[0] else processes
            _carry_out(left, at_once, partial(bar.advance, task))
    results = Results.read(place, setting, methods, seeds)
    console.print(report.render(results))
    announce(report.write(results, out), console)
    return results


def _carry_out(jobs: Sequence[_Job], processes: int, advance: Callable[[], object]) -> None:
    if not processes:
        for job in jobs:
            job.function(*job.arguments)
            advance()
        return
    threads = max(1, torch.get_num_threads() // processes)
    with ThreadPoolExecutor(processes) as pool:
        futures = [pool.submit(_in_process, threads, job.function, job.arguments) for job in jobs]
        try:
            for done in as_completed(futures):
                done.result()
                advance()
        finally:  # after a failure nothing more is begun
            for future in futures:
                future.cancel()


def _in_process(threads: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """Run it in a process of its own, whose memory is its own to be measured."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, torch.set_num_threads, (threads,)) as one:
        one.submit(function, *arguments).result()
