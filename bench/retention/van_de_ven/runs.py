"""One method trained with one seed, and all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.retention import saved_runs
from bench.retention.training import flushed_denormals, take_step, tensor_bytes
from bench.retention.van_de_ven.methods import METHODS, Method
from bench.retention.van_de_ven.scenarios import Name, Network, Setting, scenario_of
from cl_optim.demo import metrics
from cl_optim.demo.metrics import Interval, Matrix
from cl_optim.demo.scenarios import Scenario, Task, generator

HeldOut = Literal["validation", "test"]

SWEEP_SEEDS = 1
_FIRST_SWEEP_SEED = 100


@dataclass(frozen=True)
class Run(saved_runs.Run):
    """One method, trained with one seed.

    Attributes:
        end_cpu_seconds: Of ``cpu_seconds``, at the ends of contexts: the Fisher information.
    """

    end_cpu_seconds: float


class Stage(NamedTuple):
    """What is learned at a time.

    Attributes:
        last: The newest context in it.
        x: Inputs of all samples.
        y: Labels.
        contexts: The context of each.
    """

    last: int
    x: Tensor
    y: Tensor
    contexts: Tensor


@flushed_denormals()
def train(
    name: Name, scenario: Scenario, method: Method, value: float, setting: Setting, seed: int,
    held_out: HeldOut,
) -> Run:  # fmt: skip
    """Train a network on the contexts, one after another or jointly."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Network(scenario, setting.hidden)
    learner = method.learner(model, setting, value)
    iterations = setting.iterations * (len(scenario.tasks) if method.joint else 1)
    rows, seconds, cpu_seconds, end_cpu_seconds = [], 0.0, 0.0, 0.0
    for stage in _stages(scenario, method.joint):
        if name == "class":
            model.outputs = scenario.classes * (stage.last + 1) // len(scenario.tasks)
        order = generator(seed, f"order {stage.last}")
        begin, cpu_begin = time.perf_counter(), time.process_time()
        for some in islice(batches(len(stage.y), setting.batch, order), iterations):
            model.context = stage.contexts[some] if method.joint else stage.last
            take_step(learner.optimizer, learner.loss(stage.x[some], stage.y[some]))
        model.context, cpu_end = stage.last, time.process_time()
        if not method.joint:
            learner.end(stage.last, stage.x)
        seconds += time.perf_counter() - begin
        cpu_seconds += time.process_time() - cpu_begin
        end_cpu_seconds += time.process_time() - cpu_end
        rows.append(tuple(_accuracies(model, scenario, held_out)))
    weights = sum(param.numel() * param.element_size() for param in model.parameters())
    adam = 2 * weights + 4 * len([*model.parameters()])
    kept = tensor_bytes([learner.optimizer.state_dict(), learner.kept()])
    return Run(tuple(rows), seconds, cpu_seconds, max(0, kept - adam), end_cpu_seconds)


def batches(count: int, size: int, order: torch.Generator) -> Iterator[Tensor]:
    """Yield rows for ever: whole batches of one order after another, and none that is smaller."""
    size = min(size, count)
    while True:
        rows = torch.randperm(count, generator=order)
        yield from torch.split(rows[: count // size * size], size)


def _stages(scenario: Scenario, joint: bool) -> Iterator[Stage]:
    each = [
        Stage(number, *task.train, torch.full((len(task.train.y),), number))
        for number, task in enumerate(scenario.tasks)
    ]
    if not joint:
        yield from each
        return
    parts = zip(*(stage[1:] for stage in each), strict=True)
    yield Stage(each[-1].last, *(torch.cat(tensors) for tensors in parts))


@torch.no_grad()
def _accuracies(model: Network, scenario: Scenario, held_out: HeldOut) -> Iterator[float]:
    for number, task in enumerate(scenario.tasks):
        model.context = number
        x, y = getattr(task, held_out)
        yield float((model(x).argmax(1) == y).double().mean())


@dataclass(frozen=True)
class Results:
    """All runs.

    Attributes:
        data: The data set's name.
        settings: What was common, by scenario.
        chosen: The value by scenario and method.
        scores: Validation ACC of each candidate, likewise.
        runs: By scenario and method: in the order of seeds.
        sweep_seeds: How many the scores are means over.
    """

    data: str
    settings: dict[Name, Setting]
    chosen: dict[tuple[Name, str], float]
    scores: dict[tuple[Name, str], dict[float, float]]
    runs: dict[tuple[Name, str], list[Run]]
    sweep_seeds: int = SWEEP_SEEDS

    @property
    def names(self) -> list[Name]:
        """Return the scenarios in the order of their first runs."""
        return list(dict.fromkeys(name for name, _ in self.runs))

    def methods(self, name: Name) -> list[Method]:
        """Return the methods that a scenario has been learned by."""
        return [method for method in METHODS if (name, method.key) in self.runs]

    def interval(self, name: Name, method: Method, metric: Callable[[Matrix], float]) -> Interval:
        """Return a metric's mean over seeds."""
        return Interval.of([metric(run.r) for run in self.runs[name, method.key]])

    def paired(
        self, name: Name, one: Method, other: Method, metric: Callable[[Matrix], float]
    ) -> Interval:
        """Return the mean over seeds of the difference of two methods with the same seed."""
        pairs = zip(self.runs[name, one.key], self.runs[name, other.key], strict=True)
        return Interval.of([metric(a.r) - metric(b.r) for a, b in pairs])


def measure(
    folder: Path,
    data: tuple[str, Task],
    settings: Mapping[Name, Setting],
    seeds: int,
    sweep_seeds: int = SWEEP_SEEDS,
    methods: Sequence[Method] | None = None,
    on_run: Callable[[str], object] = lambda what: None,
) -> Results:
    """Choose values, and train with them; runs whose files are in the folder are read.

    Args:
        folder: Of a file for each run.
        data: Its name, and what the contexts are made from.
        settings: Of the scenarios that are to be learned.
        seeds: How many, on the test split.
        sweep_seeds: How many others, on the validation split, for each candidate.
        methods: Default: all.
        on_run: Called with a description before each run.

    Raises:
        DataError: The classes cannot be dealt out to the contexts.
    """
    methods = METHODS if methods is None else methods
    results = Results(data[0], dict(settings), {}, {}, {}, sweep_seeds)

    def run(name: Name, method: Method, value: float, seed: int, held_out: HeldOut) -> Run:
        on_run(f"{name}: {method.label}")
        path = folder / f"{name}-{method.key}-{value:g}-{held_out}-{seed}.json"
        setting = settings[name]

        def make() -> Run:
            scenario = scenario_of(name, data[1], setting.contexts, seed)
            return train(name, scenario, method, value, setting, seed, held_out)

        of_data = {**saved_runs.about(data), "denormals": "flushed"}
        return saved_runs.once(path, Run, {**of_data, **asdict(setting)}, make)

    folder.mkdir(parents=True, exist_ok=True)
    for name in settings:
        for method in methods:
            values = method.values(name)
            scores = results.scores[name, method.key] = {}
            for value in values if len(values) > 1 else ():
                accs = [
                    metrics.acc(run(name, method, value, seed, "validation").r)
                    for seed in range(_FIRST_SWEEP_SEED, _FIRST_SWEEP_SEED + sweep_seeds)
                ]
                scores[value] = float(np.mean(accs))
            best = max(scores, key=lambda one: scores[one]) if scores else values[0]
            results.chosen[name, method.key] = best
            results.runs[name, method.key] = []
        for seed in range(seeds):  # one method after another: a busy hour is everyone's
            for method in methods:
                chosen = results.chosen[name, method.key]
                results.runs[name, method.key].append(run(name, method, chosen, seed, "test"))
    return results


def count_runs(names: Sequence[Name], seeds: int, sweep_seeds: int = SWEEP_SEEDS) -> int:
    """Return how many runs all methods take."""
    counts = [len(method.values(name)) for name in names for method in METHODS]
    return sum(seeds + sweep_seeds * count * (count > 1) for count in counts)


def from_record(record: Mapping[str, Any]) -> Results:
    """Return what was written."""
    settings = {name: Setting(**setting) for name, setting in record["settings"].items()}
    results = Results(record["data"], settings, {}, {}, {}, record["sweep_seeds"])
    for row in record["rows"]:
        key = (row["scenario"], row["method"])
        results.chosen[key] = row["chosen"]
        results.scores[key] = {float(one): acc for one, acc in row["validation_acc"].items()}
        results.runs[key] = [saved_runs.from_record(Run, run) for run in row["runs"]]
    return results
