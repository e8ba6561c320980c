"""Beside Avalanche's own EWC and GEM, in its loop: ``python -m bench.retention avalanche``.

Every method trains in Avalanche's strategy ``Naive``, with the same data, weights to begin with,
optimizer, learning rate, epochs and order of samples: what differs are its plugin and what the
plugin needs of the optimizer. Strengths are chosen on the validation split, with seeds of their own
and as many candidates for each method.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from bench.retention import tables
from bench.retention.saved_runs import Run, about, once
from bench.retention.training import tensor_bytes
from cl_optim import EWC, GEM, EWCAdamW
from cl_optim.demo import metrics
from cl_optim.demo.metrics import Interval, Matrix
from cl_optim.demo.report import in_percent, number_table, with_interval
from cl_optim.demo.scenarios import (
    Scenario,
    Split,
    Task,
    generator,
    permuted,
    split,
)
from cl_optim.ops.checks import require

Kind = Literal["none", "ewc", "gem"]
Inner = Literal["AdamW", "SGD"]
HeldOut = Literal["validation", "test"]

THEIRS, OURS = "Avalanche", "cl_optim"
SWEEP_SEEDS = 2
_FIRST_SWEEP_SEED = 100


@dataclass(frozen=True)
class Setting:
    """What all methods have in common.

    Attributes:
        tasks: How many follow each other.
        samples: For training, of each task.
        held_out: For validation, and for the test, of each task.
        hidden: Width of the one hidden layer.
        epochs: Per task.
        batch: Samples of a step.
        patterns: Samples that GEM keeps of each task.
        rates: Of each optimizer.
    """

    tasks: int = 5
    samples: int = 2000
    held_out: int = 1000
    hidden: int = 100
    epochs: int = 3
    batch: int = 32
    patterns: int = 128
    rates: Mapping[Inner, float] = field(default_factory=lambda: {"AdamW": 1e-3, "SGD": 0.1})


@dataclass(frozen=True)
class Method:
    """A plugin, and the optimizer that it needs.

    Attributes:
        key: Of its files.
        label: Of its rows.
        kind: What it does.
        library: Whose it is; of none, the plain strategy.
        strengths: Candidates, of each optimizer: EWC's λ or strength, GEM's memory strength.
        options: Of the plugin.
    """

    key: str
    label: str
    kind: Kind
    library: str = ""
    strengths: Mapping[Inner, tuple[float, ...]] = field(
        default_factory=lambda: {"AdamW": (0.0,), "SGD": (0.0,)}
    )
    options: Mapping[str, Any] = field(default_factory=dict)


def _decades(low: int, count: int = 7) -> tuple[float, ...]:
    """Return powers of ten."""
    return tuple(float(f"1e{low + step}") for step in range(count))


def _ewc(
    key: str, label: str, library: str, adamw: int, sgd: int, options: Mapping[str, Any]
) -> Method:
    """Return EWC with as many candidates as every other, from a power of ten on."""
    strengths: dict[Inner, tuple[float, ...]] = {"AdamW": _decades(adamw), "SGD": _decades(sgd)}
    return Method(key, f"{library}: {label}", "ewc", library, strengths, options)


def _gem(key: str, label: str, library: str, options: Mapping[str, Any]) -> Method:
    strengths: dict[Inner, tuple[float, ...]] = {"AdamW": (0.0, 0.5), "SGD": (0.0, 0.5)}
    return Method(key, f"{library}: {label}", "gem", library, strengths, options)


# The estimate does not depend on the size of its batches, and is quicker in larger ones.
_DIAGONAL = {"structure": "diagonal", "batch_size": 128}
_KRONECKER = {"structure": "kronecker", "batch_size": 128}
NAIVE = Method("naive", "Naive", "none")
THEIR_EWC = _ewc("their-ewc", "EWC", THEIRS, -1, -1, {})
THEIR_GEM = _gem("their-gem", "GEM", THEIRS, {})
OUR_DIAGONAL = _ewc("ewc-diagonal", "EWC, diagonal", OURS, -7, -8, _DIAGONAL)
OUR_KRONECKER = _ewc("ewc-kronecker", "EWC, Kronecker", OURS, -6, -8, _KRONECKER)
OUR_GEM = _gem("gem", "GEM", OURS, {"refresh_every": 1})
# Its rows computed anew less often.
OUR_GEM_LESS_OFTEN = tuple(
    _gem(f"gem-{steps}", f"GEM, rows every {steps} steps", OURS, {"refresh_every": steps})
    for steps in (2, 5, 10)
)
METHODS = (
    NAIVE, THEIR_EWC, OUR_DIAGONAL, OUR_KRONECKER, THEIR_GEM, OUR_GEM, *OUR_GEM_LESS_OFTEN
)  # fmt: skip
# Ours, and what it is compared with.
PAIRS = (
    (OUR_DIAGONAL, THEIR_EWC),
    (OUR_KRONECKER, THEIR_EWC),
    (OUR_GEM, THEIR_GEM),
    *((gem, THEIR_GEM) for gem in OUR_GEM_LESS_OFTEN),
)
SCENARIOS: dict[str, Callable[[Task, int, int], Scenario]] = {"permuted": permuted, "split": split}
INNERS: tuple[Inner, ...] = ("AdamW", "SGD")


# --- data -----------------------------------------------------------------------------------------


def scenario_of(name: str, data: Task, setting: Setting, seed: int) -> Scenario:
    """Return the tasks of a seed, each with as many samples as the setting says, if there are.

    Samples are drawn from the seed: the same ones for every task of the permuted, and as many of
    each task of the split.
    """
    parts = setting.tasks if name == "split" else 1
    stream = generator(seed, "samples")

    def draw(one: Split, number: int) -> Split:
        rows = torch.randperm(len(one.y), generator=stream)[: number * parts]
        return Split(one.x[rows], one.y[rows])

    drawn = Task(
        draw(data.train, setting.samples),
        draw(data.validation, setting.held_out),
        draw(data.test, setting.held_out),
    )
    return SCENARIOS[name](drawn, setting.tasks, seed)


# --- one run --------------------------------------------------------------------------------------


def train(
    scenario: Scenario, method: Method, strength: float, inner: Inner, setting: Setting, seed: int,
    held_out: HeldOut,
) -> Run:  # fmt: skip
    """Train in Avalanche's loop."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Avalanche's, of its own parts
        return _train(scenario, method, strength, inner, setting, seed, held_out)


def _train(
    scenario: Scenario, method: Method, strength: float, inner: Inner, setting: Setting, seed: int,
    held_out: HeldOut,
) -> Run:  # fmt: skip
    require("avalanche", "avalanche", "this benchmark")
    from avalanche.benchmarks import tensors_benchmark
    from avalanche.training.supervised import Naive

    torch.manual_seed(seed)
    model = _model(scenario, setting)
    optimizer, plugin = _made(model, method, strength, inner, setting)
    strategy = Naive(
        model=model, optimizer=optimizer, train_mb_size=setting.batch,
        train_epochs=setting.epochs, plugins=[] if plugin is None else [plugin], evaluator=None,
    )  # fmt: skip
    heads = range(scenario.heads) if scenario.heads > 1 else [0] * len(scenario.tasks)
    train_tensors = [tuple(task.train) for task in scenario.tasks]
    stream = tensors_benchmark(
        train_tensors=train_tensors, test_tensors=train_tensors, task_labels=[*heads]
    ).train_stream
    rows, seconds, cpu_seconds = [], 0.0, 0.0
    for number, experience in enumerate(stream):
        torch.manual_seed(1000 * seed + number)  # the same order of samples, the same new heads
        begin, cpu_begin = time.perf_counter(), time.process_time()
        strategy.train(experience)
        seconds += time.perf_counter() - begin
        cpu_seconds += time.process_time() - cpu_begin
        rows.append(tuple(_accuracies(strategy.model, scenario, heads, held_out, number)))
    plain = sum(p.numel() * p.element_size() for p in strategy.model.parameters())
    moments = 2 * plain + 4 * len([*strategy.model.parameters()]) if inner == "AdamW" else 0
    kept = tensor_bytes([optimizer.state_dict(), {} if plugin is None else vars(plugin)])
    return Run(tuple(rows), seconds, cpu_seconds, max(0, kept - moments))


def _accuracies(
    model: nn.Module, scenario: Scenario, heads: Sequence[int], held_out: HeldOut, last: int
) -> Iterator[float]:
    """Yield the accuracy on each task; before it has a head of its own, by guessing."""
    model.eval()
    for number, (task, head) in enumerate(zip(scenario.tasks, heads, strict=True)):
        if scenario.heads > 1 and number > last:
            yield 1.0 / scenario.classes
            continue
        x, y = getattr(task, held_out)
        with torch.no_grad():
            labels = torch.full((len(x),), head)
            output = model(x, labels) if scenario.heads > 1 else model(x)
        yield float((output.argmax(1) == y).float().mean())
    model.train()


def _model(scenario: Scenario, setting: Setting) -> nn.Module:
    if scenario.heads == 1:
        return nn.Sequential(
            nn.Linear(scenario.features, setting.hidden), nn.ReLU(),
            nn.Linear(setting.hidden, scenario.classes),
        )  # fmt: skip
    from avalanche.models import MultiHeadClassifier, MultiTaskModule

    class Heads(MultiTaskModule):  # type: ignore[misc]  # Avalanche is not there for mypy
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(scenario.features, setting.hidden)
            self.head = MultiHeadClassifier(setting.hidden, scenario.classes)

        def forward(self, x: Tensor, task_labels: Tensor) -> Tensor:
            output: Tensor = self.head(torch.relu(self.body(x)), task_labels)
            return output

    return Heads()


def _made(
    model: nn.Module, method: Method, strength: float, inner: Inner, setting: Setting
) -> tuple[torch.optim.Optimizer, Any]:
    """Return the optimizer and the plugin of a method."""
    lr = setting.rates[inner]
    plain: torch.optim.Optimizer
    if inner == "AdamW":
        plain = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
    else:
        plain = torch.optim.SGD(model.parameters(), lr=lr, fused=True)
    if method.kind == "none":
        return plain, None
    if method.library == THEIRS:
        from avalanche.training import plugins as theirs

        if method.kind == "ewc":
            return plain, theirs.EWCPlugin(strength)
        return plain, theirs.GEMPlugin(setting.patterns, strength)
    from cl_optim.integrations import avalanche as ours

    if method.kind == "gem":
        return GEM(plain, strength), ours.GEMPlugin(setting.patterns, **method.options)
    plugin = ours.EWCPlugin(**method.options)
    kronecker = method.options["structure"] == "kronecker"
    if inner == "AdamW":
        # Diagonal: the penalty's gradient, as Avalanche's loss has it.
        return EWCAdamW(
            model.named_parameters(), lr=lr, weight_decay=0.0, strength=strength,
            penalty="proximal" if kronecker else "gradient",
        ), plugin  # fmt: skip
    return EWC(plain, strength=strength, every=10 if kronecker else 1), plugin


# --- all runs -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Results:
    """All runs.

    Attributes:
        data: The data set's name.
        setting: What was common.
        chosen: The strength by scenario, optimizer and method.
        scores: Validation ACC of each candidate, likewise.
        runs: By scenario, optimizer and method: in the order of seeds.
    """

    data: str
    setting: Setting
    chosen: dict[tuple[str, Inner, str], float]
    scores: dict[tuple[str, Inner, str], dict[float, float]]
    runs: dict[tuple[str, Inner, str], list[Run]]


def measure(
    folder: Path,
    data: tuple[str, Task],
    setting: Setting,
    seeds: int,
    sweep_seeds: int,
    inners: Sequence[Inner] = INNERS,
    methods: Sequence[Method] | None = None,
    on_run: Callable[[str], object] = lambda what: None,
) -> Results:
    """Choose strengths, and train with them; runs whose files are in the folder are read.

    Args:
        folder: Of a file for each run.
        data: Its name, and what the tasks are made from.
        setting: What all methods have in common.
        seeds: How many, on the test split.
        sweep_seeds: How many others, on the validation split, for each candidate.
        inners: The optimizers.
        methods: Default: all.
        on_run: Called with a description before each run.
    """
    methods = METHODS if methods is None else methods
    results = Results(data[0], setting, {}, {}, {})

    def run(
        name: str, inner: Inner, method: Method, strength: float, seed: int, held_out: HeldOut
    ) -> Run:
        on_run(f"{name}, {inner}: {method.label}")
        path = folder / f"{name}-{inner}-{method.key}-{strength:g}-{held_out}-{seed}.json"

        def make() -> Run:
            scenario = scenario_of(name, data[1], setting, seed)
            return train(scenario, method, strength, inner, setting, seed, held_out)

        others = {"avalanche": _version(), "options": method.options}
        return once(path, Run, {**about(data), **others, **asdict(setting)}, make)

    folder.mkdir(parents=True, exist_ok=True)
    for name in SCENARIOS:
        for inner in inners:
            for method in methods:
                key = (name, inner, method.key)
                candidates = method.strengths[inner]
                results.scores[key] = {}
                for strength in candidates if len(candidates) > 1 else ():
                    accs = [
                        metrics.acc(run(name, inner, method, strength, seed, "validation").r)
                        for seed in range(_FIRST_SWEEP_SEED, _FIRST_SWEEP_SEED + sweep_seeds)
                    ]
                    acc = float(np.mean(accs))
                    results.scores[key][strength] = acc if math.isfinite(acc) else 0.0
                scores = results.scores[key]
                best = max(scores, key=lambda one: scores[one]) if scores else candidates[0]
                results.chosen[key] = best
                results.runs[key] = []
            for seed in range(seeds):  # one method after another: a busy hour is everyone's
                for method in methods:
                    key = (name, inner, method.key)
                    done = run(name, inner, method, results.chosen[key], seed, "test")
                    results.runs[key].append(done)
    return results


def count_runs(seeds: int, sweep_seeds: int, inners: Sequence[Inner]) -> int:
    """Return how many runs all methods take."""
    candidates = [m.strengths[inner] for _ in SCENARIOS for inner in inners for m in METHODS]
    return sum(seeds + sweep_seeds * len(some) * (len(some) > 1) for some in candidates)


# --- the report -----------------------------------------------------------------------------------


def render(results: Results, table_box: box.Box = box.SIMPLE_HEAD) -> RenderableType:
    """Return the tables of each scenario and optimizer, with what they say."""
    setting = results.setting
    seeds = len(next(iter(results.runs.values())))
    rates = ", ".join(f"{inner} {rate:g}" for inner, rate in setting.rates.items())
    parts: list[RenderableType] = [
        Text(
            f"{results.data}, {setting.tasks} tasks of {setting.samples} training samples; MLP "
            f"with {setting.hidden} hidden units, {setting.epochs} epochs of batches of "
            f"{setting.batch}; learning rates: {rates}. All in Avalanche's strategy Naive, one "
            f"thread. Mean over seeds 0 to {seeds - 1} on the test split, ± half of the 95 % "
            "t-interval; strengths by validation ACC with other seeds. Forgetting: best earlier "
            "minus final accuracy. Seconds: strategy.train() of all tasks, with what the plugin "
            "does at their ends, by the clock; s of CPU: of the process. MB: what the method "
            f"keeps beside weights and moments. GEM keeps {setting.patterns} samples of each task."
        )
    ]
    for name, inner in dict.fromkeys((name, inner) for name, inner, _ in results.runs):
        methods = [method for method in METHODS if (name, inner, method.key) in results.runs]
        parts += [Text(), Text(f"{name.capitalize()}, {inner}"), Text()]
        parts += [_methods_table(results, name, inner, methods, table_box)]
        parts += [_pairs_table(results, name, inner, methods, table_box)]
    return Group(*parts)


def _methods_table(
    results: Results, name: str, inner: Inner, methods: Sequence[Method], table_box: box.Box
) -> Table:
    table = number_table(
        table_box, "Method", "λ or strength", "ACC", "Forgetting", "Learning\nacc.", "Seconds",
        "s of CPU", "MB",
    )  # fmt: skip
    for method in methods:
        key = (name, inner, method.key)
        runs = results.runs[key]

        def over(metric: Callable[[Matrix], float], runs: Sequence[Run] = runs) -> str:
            return in_percent(Interval.of([metric(run.r) for run in runs]))

        table.add_row(
            method.label,
            "" if method.kind == "none" else f"{results.chosen[key]:g}",
            over(metrics.acc), over(metrics.forgetting), over(metrics.learning_accuracy),
            with_interval(Interval.of([run.seconds for run in runs]), ".2f"),
            with_interval(Interval.of([run.cpu_seconds for run in runs]), ".2f"),
            f"{runs[0].state_bytes / 1e6:.2f}",
        )  # fmt: skip
    return table


def _pairs_table(
    results: Results, name: str, inner: Inner, methods: Sequence[Method], table_box: box.Box
) -> Table:
    table = number_table(
        table_box, "Ours − Avalanche's, paired", "ACC", "Forgetting", "Seconds,\nours / theirs",
        "s of CPU,\nours / theirs", "s of CPU beyond Naive's,\nours, theirs",
    )  # fmt: skip
    naive = results.runs.get((name, inner, NAIVE.key))
    for ours, theirs in PAIRS:
        if ours not in methods or theirs not in methods:
            continue
        own, others = (results.runs[name, inner, one.key] for one in (ours, theirs))

        both = [*zip(own, others, strict=True)]

        def difference(metric: Callable[[Matrix], float], both: Any = both) -> str:
            values = [metric(a.r) - metric(b.r) for a, b in both]
            return in_percent(Interval.of(values), signed=True)

        clock = Interval.of([a.seconds / b.seconds for a, b in both])
        cpu = Interval.of([a.cpu_seconds / b.cpu_seconds for a, b in both])
        added = "–"
        if naive is not None:
            above = [
                np.mean([run.cpu_seconds for run in runs])
                - np.mean([run.cpu_seconds for run in naive])
                for runs in (own, others)
            ]
            added = f"{above[0]:.2f}, {above[1]:.2f}"
        table.add_row(
            f"{ours.label} − {theirs.label}",
            difference(metrics.acc), difference(metrics.forgetting),
            with_interval(clock, ".2f"), with_interval(cpu, ".2f"), added,
        )  # fmt: skip
    return table


def write(results: Results, directory: Path) -> list[Path]:
    """Write ``avalanche.json`` and ``avalanche.md`` into an existing directory."""
    record = {
        "avalanche": _version(),
        "data": results.data,
        "setting": asdict(results.setting),
        "rows": [
            {
                "scenario": name, "optimizer": inner, "method": key,
                "strength": results.chosen[name, inner, key],
                "validation_acc": {
                    f"{one:g}": acc for one, acc in results.scores[name, inner, key].items()
                },
                "runs": [
                    {
                        **asdict(run), "acc": metrics.acc(run.r),
                        "forgetting": metrics.forgetting(run.r),
                        "learning_accuracy": metrics.learning_accuracy(run.r),
                    }
                    for run in runs
                ],
            }
            for (name, inner, key), runs in results.runs.items()
        ],
    }  # fmt: skip
    return tables.write(directory, "avalanche", record, render(results, box.MARKDOWN))


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("avalanche-lib")
    except PackageNotFoundError:  # what stands in for it in tests
        return "none"
