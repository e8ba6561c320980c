"""What ``python -m bench.retention pretrained`` does: it takes up where it was cut short."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console

from bench.retention.pretrained import report
from bench.retention.pretrained.methods import ADAMW, LORA, METHODS, Method, Setting, Structure
from bench.retention.pretrained.results import Results
from bench.retention.pretrained.runs import Place, choose, prepare, run
from cl_optim.demo.commands import announce, progress_bar

_Job = tuple[list[Path], Callable[..., None], tuple[Any, ...]]  # what it writes, and how


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
        stages[0].append((prepared, prepare, (place, setting, seed)))
        stages[2] += [
            ([place.run(method, seed)], run, (method, place, setting, seed)) for method in methods
        ]
    for method, rates in ((ADAMW, setting.rates), (LORA, setting.lora_rates)):
        if any(one.kind == method.kind for one in methods):
            stages[1] += [
                ([place.choice(method, rate)], choose, (method, rate, place, setting))
                for rate in rates
            ]
    with progress_bar(console) as bar:
        names = ("preparing", "choosing learning rates", "learning")
        for name, stage in zip(names, stages, strict=True):
            left = [job for job in stage if not _is_done(job[0], setting)]
            task = bar.add_task(name, total=len(stage), completed=len(stage) - len(left))
            # The base model is shared: seeds are prepared one after another.
            at_once = min(processes, 1) if stage is stages[0] else processes
            _carry_out(left, at_once, partial(bar.advance, task))
    results = Results.read(place, setting, methods, seeds)
    console.print(report.render(results))
    announce(report.write(results, out), console)
    return results


def _is_done(paths: Sequence[Path], setting: Setting) -> bool:
    """Say whether all files are there, the first of which says with which setting."""
    if not all(path.exists() for path in paths):
        return False
    same: bool = json.loads(paths[0].read_text())["setting"] == json.loads(
        json.dumps(asdict(setting))
    )
    return same


def _carry_out(jobs: Sequence[_Job], processes: int, advance: Callable[[], object]) -> None:
    if not processes:
        for _, function, arguments in jobs:
            function(*arguments)
            advance()
        return
    threads = max(1, torch.get_num_threads() // processes)
    with ThreadPoolExecutor(processes) as pool:
        futures = [pool.submit(_in_process, threads, *job[1:]) for job in jobs]
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
