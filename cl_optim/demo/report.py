"""What the demo and the sweep print and write: tables, sentences, JSON."""

from __future__ import annotations

import io
import json
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

import cl_optim
from cl_optim.demo import metrics, sweep
from cl_optim.demo.experiments import ADAMW, ADAMW_SLOW, Experiment
from cl_optim.demo.methods import Method, Protected, Remembering, Replaying
from cl_optim.demo.metrics import Interval, Matrix
from cl_optim.demo.sweep import Score, choose
from cl_optim.demo.train import Run
from cl_optim.ops import library

WIDTH = 160  # where the output is no terminal

_METRICS: tuple[tuple[str, Callable[[Matrix], float]], ...] = (
    ("ACC", metrics.acc),
    ("BWT", metrics.bwt),
    ("Forgetting", metrics.forgetting),
    ("Learning\nacc.", metrics.learning_accuracy),
)
_DEFINITIONS = (
    "ACC: mean accuracy over all tasks at the end; BWT: final minus just-learned accuracy (both "
    "Lopez-Paz & Ranzato 2017, eq. 2–3, BWT averaged over the T−1 earlier tasks); forgetting: best "
    "earlier minus final accuracy (Chaudhry et al. 2018); learning accuracy: on each task right "
    "after learning it. Joint training sees all tasks at once: the ceiling. Every lr and λ is the "
    "best for validation ACC among those that learn (learning accuracy at most {:.0f} points below "
    "AdamW's best)."
)
_RETENTION = (
    " FWT: accuracy just before learning a task minus the untrained network's (eq. 4); every task "
    "has a head of its own here, untrained at both times, so that nothing but chance is expected. "
    "Replay fills half of each batch with the samples that GEM keeps. Progressive: a frozen column "
    "of the same width for each task, with lateral adapters at the head. Seconds: of all steps and "
    "ends of tasks."
)
_GEM = (
    " GEM keeps {} samples of each task and computes their gradients anew in each "
    "step, in every 10th, or once, when the task ends; A-GEM has one row, their mean."
)
_CONFLICTS = (
    "Conflicts: the share of steps whose gradient, before its projection, had a negative product "
    "with a memory row (GEM.conflicts()): with any of them, and with each task's, over the tasks "
    "learned after it. Rows that were stored once are as old as their task."
)
_SLOW = " The small lr is the best for AdamW without that condition."


@dataclass(frozen=True)
class Results:
    """All runs of a demo.

    Attributes:
        experiment: What was run, with its length as it was.
        runs: In any order; every method has the same seeds.
    """

    experiment: Experiment
    runs: tuple[Run, ...]

    @property
    def methods(self) -> list[Method]:
        """In the order of their first runs."""
        return list(dict.fromkeys(run.method for run in self.runs))

    @property
    def seeds(self) -> list[int]:
        """In ascending order."""
        return sorted({run.seed for run in self.runs})

    def of(self, method: Method) -> list[Run]:
        """A method's runs, by seed."""
        return sorted((r for r in self.runs if r.method == method), key=lambda run: run.seed)

    def interval(self, method: Method, metric: Callable[[Matrix], float]) -> Interval:
        """A metric's mean over seeds."""
        return Interval.of([metric(run.matrix) for run in self.of(method)])

    def paired(
        self, method: Method, baseline: Method, metric: Callable[[Matrix], float]
    ) -> Interval:
        """The mean over seeds of the difference between two methods with the same seed."""
        pairs = zip(self.of(method), self.of(baseline), strict=True)
        return Interval.of([metric(a.matrix) - metric(b.matrix) for a, b in pairs])


def render(results: Results, table_box: box.Box = box.SIMPLE_HEAD) -> RenderableType:
    """The tables and sentences of a demo."""
    config = results.experiment.config
    seeds = len(results.seeds)
    definitions = _DEFINITIONS.format(100 * results.experiment.learning_loss)
    if any(method.key == ADAMW_SLOW.key for method in results.methods):
        definitions += _SLOW
    samples = [m.samples for m in results.methods if isinstance(m, (Remembering, Replaying))]
    if samples:
        definitions += _GEM.format(max(samples))
    interval = " ± 95 % t-interval" if seeds > 1 else ""
    setting = (
        f"{results.experiment.name}: {config.tasks} tasks, {seeds} seed{'s' * (seeds > 1)}; MLP "
        f"with {config.hidden} hidden units, batches of {config.batch_size}, {config.epochs} epoch"
        f"{'s' * (config.epochs > 1)} per task. Accuracies in per cent: mean{interval}."
    )
    main = _retention_table if results.experiment.scenario == "retention" else _main_table
    if main is _retention_table:
        definitions += _RETENTION
    parts: list[RenderableType] = [setting, "", main(results, table_box), definitions, ""]
    parts += [_backend(results), ""]
    parts += [_paired_table(results, table_box), *_headlines(results)]
    if any(run.conflicts.size for run in results.runs):
        parts += ["", _conflicts_table(results, table_box), _CONFLICTS]
    return Group(*(Text(part) if isinstance(part, str) else part for part in parts))


def _main_table(results: Results, table_box: box.Box) -> Table:
    names = [name for name, _ in _METRICS]
    table = _table(
        table_box, "Method", "lr", "λ", *names, "Step,\nµs", "Optimizer,\nµs", "Task end,\nms"
    )
    for method in results.methods:
        runs = results.of(method)
        table.add_row(
            *_settings(method),
            *(
                ""
                if method.joint and metric is not metrics.acc
                else _percent(results.interval(method, metric), signed=metric is metrics.bwt)
                for _, metric in _METRICS
            ),
            _number(Interval.of([1e6 * run.step_seconds for run in runs]), ".0f"),
            _number(Interval.of([1e6 * run.optimizer_seconds for run in runs]), ".0f"),
            _number(Interval.of([1e3 * run.end_task_seconds for run in runs]), ".0f"),
        )
    return table


def _retention_table(results: Results, table_box: box.Box) -> Table:
    headers = ("lr", "λ", "ACC", "BWT", "FWT", "Learning\nacc.", "Parameters", "Seconds")
    table = _table(table_box, "Method", *headers)
    for method in results.methods:
        runs = results.of(method)
        transfer = Interval.of([metrics.fwt(run.matrix, run.initial) for run in runs])
        table.add_row(
            *_settings(method),
            _percent(results.interval(method, metrics.acc)),
            "" if method.joint else _percent(results.interval(method, metrics.bwt), signed=True),
            "" if method.joint else _percent(transfer, signed=True),
            "" if method.joint else _percent(results.interval(method, metrics.learning_accuracy)),
            f"{runs[0].parameters:,}",
            _number(Interval.of([run.seconds for run in runs]), ".2f"),
        )
    return table


def _paired_table(results: Results, table_box: box.Box) -> Table:
    baselines = [m for m in results.methods if not (m.protects or m.joint)]
    compared = (("ACC", metrics.acc), ("learning acc.", metrics.learning_accuracy))
    headers = [f"{name} −\n{baseline.label}" for baseline in baselines for name, _ in compared]
    table = _table(table_box, "Paired difference", *headers)
    for method in results.methods:
        if method.protects:
            differences = [
                results.paired(method, baseline, metric)
                for baseline in baselines
                for _, metric in compared
            ]
            table.add_row(method.label, *(_percent(d, signed=True) for d in differences))
    return table


def _conflicts_table(results: Results, table_box: box.Box) -> Table:
    """How often the gradient of a new task would have raised an old task's loss, and whose."""
    tasks = results.experiment.config.tasks
    headers = [f"with\ntask {number}" for number in range(1, tasks)]
    table = _table(table_box, "Steps in conflict, %", "with\nany", *headers)
    for method in results.methods:
        conflicts = [run.conflicts for run in results.of(method)]
        if not conflicts[0].size:
            continue
        shares = [
            Interval.of([float(c[max(1, number) :, number].mean()) for c in conflicts])
            for number in range(tasks)
            if not math.isnan(conflicts[0][-1, number])
        ]
        table.add_row(method.label, *(_percent(share) for share in shares))
    return table


def _table(table_box: box.Box, first: str, *others: str) -> Table:
    """A table of numbers after a column of words; in Markdown, headers have one line only."""
    markdown = table_box is box.MARKDOWN
    table = Table(box=table_box, collapse_padding=not markdown, pad_edge=markdown)
    table.add_column(first, no_wrap=True)
    for header in others:
        name = header.replace("\n", " ") if markdown else header
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _headlines(results: Results) -> list[str]:
    adamw = next(method for method in results.methods if method.key == ADAMW.key)
    protected = [m for m in results.methods if m.key in results.experiment.headline]
    return [_headline(results, method, adamw) for method in protected]


def _headline(results: Results, method: Method, adamw: Method) -> str:
    acc = results.paired(method, adamw, metrics.acc)
    learning = results.paired(method, adamw, metrics.learning_accuracy)
    seeds = len(results.seeds)
    if seeds == 1:
        certainty = "one seed"
    else:
        low, high = 100 * (acc.mean - acc.half_width), 100 * (acc.mean + acc.half_width)
        certainty = f"95 % interval [{low:+.1f}, {high:+.1f}], paired over {seeds} seeds"
    return (
        f"ACC({method.label}) − ACC(AdamW) = {100 * acc.mean:+.1f} points ({certainty}), at "
        f"{100 * learning.mean:+.1f} points of learning accuracy."
    )


def _backend(results: Results) -> str:
    """Which implementation took the steps of EWCAdamW."""
    backends = sorted({run.backend for run in results.runs if isinstance(run.method, Protected)})
    if backends == ["cpu"]:
        simd = library.backends()["cpu"].info["simd"]
        ours = f"the compiled extension cl_optim._C ({simd})"
    else:
        ours = f"{', '.join(backends)}: {library.explain('cpu')}"
    return (
        f"Steps of EWCAdamW (L2-SP, EWC) ran on {ours}; steps of AdamW on "
        "torch.optim.AdamW(fused=True), of SGD likewise. One thread. A step is forward, backward "
        "and optimizer, the median of a run; the end of a task is the Fisher and consolidate(), or "
        "remember()."
    )


def _percent(interval: Interval, *, signed: bool = False) -> str:
    percent = Interval(100 * interval.mean, 100 * interval.half_width)
    return _number(percent, "+.1f" if signed else ".1f")


def _number(interval: Interval, form: str) -> str:
    mean = format(interval.mean, form)
    if math.isnan(interval.half_width):
        return mean
    return f"{mean} ± {format(interval.half_width, form.lstrip('+'))}"


def render_sweep(
    experiment: Experiment,
    scores: Sequence[Score],
    seeds: int,
    table_box: box.Box = box.SIMPLE_HEAD,
) -> RenderableType:
    """The grid of every method with its validation ACC, and what was chosen."""
    chosen = choose(scores, experiment.learning_loss)
    last = sweep.FIRST_SEED + seeds - 1
    parts: list[RenderableType] = [
        Text(
            f"{experiment.name}: validation ACC (learning accuracy) in per cent, mean over seeds "
            f"{sweep.FIRST_SEED} to {last}. Chosen (*): the highest ACC among those whose learning "
            f"accuracy is at most {100 * experiment.learning_loss:.0f} points below AdamW's best."
        )
    ]
    for key in dict.fromkeys(score.method.key for score in scores):
        of_method = [score for score in scores if score.method.key == key]
        parts += [Text(), _grid_table(of_method, chosen.get(key), table_box)]
    parts += [Text(), _chosen_table(experiment, chosen, table_box)]
    return Group(*parts)


def _grid_table(scores: Sequence[Score], best: Method | None, table_box: box.Box) -> Table:
    """One method: a row for each learning rate, a column for each λ."""
    lambdas = dict.fromkeys(_lambda(score.method) for score in scores)
    headers = ["ACC" if value is None else f"λ = {value:g}" for value in lambdas]
    table = _table(table_box, scores[0].method.label, *headers)
    for lr in dict.fromkeys(score.method.lr for score in scores):
        cells = [_cell(s, s.method == best) for s in scores if s.method.lr == lr]
        table.add_row(f"lr = {lr:g}", *cells)
    return table


def _cell(score: Score, best: bool) -> str:
    if math.isnan(score.acc):
        return "diverged"
    learning = (
        "" if math.isnan(score.learning_accuracy) else f" ({_points(score.learning_accuracy)})"
    )
    return f"{_points(score.acc)}{learning}{' *' if best else ''}"


def _chosen_table(experiment: Experiment, chosen: dict[str, Method], table_box: box.Box) -> Table:
    table = _table(table_box, "Chosen", "lr", "λ", "in experiments.py", "note")
    for method in experiment.methods:
        best = chosen.get(method.key)
        if best is None:
            table.add_row(method.label, "", "", "", "no candidate learns well enough")
            continue
        edges = sweep.at_edge(best, experiment)
        table.add_row(
            *_settings(best),
            "the same" if best == method else " ".join(_settings(method)[1:]),
            f"{' and '.join(edges)} at the edge of the grid" if edges else "",
        )
    return table


def _settings(method: Method) -> tuple[str, str, str]:
    value = _lambda(method)
    return method.label, f"{method.lr:g}", "" if value is None else f"{value:g}"


def _lambda(method: Method) -> float | None:
    return method.ewc_lambda if isinstance(method, Protected) else None


def _points(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def versions() -> dict[str, str]:
    """Of everything that makes the numbers."""
    return {
        "cl_optim": cl_optim.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def to_json(results: Results) -> dict[str, Any]:
    """Every run, and the versions that made it, as JSON knows it."""
    return {
        "experiment": results.experiment.name,
        "config": asdict(results.experiment.config),
        "versions": versions(),
        "runs": [
            {
                **asdict(run),
                "metrics": {
                    metric.__name__: metric(run.matrix)
                    for _, metric in _METRICS
                    if metric is metrics.acc or not run.method.joint
                },
                "matrix": run.matrix.tolist(),
                "initial": run.initial.tolist(),
                "conflicts": [[_finite(c) for c in task] for task in run.conflicts.tolist()],
                "curve_steps": run.curve_steps.tolist(),
                "curves": [[_finite(a) for a in point] for point in run.curves.round(4).tolist()],
            }
            for run in results.runs
        ],
    }


def write(results: Results, directory: Path) -> list[Path]:
    """Write JSON, Markdown and a PNG named after the experiment into an existing directory."""
    from cl_optim.demo import picture  # needs matplotlib, which nothing else here does

    paths = [directory / f"{results.experiment.key}.{kind}" for kind in ("json", "md", "png")]
    paths[0].write_text(json.dumps(to_json(results)) + "\n", encoding="utf-8")
    write_markdown(render(results, box.MARKDOWN), paths[1])
    picture.draw(results, paths[2])
    return paths


def write_sweep(
    experiment: Experiment, scores: Sequence[Score], seeds: int, directory: Path
) -> list[Path]:
    """Write JSON and Markdown named after the experiment into an existing directory."""
    paths = [directory / f"sweep-{experiment.key}.{kind}" for kind in ("json", "md")]
    chosen = choose(scores, experiment.learning_loss)
    record = {
        "experiment": experiment.name,
        "versions": versions(),
        "seeds": list(range(sweep.FIRST_SEED, sweep.FIRST_SEED + seeds)),
        "scores": [
            {
                "method": asdict(score.method),
                "acc": _finite(score.acc),
                "learning_accuracy": _finite(score.learning_accuracy),
            }
            for score in scores
        ],
        "chosen": {key: asdict(method) for key, method in chosen.items()},
    }
    paths[0].write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    write_markdown(render_sweep(experiment, scores, seeds, box.MARKDOWN), paths[1])
    return paths


def write_markdown(content: RenderableType, path: Path, width: int = 200) -> None:
    """Write rendered tables and sentences as text; tables as Markdown if they have its box."""
    console = Console(file=io.StringIO(), width=width)
    with console.capture() as capture:
        console.print(content)
    lines = [line.rstrip() for line in capture.get().splitlines()]  # rich pads them
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _finite(value: float) -> float | None:
    return None if math.isnan(value) else value
